"""What goes into and comes out of every module, forward and backward: where two runs part, a module is named."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from trainer.certificate.batches import against_whole

Key = tuple[str, int]
"""A module's name, and which of its calls within one micro-batch."""


@dataclass
class Call:
    """One call of one module: copies of the tensors, and the gradients that came to them."""

    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    input_gradients: dict[int, Tensor] = field(default_factory=dict)
    output_gradients: dict[int, Tensor] = field(default_factory=dict)
    state: dict[str, Tensor] = field(default_factory=dict)
    part: int = 0


class Probe:
    """Watches the modules of a model through one run.

    Args:
        states: also copy each module's own parameters and buffers as they are when it is called.
    """

    def __init__(self, states: bool = False) -> None:
        self.calls: dict[Key, list[Call]] = {}
        self.again: list[tuple[str, Call]] = []
        """Calls inside backward: recomputes, in the order in which they ended."""
        self.inside: list[str] = []
        """The modules whose forward runs just now, the innermost last."""
        self._states = states
        self._part = -1
        self._counts: dict[str, int] = {}

    def next(self) -> None:
        """A micro-batch begins."""
        self._part += 1
        self._counts = {}

    def forget(self) -> None:
        self.__init__(self._states)  # type: ignore[misc]

    @contextmanager
    def watching(self, modules: Mapping[str, nn.Module]) -> Iterator[None]:
        """Inside, every module's `forward` is watched (also where a checkpoint calls it again)."""
        own: list[tuple[nn.Module, bool, Any]] = []
        try:
            for name, module in modules.items():
                if isinstance(module, torch.jit.ScriptModule | nn.ModuleList | nn.ModuleDict):
                    continue
                had = "forward" in module.__dict__
                before = module.forward
                own.append((module, had, before))
                module.forward = self._watched(name, module, before)
            yield
        finally:
            for module, had, before in reversed(own):
                if had:
                    module.forward = before
                else:
                    module.__dict__.pop("forward", None)

    def _watched(self, name: str, module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            inside_backward = torch._C._current_graph_task_id() != -1
            call = Call(part=max(self._part, 0))
            _note((args, kwargs), call.inputs, call.input_gradients)
            if self._states:
                held = {**module._parameters, **module._buffers}
                call.state = {key: t.detach().clone() for key, t in held.items() if t is not None}
            self.inside.append(name)
            try:
                result = forward(*args, **kwargs)
            finally:
                self.inside.pop()
            _note(result, call.outputs, call.output_gradients)
            if inside_backward:
                self.again.append((name, call))
            else:
                index = self._counts.get(name, 0)
                self._counts[name] = index + 1
                self.calls.setdefault((name, index), []).append(call)
            return result

        return run


def _note(value: Any, copies: list[Tensor], gradients: dict[int, Tensor]) -> None:
    for tensor in _tensors(value):
        index = len(copies)
        copies.append(tensor.detach().clone())
        if tensor.requires_grad and torch.is_grad_enabled():
            handle = tensor.register_hook(_keeper(index, gradients))
            # Before the hooks that are there: what comes in is wanted, not what the module's own hook makes of it.
            hooks = tensor._backward_hooks
            for key in [key for key in hooks or {} if key != handle.id]:
                hooks[key] = hooks.pop(key)  # type: ignore[index, union-attr]


def _keeper(index: int, gradients: dict[int, Tensor]) -> Callable[[Tensor], None]:
    def keep(gradient: Tensor) -> None:
        gradients[index] = gradient.detach().clone()

    return keep


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.layout is torch.strided and value.device.type != "meta":
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif hasattr(value, "__dataclass_fields__"):
        for name in value.__dataclass_fields__:
            yield from _tensors(getattr(value, name))


def first_to_differ(cut: Probe, whole: Probe, tolerance: float) -> str | None:
    """The first module whose rows come in alike and go out otherwise; its inner modules are asked before it."""
    for key, (call, *_) in whole.calls.items():
        parts = cut.calls.get(key)
        if parts is None:
            continue
        if _agree([one.inputs for one in parts], call.inputs, tolerance) is False:
            continue
        if _agree([one.outputs for one in parts], call.outputs, tolerance) is False:
            return key[0]
    return None


def first_to_pair(cut: Probe, whole: Probe, tolerance: float) -> str | None:
    """The first module whose rows come in alike and whose output has more than one dimension that grows with them."""
    for key, (call, *_) in whole.calls.items():
        parts = cut.calls.get(key)
        if parts is None or _agree([one.inputs for one in parts], call.inputs, tolerance) is not True:
            continue
        for index, output in enumerate(call.outputs):
            for one in parts:
                if len(one.outputs) == len(call.outputs) and one.outputs[index].dim() == output.dim():
                    grown = [a != b for a, b in zip(one.outputs[index].shape, output.shape, strict=True)]
                    if sum(grown) > 1:
                        return key[0]
    return None


def first_not_finite(probe: Probe) -> str | None:
    """The first module that makes numbers that are not finite of such that are: in forward, else in backward."""
    for (name, _), calls in probe.calls.items():
        if any(_finite(call.inputs) and not _finite(call.outputs) for call in calls):
            return name
    for (name, _), calls in reversed(probe.calls.items()):
        for call in calls:
            if _finite(_listed(call.output_gradients)) and not _finite(_listed(call.input_gradients)):
                return name
    return None


def _finite(tensors: list[Tensor]) -> bool:
    return all(bool(one.isfinite().all()) for one in tensors)


def first_to_differ_backward(
    cut: Probe, whole: Probe, tolerance: float, parameters_differ: Callable[[str], bool]
) -> tuple[bool, str | None]:
    """(whether what comes to the model's outputs from the objective is alike, the module that makes it otherwise).

    Args:
        parameters_differ: whether the gradient of a parameter of this module's own is another one.
    """
    guilty: list[str] = []
    outermost_alike = True
    for key in reversed(list(whole.calls)):
        parts, call = cut.calls.get(key), whole.calls[key][0]
        if parts is None:
            continue
        alike = _agree([_listed(one.output_gradients) for one in parts], _listed(call.output_gradients), tolerance)
        if alike is False:
            if not any(_is_inside(key[0], other) for other, _ in whole.calls if other != key[0]):
                outermost_alike = False
            continue
        inwards = _agree([_listed(one.input_gradients) for one in parts], _listed(call.input_gradients), tolerance)
        if inwards is False or (alike and parameters_differ(key[0])):
            guilty.append(key[0])
    innermost = [one for one in guilty if not any(_is_inside(other, one) for other in guilty if other != one)]
    return outermost_alike, innermost[0] if innermost else None


def first_to_recompute_otherwise(probe: Probe) -> tuple[str, list[str]] | None:
    """The first module whose recompute, from the same inputs, comes out otherwise than its forward did.

    Returns its name and the names of its tensors that were changed in between.
    """
    forward: dict[str, list[Call]] = {}
    for (name, _), calls in probe.calls.items():
        forward.setdefault(name, []).extend(calls)
    changed: list[tuple[str, list[str]]] = []
    for name, again in probe.again:
        before = [one for one in forward.get(name, []) if one.part == again.part and _same(one.inputs, again.inputs)]
        if not before:
            continue
        call = before[0]
        other = [
            key for key, value in again.state.items() if key in call.state and not _same([value], [call.state[key]])
        ]
        if not any(_same(one.outputs, again.outputs) for one in before):
            return name, other
        if other:
            changed.append((name, other))
    return changed[0] if changed else None


def _listed(gradients: dict[int, Tensor]) -> list[Tensor]:
    return [gradients[index] for index in sorted(gradients)]


def _is_inside(name: str, outer: str) -> bool:
    return name != outer and (outer == "" or name.startswith(f"{outer}."))


def _same(left: list[Tensor], right: list[Tensor]) -> bool:
    return len(left) == len(right) and all(
        one.shape == other.shape and torch.equal(one.nan_to_num(), other.nan_to_num())
        for one, other in zip(left, right, strict=True)
    )


def _agree(parts: list[list[Tensor]], whole: list[Tensor], tolerance: float) -> bool | None:
    """Whether the parts' tensors, put together, are the whole's. None where nothing can be compared."""
    if any(len(one) != len(whole) for one in parts):
        return None
    compared = None
    for index, right in enumerate(whole):
        left = against_whole([one[index] for one in parts], right)
        if left is None:
            continue
        compared = True
        if not _near(left, right, tolerance):
            return False
    return compared


def _near(left: Tensor, right: Tensor, tolerance: float) -> bool:
    if not (right.is_floating_point() or right.is_complex()):
        return torch.equal(left, right) or torch.equal(left.reshape(-1).sort()[0], right.reshape(-1).sort()[0])
    one, other = _flat(left), _flat(right)
    size = max(float(other.norm()), 1e-300)
    if float((one - other).norm()) <= tolerance * size:
        return True
    # Rows may lie in another order (time before rows, flattened): then the same numbers are there.
    return float((one.sort()[0] - other.sort()[0]).norm()) <= tolerance * size


def _flat(tensor: Tensor) -> Tensor:
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return tensor.reshape(-1).double().nan_to_num()
