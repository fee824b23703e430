"""Each private call of trainer/kernels.py against its public twin, bit for bit, and each guard of the direct update."""

import copy
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from trainer import kernels

Make = Callable[[list[Any]], Optimizer]

MAKERS: dict[str, Make] = {
    "sgd": lambda groups: SGD(groups, lr=0.1, fused=True),
    "sgd decay": lambda groups: SGD(groups, lr=0.1, weight_decay=0.02, fused=True),
    "sgd tensor decay": lambda groups: SGD(groups, lr=0.1, weight_decay=torch.tensor(0.02), fused=True),
    "sgd momentum": lambda groups: SGD(groups, lr=0.1, momentum=0.9, fused=True),
    "sgd dampening": lambda groups: SGD(groups, lr=0.1, momentum=0.9, dampening=0.3, weight_decay=0.1, fused=True),
    "sgd nesterov": lambda groups: SGD(groups, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01, fused=True),
    "sgd maximize": lambda groups: SGD(groups, lr=0.1, momentum=0.9, maximize=True, fused=True),
    "adam": lambda groups: Adam(groups, lr=0.01, fused=True),
    "adam decay": lambda groups: Adam(groups, lr=0.01, weight_decay=0.1, betas=(0.8, 0.95), fused=True),
    "adam decoupled": lambda groups: Adam(groups, lr=0.01, weight_decay=0.1, decoupled_weight_decay=True, fused=True),
    "adam capturable": lambda groups: Adam(groups, lr=0.01, capturable=True, fused=True),
    "adamw": lambda groups: AdamW(groups, lr=0.01, fused=True),
    "adamw maximize": lambda groups: AdamW(groups, lr=0.01, eps=1e-4, maximize=True, fused=True),
    "adagrad": lambda groups: Adagrad(groups, lr=0.05, fused=True),
    "adagrad decay": lambda groups: Adagrad(
        groups, lr=0.05, lr_decay=0.01, weight_decay=0.02, initial_accumulator_value=0.1, eps=1e-6, fused=True
    ),
    "adagrad maximize": lambda groups: Adagrad(groups, lr=0.05, maximize=True, fused=True),
    "adamw tensor betas": lambda groups: AdamW(groups, lr=0.01, betas=_tensor_betas(), fused=True),
}


def _tensor_betas() -> Any:
    return torch.tensor(0.9), torch.tensor(0.99)


