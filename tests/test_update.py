"""How a finished gradient reaches the parameters: the folded factor, the flag, and what is refused."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer

from trainer.errors import ConfigError
from trainer.optim import Manual
from trainer.optim.update import Update, as_optimizers, could_be_fused, is_fused
from trainer.step import Step

Make = Callable[[list[Any]], Any]


class ThirdParty:
    """An optimizer of somebody else's: no base class of torch, a step from gradients, groups."""

    def __init__(self, parameters: list[Any], lr: float = 0.05) -> None:
        self.param_groups = [{"params": list(parameters), "lr": lr}]
        self.steps = 0

    def step(self) -> None:
        self.steps += 1
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter -= group["lr"] * parameter.grad.sign() * parameter.grad.abs().sqrt()


FUSED: dict[str, Make] = {
    "sgd": lambda p: SGD(p, lr=0.02, fused=True),
    "sgd momentum": lambda p: SGD(p, lr=0.02, momentum=0.9, weight_decay=0.01, fused=True),
    "sgd nesterov": lambda p: SGD(p, lr=0.02, momentum=0.9, nesterov=True, fused=True),
    "adam": lambda p: Adam(p, lr=0.01, fused=True),
    "adamw": lambda p: AdamW(p, lr=0.01, fused=True),
    "amsgrad": lambda p: AdamW(p, lr=0.01, amsgrad=True, fused=True),
    "adagrad": lambda p: Adagrad(p, lr=0.05, fused=True),
}

OTHERS: dict[str, Make] = {
    "adamw": lambda p: AdamW(p, lr=0.01),
    "sgd foreach": lambda p: SGD(p, lr=0.02, momentum=0.9, foreach=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.01),
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.01),
    "adadelta": lambda p: torch.optim.Adadelta(p, lr=0.5),
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.01),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
    "muon": lambda p: torch.optim.Muon([q for q in p if q.ndim == 2], lr=0.01),
    "manual": lambda p: Manual(p, lr=0.02),
    "third party": ThirdParty,
}


def make_parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(5)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in [(6, 4), (4, 3), (5,)]]


def gradients(step: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in [(6, 4), (4, 3), (5,)]]


def give(parameters: list[nn.Parameter], values: list[Tensor], factor: float = 1.0) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.grad = value / factor


def snapshot(optimizer: Any) -> list[Any]:
    """Parameters and state, copied."""
    found: list[Any] = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            found.append(parameter.detach().clone())
            state = getattr(optimizer, "state", {})
            found.append(copy.deepcopy(dict(state[parameter])) if parameter in state else None)
    return found


def same(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(same(a, b) for a, b in zip(left, right, strict=True))
    return bool(left == right)


def close(left: list[nn.Parameter], right: list[nn.Parameter], tolerance: float) -> None:
    for a, b in zip(left, right, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def is_clean(optimizer: Any) -> bool:
    return not hasattr(optimizer, "grad_scale") and not hasattr(optimizer, "found_inf")


# One factor


@pytest.mark.parametrize("name", FUSED)
def test_a_folded_factor_is_one_pass_before_the_step(name: str) -> None:
    """200 steps, every ninth of them skipped: the reference never sees those."""
    mine, theirs = make_parameters(), make_parameters()
    update, reference = Update(FUSED[name](mine)), FUSED[name](theirs)
    for step in range(200):
        factor = 0.07 + 0.9 * (step % 10) / 10
        if step % 9 == 4:
            continue
        give(mine, gradients(step), factor)
        update.apply(factor)
        assert is_clean(update.optimizer)
        give(theirs, gradients(step))
        reference.step()
    close(mine, theirs, 2e-5)


@pytest.mark.parametrize("name", FUSED)
def test_a_flag_that_is_not_set_takes_the_same_step(name: str) -> None:
    mine, theirs = make_parameters(), make_parameters()
    update, reference = Update(FUSED[name](mine)), FUSED[name](theirs)
    deferred = 0
    for step in range(200):
        factor = 0.07 + 0.9 * (step % 10) / 10
        bad = step % 9 == 4
        give(mine, gradients(step), factor)
        if bad:
            mine[1].grad[0, 0] = float("nan")
        if update.defers():
            deferred += 1
            update.apply_if_finite(torch.tensor(factor), torch.tensor(float(bad)))
        elif not bad:
            update.apply(factor)
        assert is_clean(update.optimizer)
        if not bad:
            give(theirs, gradients(step))
            reference.step()
    assert deferred >= 199
    close(mine, theirs, 2e-5)


@pytest.mark.parametrize("name", OTHERS)
def test_other_optimizers_get_one_pass(name: str) -> None:
    mine, theirs = make_parameters(), make_parameters()
    update, reference = Update(OTHERS[name](mine)), OTHERS[name](theirs)
    assert not update.defers()
    for step in range(30):
        factor = 0.5 if step % 2 else 1.0  # a power of two: the pass loses nothing, so bit for bit
        give(mine, gradients(step), factor)
        update.apply(factor)
        assert is_clean(update.optimizer)
        give(theirs, gradients(step))
        reference.step()
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True)) or name == "manual"
    close(mine, theirs, 1e-6)


