"""The calls into torch that are private, all of them, each with its guard.

What they save is measured by scripts/bench. Checked with torch 2.13; tests/test_kernels.py holds each against its
public twin bit for bit, so that a torch that changes one of them turns a test red and not a run.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer
from torch.optim import optimizer as torch_optimizer

_ENGINE = torch.autograd.Variable._execution_engine

# A step counter is a float32 tensor on the CPU or beside its parameter; adding a tensor is cheaper than a number.
_ONES: dict[torch.device, Tensor] = {}


def backward(roots: tuple[Tensor, ...], seeds: tuple[Tensor, ...], inputs: tuple[Tensor, ...], keep: bool) -> None:
    """`torch.autograd.backward(roots, seeds, retain_graph=keep, inputs=inputs or None)` without its Python part.

    Each root requires a gradient and each seed has its root's shape, dtype and device: the caller sees to it.
    """
    _ENGINE.run_backward(roots, seeds, keep, False, inputs, allow_unreachable=True, accumulate_grad=True)


def without_python(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The mean squared error as torch's own function calls it in the end, without the Python around that; any other
    loss as it is. That Python broadcasts and warns, so it is still asked where the shapes differ."""
    if loss is not functional.mse_loss and not (type(loss) is nn.MSELoss and loss.reduction == "mean"):
        return loss

    def mse_loss(outputs: Tensor, targets: Tensor) -> Tensor:
        if outputs.shape != targets.shape or (isinstance(loss, nn.Module) and _is_watched(loss)):
            return loss(outputs, targets)
        mean: Tensor = torch._C._nn.mse_loss(outputs, targets, 1)  # type: ignore[arg-type]  # 1 stands for mean
        return mean

    return mse_loss


def _is_watched(module: nn.Module) -> bool:
    """Whether a call of the module would do more than its forward."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def check_and_scale(tensors: list[Tensor], found: Tensor, factor: Tensor) -> None:
    """Set `found` to 1 where an element of the (dense, real, same dtype and device) tensors is not finite, then
    multiply them by `factor` in place. It tests before it multiplies."""
    torch._amp_foreach_non_finite_check_and_unscale_(tensors, found, factor)


def has_hooks(optimizer: Optimizer) -> bool:
    """Whether something of the caller's runs around `optimizer.step()`."""
    return bool(
        "step" in optimizer.__dict__  # a scheduler of torch wraps it on the instance
        or optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or torch_optimizer._global_optimizer_pre_hooks
        or torch_optimizer._global_optimizer_post_hooks
    )


def can_update_directly(optimizer: Optimizer) -> bool:
    """Whether `update_directly` may stand for `optimizer.step()`: nothing of the caller's would be passed over."""
    kind = type(optimizer)
    if kind not in _KERNELS:
        return False
    return (
        _as_written(kind) in _STEPS
        and not has_hooks(optimizer)
        and all(group["fused"] for group in optimizer.param_groups)
    )


def _as_written(kind: type[Optimizer]) -> Any:
    """The class's step without the wrapper that torch puts around it, once, when the first instance is made."""
    step: Any = kind.step
    return step.__wrapped__ if getattr(step, "hooked", False) else step


_STEPS = (_as_written(Adam), _as_written(SGD), _as_written(Adagrad))  # AdamW has Adam's


def fused_skips_elements(kind: type, parameter: Tensor) -> bool:
    """Whether torch's fused kernel would leave most of the parameter where it is, silently: its SGD for bfloat16 and
    float16 on the CPU moves only what is left over after whole vectors (pytorch issue 191763)."""
    return kind is SGD and parameter.dtype in (torch.bfloat16, torch.float16) and parameter.device.type == "cpu"


def update_directly(optimizer: Optimizer, scale: Tensor | None) -> bool:
    """`optimizer.step()` by its fused kernel alone, gradients divided by `scale` inside it (None: by nothing).

    Nothing is kept between calls: parameters, state and hyperparameters are read each time. Returns False, having
    changed nothing, where a group is not ready for it: a state that is not made yet, mixed dtypes or devices,
    a learning rate that is no float, amsgrad, float64 with a scale (the kernel reads the scale as float32).
    """
    calls = []
    for group in optimizer.param_groups:
        lists = _gather(optimizer, group)
        if lists is None:
            return False
        if lists[0]:
            if scale is not None and lists[0][0].dtype is torch.float64:
                return False
            calls.append((group, lists))
    for group, lists in calls:
        _KERNELS[type(optimizer)](group, lists, scale)
        mark_changed(lists[0])
    return True


def mark_changed(parameters: list[Tensor]) -> None:
    """`torch.autograd.graph.increment_version`: the fused kernels change parameters without counting it.

    Uncounted, a second backward through a graph from before the step is silently wrong instead of refused.
    """
    torch._C._increment_version(parameters)