def make_parameters(dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    shapes = [(5, 3), (7,), (), (2, 3, 4)]
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def give_gradients(parameters: list[torch.nn.Parameter], seed: int, without: tuple[int, ...] = ()) -> None:
    generator = torch.Generator().manual_seed(seed)
    for index, parameter in enumerate(parameters):
        gradient = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        parameter.grad = None if index in without else gradient


def numbers(optimizer: Optimizer) -> list[Any]:
    """Parameters and their states, in order."""
    found: list[Any] = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            found.append(parameter.detach())
            found.extend(optimizer.state.get(parameter, {}).items())
    return found


def same(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(same(a, b) for a, b in zip(left, right, strict=True))
    return bool(left == right)


def direct_or_step(optimizer: Optimizer, scale: Tensor | None = None) -> bool:
    """What a step does: directly where it may be, else the optimizer's own step."""
    if kernels.can_update_directly(optimizer) and kernels.update_directly(optimizer, scale):
        return True
    optimizer.step()
    return False


def twins(make: Make, split: bool = False, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    made = []
    for _ in range(2):
        parameters = make_parameters(dtype)
        groups: list[Any] = parameters
        if split:
            groups = [{"params": parameters[:2]}, {"params": parameters[2:], "lr": 0.003, "weight_decay": 0.05}]
        made += [parameters, make(groups)]
    return tuple(made)


# backward


def graph() -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    w = torch.randn(4, 3, generator=generator, requires_grad=True)
    b = torch.randn(3, generator=generator, requires_grad=True)
    x = torch.randn(6, 4, generator=generator)
    return (x @ w + b).tanh(), [w, b]


@pytest.mark.parametrize("limited", [False, True])
@pytest.mark.parametrize("earlier", [False, True])
def test_backward_is_the_public_one(limited: bool, earlier: bool) -> None:
    found = []
    for private in (True, False):
        out, leaves = graph()
        if earlier:
            for leaf in leaves:
                leaf.grad = torch.ones_like(leaf)
        roots, seeds = (out.square().mean(), out), (torch.tensor(0.3), torch.full_like(out, 0.25))
        inputs = (leaves[0],) if limited else ()
        if private:
            kernels.backward(roots, seeds, inputs, False)
        else:
            torch.autograd.backward(roots, seeds, inputs=inputs or None)
        found.append([leaf.grad for leaf in leaves])
    assert same(found[0][0], found[1][0])
    if limited and not earlier:
        assert found[0][1] is None
        assert found[1][1] is None
    else:
        assert same(found[0][1], found[1][1])


def test_backward_keeps_the_graph_only_when_told() -> None:
    out, (w, _) = graph()
    root = out.sum()
    kernels.backward((root,), (torch.tensor(1.0),), (), True)
    once = w.grad.clone()
    kernels.backward((root,), (torch.tensor(1.0),), (), False)
    assert torch.equal(w.grad, 2 * once)
    with pytest.raises(RuntimeError, match="second time"):
        kernels.backward((root,), (torch.tensor(1.0),), (), False)


def test_backward_runs_hooks_and_custom_functions() -> None:
    seen: list[float] = []
    out, (w, b) = graph()
    w.register_hook(lambda gradient: gradient * 2)
    b.register_post_accumulate_grad_hook(lambda leaf: seen.append(leaf.grad.sum().item()))
    kernels.backward((out.sum(),), (torch.tensor(1.0),), (), False)
    other, (w2, b2) = graph()
    other.sum().backward()
    assert torch.equal(w.grad, 2 * w2.grad)
    assert seen == [b2.grad.sum().item()]


# check_and_scale


@pytest.mark.parametrize("bad", [None, float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_check_and_scale_is_isfinite_and_mul(bad: float | None, dtype: torch.dtype) -> None:
    tensors = [parameter.detach().clone() for parameter in make_parameters(dtype)]
    if bad is not None:
        tensors[3].view(-1)[11] = bad
    wanted = [tensor * 0.5 for tensor in tensors]
    found = torch.zeros(())
    kernels.check_and_scale(tensors, found, torch.tensor(0.5))
    assert found.item() == float(any(not tensor.isfinite().all() for tensor in wanted))
    assert all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(tensors, wanted, strict=True))


def test_check_and_scale_tests_before_it_multiplies() -> None:
    found = torch.zeros(())
    large = torch.tensor([3e38])
    kernels.check_and_scale([large], found, torch.tensor(10.0))
    assert large.isinf().all()
    assert found.item() == 0.0


def test_check_and_scale_leaves_a_flag_that_is_set() -> None:
    found = torch.ones(())
    kernels.check_and_scale([torch.ones(3)], found, torch.ones(()))
    assert found.item() == 1.0


# The direct update


@pytest.mark.parametrize("split", [False, True], ids=["one group", "two groups"])
@pytest.mark.parametrize("name", MAKERS)
def test_direct_update_is_step_bit_for_bit(name: str, split: bool) -> None:
    mine, direct, theirs, public = twins(MAKERS[name], split)
    taken_directly = 0
    for step in range(50):
        without = (1,) if step % 7 == 3 else (0, 2) if step % 7 == 5 else ()
        for parameters, optimizer in ((mine, direct), (theirs, public)):
            give_gradients(parameters, step, without)
            if step == 20:
                optimizer.param_groups[-1]["lr"] = 0.0421
            if step == 30:
                optimizer.param_groups[0]["weight_decay"] = 0.3
        taken_directly += direct_or_step(direct)
        public.step()
        assert same(numbers(direct), numbers(public)), step
    assert taken_directly >= 49


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["sgd nesterov", "adamw", "adam decay"])
def test_direct_update_in_other_precisions(name: str, dtype: torch.dtype) -> None:
    mine, direct, theirs, public = twins(MAKERS[name], dtype=dtype)
    for step in range(10):
        give_gradients(mine, step)
        give_gradients(theirs, step)
        skips = kernels.fused_skips_elements(type(direct), mine[0])
        assert skips == (type(direct) is SGD and dtype is torch.bfloat16)
        assert direct_or_step(direct) == (step > 0 and not skips)
        public.step()
    assert same(numbers(direct), numbers(public))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_torchs_fused_sgd_still_leaves_narrow_elements_where_they_are(dtype: torch.dtype) -> None:
    """Should this turn red, torch has mended it, and `fused_skips_elements` can go."""
    parameter = torch.nn.Parameter(torch.ones(64, dtype=dtype))
    parameter.grad = torch.ones_like(parameter)
    SGD([parameter], lr=0.5, fused=True).step()
    assert (parameter == 1.0).any()


@pytest.mark.parametrize("name", MAKERS)
def test_scale_is_that_of_grad_scale(name: str) -> None:
    mine, direct, theirs, public = twins(MAKERS[name], split=True)
    scale = torch.tensor(3.7)
    for step in range(8):
        give_gradients(mine, step)
        give_gradients(theirs, step)
        if step == 0:
            direct.step()
            public.step()
            continue
        assert kernels.update_directly(direct, scale)
        public.grad_scale = scale
        public.step()
        del public.grad_scale
        assert same([p.grad for p in mine], [p.grad for p in theirs])
    assert same(numbers(direct), numbers(public))


def test_a_scale_is_refused_for_float64_with_nothing_changed() -> None:
    parameters = make_parameters(torch.float64)
    optimizer = AdamW(parameters, fused=True)
    give_gradients(parameters, 0)
    optimizer.step()
    before = copy.deepcopy(numbers(optimizer))
    assert not kernels.update_directly(optimizer, torch.tensor(2.0))
    assert same(numbers(optimizer), before)
    assert kernels.update_directly(optimizer, None)


@pytest.mark.parametrize("name", ["sgd momentum", "adamw"])
def test_nothing_changes_where_one_group_is_not_ready(name: str) -> None:
    parameters = make_parameters()
    optimizer = MAKERS[name]([{"params": parameters[:2]}, {"params": parameters[2:]}])
    give_gradients(parameters, 0, without=(2, 3))
    optimizer.step()
    give_gradients(parameters, 1)
    before = copy.deepcopy(numbers(optimizer))
    assert not kernels.update_directly(optimizer, None)
    assert same(numbers(optimizer), before)
    optimizer.step()
    assert kernels.update_directly(optimizer, None)


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
def test_a_parameter_joins_later(name: str) -> None:
    mine, direct, theirs, public = twins(MAKERS[name])
    taken = []
    for step in range(6):
        give_gradients(mine, step, without=(1,) if step < 3 else ())
        give_gradients(theirs, step, without=(1,) if step < 3 else ())
        taken.append(direct_or_step(direct))
        public.step()
        assert same(numbers(direct), numbers(public))
    assert taken == ([True] * 6 if name == "sgd" else [False, True, True, False, True, True])


@pytest.mark.parametrize("name", ["sgd momentum", "adamw"])
def test_state_is_looked_up_each_time(name: str) -> None:
    mine, direct, theirs, public = twins(MAKERS[name])
    saved = None
    for step in range(12):
        give_gradients(mine, step)
        give_gradients(theirs, step)
        direct_or_step(direct)
        public.step()
        if step == 3:
            saved = copy.deepcopy(public.state_dict())
        for parameters, optimizer in ((mine, direct), (theirs, public)):
            if step == 5:
                optimizer.load_state_dict(copy.deepcopy(saved))
            if step == 7:
                late = torch.nn.Parameter(torch.ones(3))
                optimizer.add_param_group({"params": [late], "lr": 0.5})
                parameters.append(late)
            if step == 9:
                optimizer.state.clear()
        assert same(numbers(direct), numbers(public)), step


def test_a_momentum_that_is_switched_on_later() -> None:
    mine, direct, theirs, public = twins(MAKERS["sgd"])
    for step in range(6):
        give_gradients(mine, step)
        give_gradients(theirs, step)
        for optimizer in (direct, public):
            optimizer.param_groups[0]["momentum"] = 0.9 if step > 2 else 0.0
        assert direct_or_step(direct) == (step != 3)
        public.step()
        assert same(numbers(direct), numbers(public))


def test_the_change_is_counted_as_any_in_place_change() -> None:
    w = torch.ones(3, requires_grad=True)
    optimizer = SGD([w], lr=0.1, fused=True)
    loss = w.square().sum()
    loss.backward(retain_graph=True)
    assert direct_or_step(optimizer)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    assert w.grad_fn is None
    assert w.is_leaf


# The guards


class Bare(AdamW):
    """A subclass that changes nothing that can be seen."""


class Halved(AdamW):
    """A subclass of the caller's."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad.mul_(0.5)
        return super().step(closure)


def ready(make: Make, dtype: torch.dtype = torch.float32) -> tuple[list[torch.nn.Parameter], Optimizer]:
    """An optimizer that has its state, with the next gradient in place."""
    parameters = make_parameters(dtype)
    optimizer = make(parameters)
    give_gradients(parameters, 0)
    optimizer.step()
    give_gradients(parameters, 1)
    return parameters, optimizer


@pytest.mark.parametrize("name", MAKERS)
def test_plain_fused_optimizers_are_updated_directly(name: str) -> None:
    _, optimizer = ready(MAKERS[name])
    assert kernels.can_update_directly(optimizer)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: Halved(p, fused=True),
        lambda p: Bare(p, fused=True),
        lambda p: torch.optim.RMSprop(p),
        lambda p: AdamW(p),
        lambda p: AdamW(p, foreach=True),
        lambda p: SGD(p, lr=0.1, fused=False),
    ],
    ids=["subclass", "bare subclass", "another class", "default", "foreach", "not fused"],
)
def test_other_optimizers_take_their_own_step(make: Make) -> None:
    _, optimizer = ready(make)
    assert not kernels.can_update_directly(optimizer)


def test_a_differentiable_optimizer_takes_its_own_step() -> None:
    assert not kernels.can_update_directly(Adam(make_parameters(), differentiable=True))
    _, optimizer = ready(MAKERS["adamw"])
    optimizer.param_groups[0]["differentiable"] = True
    assert not kernels.update_directly(optimizer, None)


@pytest.mark.parametrize("where", ["pre", "post", "global pre", "global post"])
def test_hooks_are_called(where: str) -> None:
    calls: list[Any] = []

    def hook(optimizer: Optimizer, args: Any, keywords: Any) -> None:
        calls.append(optimizer)

    _, optimizer = ready(MAKERS["adamw"])
    register = {
        "pre": optimizer.register_step_pre_hook,
        "post": optimizer.register_step_post_hook,
        "global pre": register_optimizer_step_pre_hook,
        "global post": register_optimizer_step_post_hook,
    }[where]
    handle = register(hook)
    try:
        assert kernels.has_hooks(optimizer)
        assert not direct_or_step(optimizer)
        assert calls == [optimizer]
    finally:
        handle.remove()
    assert not kernels.has_hooks(optimizer)
    assert direct_or_step(optimizer)
    assert len(calls) == 1


def test_a_scheduler_of_torch_sees_each_step() -> None:
    _, optimizer = ready(MAKERS["adamw"])
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    assert not kernels.can_update_directly(optimizer)
    assert not direct_or_step(optimizer)
    scheduler.step()  # it would warn, had it not seen the step
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.005)


@pytest.fixture
def patched_sgd() -> Iterator[list[str]]:
    """SGD.step replaced on the class, as some libraries do."""
    calls: list[str] = []
    before = SGD.step

    def step(self: SGD, closure: Any = None) -> Any:
        calls.append("step")
        return before(self, closure)

    SGD.step = step  # type: ignore[method-assign]
    yield calls
    SGD.step = before  # type: ignore[method-assign]


def test_a_step_that_was_replaced_on_the_class_is_called(patched_sgd: list[str]) -> None:
    parameters = make_parameters()
    optimizer = SGD(parameters, lr=0.1, fused=True)
    give_gradients(parameters, 0)
    assert not direct_or_step(optimizer)
    assert patched_sgd == ["step"]


def test_a_step_that_was_replaced_on_the_instance_is_called() -> None:
    _, optimizer = ready(MAKERS["sgd"])
    calls: list[str] = []
    optimizer.step = lambda: calls.append("step")  # type: ignore[method-assign,assignment]
    assert not direct_or_step(optimizer)
    assert calls == ["step"]


@pytest.mark.parametrize("name", ["amsgrad", "tensor lr", "whole lr", "sparse", "mixed dtypes", "one group not fused"])
def test_groups_that_are_not_ready_take_the_step(name: str) -> None:
    def make(parameters: list[Any]) -> Optimizer:
        if name == "amsgrad":
            return AdamW(parameters, amsgrad=True, fused=True)
        if name == "tensor lr":
            return AdamW(parameters, lr=torch.tensor(0.01), fused=True)
        if name == "whole lr":
            return SGD(parameters, lr=1, fused=True)
        if name == "one group not fused":
            return AdamW([{"params": parameters[:2], "fused": False}, {"params": parameters[2:]}], fused=True)
        return AdamW(parameters, fused=True)

    found = []
    for direct in (True, False):
        parameters = make_parameters()
        if name == "mixed dtypes":
            parameters[1] = torch.nn.Parameter(parameters[1].detach().double())
        optimizer = make(parameters)
        for step in range(4):
            give_gradients(parameters, step)
            if name == "sparse":
                parameters[0].grad = parameters[0].grad.to_sparse()
                with pytest.raises(RuntimeError, match="sparse"):
                    direct_or_step(optimizer) if direct else optimizer.step()
                continue
            if direct:
                assert not direct_or_step(optimizer)
            else:
                optimizer.step()
        found.append(numbers(optimizer))
    assert same(*found)


def test_an_optimizer_without_gradients_stays_as_it_is() -> None:
    parameters, optimizer = ready(MAKERS["adamw"])
    give_gradients(parameters, 0, without=(0, 1, 2, 3))
    before = copy.deepcopy(numbers(optimizer))
    assert kernels.update_directly(optimizer, torch.tensor(2.0))
    assert same(numbers(optimizer), before)


def test_a_copied_and_a_pickled_optimizer_are_updated_directly() -> None:
    parameters, optimizer = ready(MAKERS["adamw"])
    copied = copy.deepcopy(optimizer)
    for original, other in zip(parameters, copied.param_groups[0]["params"], strict=True):
        other.grad = original.grad.clone()
    assert "step" not in vars(copied)
    assert direct_or_step(copied)
    optimizer.step()
    assert same(numbers(copied), numbers(optimizer))


def test_making_saving_and_loading_an_optimizer_imports_no_compiler() -> None:
    code = (
        "import sys, torch\n"
        "from trainer import kernels\n"
        "from trainer.optim import Manual, adamw, sgd\n"
        "for build in (adamw, sgd, Manual):\n"
        "    made = build([torch.zeros(2, requires_grad=True)])\n"
        "with kernels.without_compiler():\n"
        "    made.load_state_dict(made.state_dict())\n"
        "from trainer import Step\n"
        "def moved(build, by_torch):\n"
        "    weight = torch.ones(3, requires_grad=True)\n"
        "    optimizer = build([weight])\n"
        "    model = type('Plain', (), {'weight': weight})()\n"
        "    step = Step(model, lambda model, batch: (model.weight * batch[0]).square().mean(), optimizer)\n"
        "    for row in torch.arange(12.0).reshape(4, 3):\n"
        "        if by_torch:\n"
        "            optimizer.zero_grad(); (weight * row).square().mean().backward(); optimizer.step()\n"
        "        else:\n"
        "            step([row[None]])\n"
        "    return weight.detach()\n"
        "builds = [adamw, lambda p: sgd(p, lr=0.1, momentum=0.9), lambda p: sgd(p, lr=0.1)]\n"
        "ours = [moved(build, False) for build in builds]\n"
        "assert 'torch._dynamo' not in sys.modules\n"
        "assert all(torch.equal(one, moved(build, True)) for one, build in zip(ours, builds))\n"
        "made.add_param_group({'params': [torch.zeros(2, requires_grad=True)]})\n"
        "assert 'torch._dynamo' in sys.modules, 'outside of it torch does as ever'\n"
        "made.zero_grad()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_mean_squared_error_is_torchs_own() -> None:
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(5, 3, generator=generator, requires_grad=True)
    targets = torch.randn(5, 3, generator=generator)
    for loss in (functional.mse_loss, torch.nn.MSELoss()):
        direct, public = kernels.without_python(loss)(outputs, targets), loss(outputs, targets)
        assert torch.equal(direct, public)
        ours, theirs = (torch.autograd.grad(value, outputs)[0] for value in (direct, public))
        assert torch.equal(ours, theirs)


def test_a_loss_that_does_more_is_called_itself() -> None:
    class Own(torch.nn.MSELoss):
        pass

    for loss in (Own(), torch.nn.MSELoss(reduction="sum"), functional.l1_loss):
        assert kernels.without_python(loss) is loss
    watched = torch.nn.MSELoss()
    direct = kernels.without_python(watched)
    seen = []
    watched.register_forward_hook(lambda *arguments: seen.append(arguments))
    direct(torch.ones(2), torch.zeros(2))
    assert len(seen) == 1
    with pytest.warns(UserWarning, match="different to the input size"):
        kernels.without_python(functional.mse_loss)(torch.ones(2, 1), torch.zeros(2))