@pytest.mark.parametrize("name", FUSED)
def test_a_factor_of_one_changes_no_bit(name: str) -> None:
    mine, theirs = make_parameters(), make_parameters()
    update, reference = Update(FUSED[name](mine)), FUSED[name](theirs)
    for step in range(20):
        give(mine, gradients(step))
        update.apply(1.0)
        give(theirs, gradients(step))
        reference.step()
        assert same(snapshot(update.optimizer), snapshot(reference))


@pytest.mark.parametrize("factor", [2.5, 1e-30, 1e-42, 0.0])
@pytest.mark.parametrize("name", ["sgd momentum", "adamw"])
def test_factors_that_a_float32_scale_cannot_hold(name: str, factor: float) -> None:
    mine, theirs = make_parameters(), make_parameters()
    update, reference = Update(FUSED[name](mine)), FUSED[name](theirs)
    for step in range(5):
        give(mine, gradients(step))
        update.apply(factor)
        give(theirs, [value * factor for value in gradients(step)])
        reference.step()
    close(mine, theirs, 1e-5)


@pytest.mark.parametrize("name", FUSED)
def test_float64_parameters_keep_their_precision(name: str) -> None:
    mine, theirs = make_parameters(torch.float64), make_parameters(torch.float64)
    update, reference = Update(FUSED[name](mine)), FUSED[name](theirs)
    for step in range(30):
        assert not update.defers()
        give(mine, gradients(step, torch.float64), 0.3)
        update.apply(0.3)
        give(theirs, gradients(step, torch.float64))
        reference.step()
    close(mine, theirs, 1e-14)


def test_bfloat16_parameters_are_scaled_within_the_kernel() -> None:
    mine, theirs = make_parameters(torch.bfloat16), make_parameters(torch.bfloat16)
    update, reference = Update(AdamW(mine, lr=0.1, fused=True)), AdamW(theirs, lr=0.1, fused=True)
    for step in range(10):
        give(mine, gradients(step, torch.bfloat16), 0.5)
        update.apply(0.5)
        give(theirs, gradients(step, torch.bfloat16))
        reference.step()
    assert same(snapshot(update.optimizer), snapshot(reference))


@pytest.mark.parametrize("name", ["sgd", "manual"])
def test_sparse_gradients_are_scaled_too(name: str) -> None:
    made: dict[str, Make] = {"sgd": lambda p: SGD(p, lr=0.02), "manual": OTHERS["manual"]}
    sparse, dense = nn.Parameter(torch.ones(6, 4)), nn.Parameter(torch.ones(6, 4))
    index = torch.tensor([[0, 3, 5]])
    values = torch.arange(1.0, 13.0).view(3, 4)
    sparse.grad = torch.sparse_coo_tensor(index, values, (6, 4), check_invariants=True).coalesce()
    dense.grad = sparse.grad.to_dense()
    for parameter in (sparse, dense):
        Update(made[name]([parameter])).apply(0.25)
    assert torch.equal(sparse, dense)
    assert not torch.equal(sparse, torch.ones(6, 4))