def _gather(optimizer: Optimizer, group: dict[str, Any]) -> tuple[list[Tensor], ...] | None:
    """Parameters that have a gradient, the gradients, and their states; None where one of them is not ready."""
    parameters: list[Tensor] = []
    gradients: list[Tensor] = []
    first: list[Tensor] = []
    second: list[Tensor] = []
    steps: list[Tensor] = []
    sgd = "momentum" in group
    stateless = sgd and group["momentum"] == 0
    if group.get("amsgrad") or group.get("differentiable") or type(group["lr"]) is not float:
        return None
    kind = None
    for parameter in group["params"]:
        gradient = parameter.grad
        if gradient is None:
            continue
        this = (parameter.dtype, parameter.device, gradient.dtype, gradient.layout)
        if kind is None:
            if gradient.layout is not torch.strided or parameter.dtype != gradient.dtype or parameter.is_complex():
                return None
            if fused_skips_elements(type(optimizer), parameter):
                return None
            if parameter.device.type != "cpu":
                return None  # elsewhere the flag stays on the device and `step()` itself passes it on
            kind = this
        elif this != kind:
            return None
        if not stateless:
            state = optimizer.state.get(parameter)
            if not state:
                return None
            if sgd:
                buffer = state.get("momentum_buffer")
                if buffer is None:
                    return None
                first.append(buffer)
            elif "sum" in state:
                first.append(state["sum"])
                steps.append(state["step"])
            else:
                first.append(state["exp_avg"])
                second.append(state["exp_avg_sq"])
                steps.append(state["step"])
        parameters.append(parameter)
        gradients.append(gradient)
    return parameters, gradients, first, second, steps


def _sgd(group: dict[str, Any], lists: tuple[list[Tensor], ...], scale: Tensor | None) -> None:
    parameters, gradients, momenta, _, _ = lists
    torch._fused_sgd_(
        parameters,
        gradients,
        momenta,
        weight_decay=group["weight_decay"],
        momentum=group["momentum"],
        lr=group["lr"],
        dampening=group["dampening"],
        nesterov=group["nesterov"],
        maximize=group["maximize"],
        is_first_step=False,
        grad_scale=scale,
        found_inf=None,
    )


def _adam(group: dict[str, Any], lists: tuple[list[Tensor], ...], scale: Tensor | None) -> None:
    parameters, gradients, averages, squares, steps = lists
    _count(steps)
    kernel = torch._fused_adamw_ if group["decoupled_weight_decay"] else torch._fused_adam_
    beta1, beta2 = group["betas"]
    kernel(
        parameters,
        gradients,
        averages,
        squares,
        [],
        steps,
        lr=group["lr"],
        beta1=beta1,
        beta2=beta2,
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        amsgrad=False,
        maximize=group["maximize"],
        grad_scale=scale,
        found_inf=None,
    )


def _adagrad(group: dict[str, Any], lists: tuple[list[Tensor], ...], scale: Tensor | None) -> None:
    parameters, gradients, sums, _, steps = lists
    _count(steps)
    torch._fused_adagrad_(
        parameters,
        gradients,
        sums,
        steps,
        lr=group["lr"],
        lr_decay=group["lr_decay"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=group["maximize"],
        grad_scale=scale,
        found_inf=None,
    )


def _count(steps: list[Tensor]) -> None:
    device = steps[0].device
    one = _ONES.get(device)
    if one is None:
        one = _ONES[device] = torch.ones((), device=device)
    torch._foreach_add_(steps, [one] * len(steps))


_KERNELS: dict[type, Callable[[dict[str, Any], tuple[list[Tensor], ...], Tensor | None], None]] = {
    Adam: _adam,
    AdamW: _adam,
    SGD: _sgd,
    Adagrad: _adagrad,
}


@contextmanager
def without_compiler() -> Iterator[None]:
    """Inside it, torch's optimizers do not import the compiler: two seconds, for a mark that only matters to it.

    Torch wraps four methods of Optimizer so that compiled code leaves them out, and imports its compiler when one of
    them is first called. They are called bare here, and wrapped again afterwards, unless the compiler is there already.
    """
    if "torch._dynamo" in sys.modules:
        yield
        return
    bare = [getattr(getattr(Optimizer, name), "__wrapped__", None) for name in _NOT_COMPILED]
    marked = [method for method in bare if method is not None and not hasattr(method, _MARK)]
    for method in marked:
        setattr(method, _MARK, method)
    try:
        yield
    finally:
        for method in marked:
            delattr(method, _MARK)


def step(optimizer: Optimizer) -> None:
    """`optimizer.step()`; where nothing of the caller's hangs on it, without the wrapper that imports the compiler."""
    if "torch._dynamo" in sys.modules or not can_update_directly(optimizer):
        optimizer.step()
        return
    if any(group.get("differentiable") for group in optimizer.param_groups):
        optimizer.step()
        return
    bare: Any = _as_written(type(optimizer))
    while hasattr(bare, "__wrapped__"):
        bare = bare.__wrapped__
    with torch.no_grad():
        bare(optimizer)


_NOT_COMPILED = ("add_param_group", "zero_grad", "state_dict", "load_state_dict")
_MARK = "__dynamo_disable"