@pytest.mark.parametrize(
    "make",
    [
        lambda p, fused: SGD(p, lr=0.1, fused=fused),
        lambda p, fused: SGD(p, lr=0.1, momentum=0.9, fused=fused),
        lambda p, fused: Adagrad(p, lr=0.1, fused=fused),
    ],
    ids=["sgd", "sgd momentum", "adagrad"],
)
def test_sparse_gradients_reach_a_fused_optimizer(make: Callable[..., Optimizer]) -> None:
    """Torch's fused kernels refuse what its unfused ones take; what must come out is the latter's."""
    found = []
    for fused in (True, False):
        torch.manual_seed(0)
        embedding = nn.Embedding(6, 3, sparse=True)
        dense = nn.Linear(3, 1)
        optimizer = make([*embedding.parameters(), *dense.parameters()], fused)
        update = Update(optimizer)
        with torch.sparse.check_sparse_tensor_invariants():
            for step in range(4):
                optimizer.zero_grad()
                dense(embedding(torch.tensor([step, 2, 5]))).sum().backward()
                assert not update.defers()
                update.apply(1.0) if fused else optimizer.step()
        assert is_fused(optimizer) == fused
        found.append([*embedding.parameters(), *dense.parameters()])
    close(*found, tolerance=1e-6)


# One flag


def numbered_step(optimizer: Optimizer) -> list[float]:
    return [float(state["step"]) for state in optimizer.state.values() if "step" in state]


@pytest.mark.parametrize("name", FUSED)
def test_a_flag_that_is_set_changes_nothing(name: str) -> None:
    parameters = make_parameters()
    update = Update(FUSED[name](parameters))
    give(parameters, gradients(0))
    update.apply(1.0)
    before, counted = snapshot(update.optimizer), numbered_step(update.optimizer)
    for bad in (float("nan"), float("inf"), 1.0):
        give(parameters, gradients(1))
        parameters[0].grad[2, 2] = bad
        assert update.defers()
        update.apply_if_finite(torch.tensor(0.5), torch.tensor(1.0))
        assert same(snapshot(update.optimizer), before)
        assert numbered_step(update.optimizer) == counted
        assert is_clean(update.optimizer)


@pytest.mark.parametrize("name", FUSED)
def test_the_step_that_makes_the_state_reads_the_flag(name: str) -> None:
    parameters = make_parameters()
    update = Update(FUSED[name](parameters))
    give(parameters, gradients(0))
    assert update.defers() == (name in ("sgd", "adagrad"))  # the one has no state, the other makes it at once
    update.apply(1.0)
    assert update.defers()
    # A parameter that joins later has none yet.
    late = nn.Parameter(torch.ones(3))
    update.optimizer.add_param_group({"params": [late]})
    assert update.defers()
    late.grad = torch.ones(3)
    assert update.defers() == (name == "sgd")
    update.apply(0.5)
    assert update.defers()


def test_attributes_are_removed_when_the_step_raises() -> None:
    parameters = make_parameters()
    update = Update(AdamW(parameters, fused=True))
    give(parameters, gradients(0))
    update.apply(1.0)

    def refuse(*_: Any) -> None:
        raise KeyError("mine")

    update.optimizer.register_step_pre_hook(refuse)
    with pytest.raises(KeyError, match="mine"):
        update.apply_if_finite(torch.tensor(0.5), torch.tensor(0.0))
    assert is_clean(update.optimizer)


@pytest.mark.parametrize("dampening", [0.0, 0.4])
@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_a_parameter_joins_fused_sgd_with_momentum(dampening: float, factor: float) -> None:
    """Torch raises there; what must come out is what its unfused form gives."""
    mine, theirs = make_parameters(), make_parameters()
    update = Update(SGD(mine, lr=0.1, momentum=0.9, dampening=dampening, weight_decay=0.01, fused=True))
    reference = SGD(theirs, lr=0.1, momentum=0.9, dampening=dampening, weight_decay=0.01, foreach=False)
    for step in range(8):
        give(mine, gradients(step), factor)
        give(theirs, gradients(step))
        if step < 3:
            mine[1].grad = theirs[1].grad = None
        update.apply(factor)
        reference.step()
        assert is_fused(update.optimizer)
    close(mine, theirs, 1e-6)
    mine_state = [update.optimizer.state[p]["momentum_buffer"] for p in mine]
    torch.testing.assert_close(mine_state, [reference.state[p]["momentum_buffer"] for p in theirs])


def test_the_groups_say_fused_again_when_the_step_raises() -> None:
    mine = make_parameters()
    update = Update(SGD(mine, lr=0.1, momentum=0.9, fused=True))
    give(mine, gradients(0))
    mine[1].grad = None
    update.apply(1.0)
    give(mine, gradients(1))
    update.optimizer.register_step_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        update.apply(1.0)
    assert is_fused(update.optimizer)


@pytest.mark.parametrize("name", FUSED)
def test_a_fused_step_counts_as_an_in_place_change(name: str) -> None:
    w = nn.Parameter(torch.ones(3))
    update = Update(FUSED[name]([w]))
    loss = w.square().sum()
    for _ in range(2):
        loss = w.square().sum()
        loss.backward(retain_graph=True)
        update.apply(1.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    w.grad = torch.ones(3)
    loss = w.square().sum()
    update.apply_if_finite(torch.tensor(0.5), torch.tensor(0.0))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("name", ["manual", "adamw", "sgd foreach"])
@pytest.mark.parametrize("where", ["pre", "post"])
def test_hooks_of_every_optimizer_are_called(name: str, where: str) -> None:
    parameters = make_parameters()
    update = Update(OTHERS[name](parameters))
    calls: list[float] = []
    register = update.optimizer.register_step_pre_hook if where == "pre" else update.optimizer.register_step_post_hook
    register(lambda *_: calls.append(parameters[2].grad[0].item()))
    give(parameters, gradients(0))
    wanted = 0.5 * parameters[2].grad[0].item()
    update.apply(0.5)
    assert calls == [wanted]  # and it sees the true gradient


def test_gradients_are_those_that_there_are() -> None:
    parameters = make_parameters()
    update = Update(SGD([{"params": parameters[:1]}, {"params": parameters[1:], "lr": 0.3}], lr=0.1))
    give(parameters, gradients(0))
    parameters[1].grad = None
    assert [id(g) for g in update.gradients()] == [id(parameters[0].grad), id(parameters[2].grad)]


# Through Step: skips, and parameters that join


def batch(rows: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(8)
    return torch.randn(rows, 3, generator=generator), torch.randn(rows, 2, generator=generator)


def mean_square(model: nn.Module, micro_batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(micro_batch[0]) - micro_batch[1]).square().mean()


@pytest.mark.parametrize("name", FUSED)
def test_a_skipped_first_step_makes_no_state(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = FUSED[name](list(model.parameters()))
    step = Step(model, mean_square, optimizer)
    before = snapshot(optimizer)
    x, y = batch()
    assert step([(x * float("nan"), y)]).skipped
    assert same(snapshot(optimizer), before)
    report = step([(x, y)])
    assert not report.skipped
    other = nn.Linear(3, 2)
    torch.manual_seed(0)
    other.reset_parameters()
    reference = FUSED[name](list(other.parameters()))
    mean_square(other, (x, y)).backward()
    reference.step()
    assert same(snapshot(optimizer), snapshot(reference))


@pytest.mark.parametrize("name", FUSED)
def test_a_thawed_layer_joins(name: str) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    model[0].requires_grad_(False)
    step = Step(model, mean_square, FUSED[name](list(model.parameters())))
    x, y = batch()
    for _ in range(3):
        step([(x, y)])
    frozen = model[0].weight.clone()
    model[0].requires_grad_(True)
    for _ in range(2):
        assert not step([(x, y)]).skipped
    assert not torch.equal(model[0].weight, frozen)


# What is taken


class Sam(Optimizer):
    """Sharpness-aware minimisation in outline: it cannot step without a closure."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})

    def step(self, closure: Any) -> None:  # type: ignore[override]
        closure()


class SamAsPublished(Optimizer):
    """The same, with a closure that looks optional."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})

    def first_step(self) -> None: ...

    def second_step(self) -> None: ...

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        if closure is None:
            raise RuntimeError("needs a closure")


class WantsLoss(ThirdParty):
    def step(self, loss: Tensor) -> None:  # type: ignore[override]
        super().step()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: torch.optim.LBFGS(p), r"LBFGS evaluates the window again .*\(it asks for a closure\).*use one that"),
        (Sam, r"Sam evaluates .*closure"),
        (SamAsPublished, r"SamAsPublished evaluates .*closure"),
        (WantsLoss, r"WantsLoss .*asks for a loss"),
        (lambda p: AdamW, r"is the class AdamW: give an instance of it\."),
        (lambda p: Manual, r"is the class Manual: give an instance"),
        (lambda p: [], r"the sequence of optimizers is empty: give at least one\."),
        (lambda p: (), r"empty: give at least one"),
        (lambda p: None, r"NoneType is no optimizer: it needs param_groups and step\(\)"),
        (lambda p: 0.1, r"float is no optimizer"),
        (lambda p: nn.Linear(1, 1), r"Linear is no optimizer"),
        (lambda p: torch.optim.lr_scheduler.StepLR(SGD(p, lr=0.1), 1), r"StepLR is no optimizer"),
        (lambda p: [SGD(p, lr=0.1), "adamw"], r"str is no optimizer"),
        (lambda p: {"a": SGD(p, lr=0.1)}, r"dict is no optimizer"),
    ],
)
def test_what_is_refused(make: Make, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        as_optimizers(make(make_parameters()))
    model = nn.Linear(3, 2)
    with pytest.raises(ConfigError, match=words):
        Step(model, mean_square, make(list(model.parameters())))


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_taken(name: str) -> None:
    optimizer = OTHERS[name](make_parameters())
    assert as_optimizers(optimizer) == [optimizer]
    assert as_optimizers((optimizer,)) == [optimizer]


def test_a_scheduler_does_not_hide_the_step() -> None:
    """It wraps step() on the instance, whose signature is then the wrapper's."""
    optimizer = AdamW(make_parameters())
    torch.optim.lr_scheduler.ConstantLR(optimizer)
    assert as_optimizers(optimizer) == [optimizer]


def test_is_fused_and_could_be() -> None:
    parameters = make_parameters()

    class Mine(AdamW):
        """Its step may do anything."""

    cases: list[tuple[Any, bool, bool]] = [
        (AdamW(parameters, fused=True), True, False),
        (AdamW(parameters), False, True),
        (Adam(parameters, foreach=True), False, True),
        (SGD(parameters, lr=0.1), False, True),
        (Adagrad(parameters, fused=True), True, False),
        (Adagrad(parameters), False, True),
        (Mine(parameters, fused=True), False, False),
        (torch.optim.RMSprop(parameters), False, False),
        (ThirdParty(parameters), False, False),
        (Adam(parameters, differentiable=True), False, False),
        (AdamW([torch.zeros(2, dtype=torch.complex64, requires_grad=True)]), False, False),
        (AdamW([{"params": parameters[:1]}, {"params": parameters[1:], "fused": False}], fused=True), False, True),
    ]
    for optimizer, fused, could in cases:
        assert (is_fused(optimizer), could_be_fused(optimizer)) == (fused, could), optimizer


def test_no_attribute_is_ever_set_on_an_optimizer_that_is_not_fused() -> None:
    """Torch's unfused kernels raise where they find them."""
    parameters = make_parameters()
    mixed = AdamW([{"params": parameters[:1]}, {"params": parameters[1:], "fused": False}], fused=True)
    update = Update(mixed)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(3):
            assert not update.defers()
            give(parameters, gradients(step), 0.5)
            update.apply(0.5)
    assert is_clean(mixed)
