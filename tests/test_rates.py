"""The learning rates: what was taken moves them, and nothing else."""

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, lr_scheduler

from trainer.errors import CheckpointError, ConfigError
from trainer.gradient.clocks import Clocks
from trainer.optim import constant, cosine, linear
from trainer.optim.rates import Rates
from trainer.step import Step

TORCH: dict[str, Callable[[Any], Any]] = {
    "step": lambda o: lr_scheduler.StepLR(o, 2, gamma=0.5),
    "multi step": lambda o: lr_scheduler.MultiStepLR(o, [2, 5], gamma=0.1),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda count: 1 / (1 + count)),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 10),
    "restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.5, total_steps=20),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.5, step_size_up=3, cycle_momentum=False),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.ExponentialLR(o, 0.9)], milestones=[3]
    ),
    "chained": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
}


def leaf() -> nn.Parameter:
    return nn.Parameter(torch.ones(2))


def clocks(**counts: int) -> Clocks:
    return Clocks(**counts)


def square(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


GOOD, BAD = torch.ones(3, 2), torch.full((3, 2), float("nan"))


def rates_of(optimizer: Any) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups]


# Schedules of the trainer's own


def test_a_schedule_follows_the_steps_that_were_taken() -> None:
    model = nn.Linear(2, 1)
    step = Step(model, square, SGD(model.parameters(), lr=0.8), schedule=linear(total=8))
    seen = []
    for x in (GOOD, BAD, BAD, GOOD, GOOD, BAD, GOOD):
        report = step([x])
        seen.append((report.skipped, report.lr))
    taken = [lr for skipped, lr in seen if not skipped]
    assert taken == pytest.approx([0.8, 0.7, 0.6, 0.5])
    assert [skipped for skipped, _ in seen] == [False, True, True, False, False, True, False]


def test_a_schedule_may_follow_rows() -> None:
    model = nn.Linear(2, 1)
    step = Step(model, square, SGD(model.parameters(), lr=1.0), schedule=linear(total=20, clock="rows"))
    windows = [[GOOD], [GOOD, GOOD[:1]], [BAD], [GOOD[:1]], [GOOD]]
    assert [step(window).lr for window in windows if window[0] is not BAD or step(window).skipped is None] == (
        pytest.approx([1.0, 1 - 3 / 20, 1 - 7 / 20, 1 - 8 / 20])
    )
    assert step.clocks.rows == 11


def test_set_reads_the_clock_it_is_told() -> None:
    optimizer = SGD([leaf()], lr=2.0)
    for clock in ("steps", "rows", "tokens"):
        rates = Rates(linear(total=10, clock=clock), [optimizer])
        assert rates.clock == clock
        assert rates.set(clocks(**{clock: 5})) == 1.0
        assert rates.now() == 1.0


def test_a_plain_function_is_a_schedule_of_steps() -> None:
    optimizer = SGD([leaf()], lr=2.0)
    rates = Rates(lambda count: 0.5**count, [optimizer])
    assert [rates.set(clocks(steps=count, rows=9)) for count in (0, 1, 3)] == [2.0, 1.0, 0.25]
    assert type(optimizer.param_groups[0]["lr"]) is float


def test_groups_and_optimizers_keep_their_ratio() -> None:
    first = SGD([{"params": [leaf()]}, {"params": [leaf()], "lr": 0.02}], lr=0.1)
    second = AdamW([leaf()], lr=0.5)
    rates = Rates(cosine(total=10, warmup=2), [first, second])
    for count in range(12):
        rates.set(clocks(steps=count))
        factor = cosine(total=10, warmup=2)(count)
        assert rates_of(first) + rates_of(second) == pytest.approx([0.1 * factor, 0.02 * factor, 0.5 * factor])


def test_without_a_schedule_rates_are_the_callers() -> None:
    optimizer = SGD([leaf()], lr=0.1)
    rates = Rates(None, [optimizer])
    assert rates.set(clocks()) == 0.1
    optimizer.param_groups[0]["lr"] = 0.7
    assert rates.set(clocks(steps=3)) == 0.7
    assert "initial_lr" not in optimizer.param_groups[0]
    rates.taken()
    assert rates.state_dict() == {}
    rates.load_state_dict({})


def test_a_group_that_is_added_later_has_its_own_rate() -> None:
    optimizer = SGD([leaf()], lr=1.0)
    rates = Rates(linear(total=10), [optimizer])
    rates.set(clocks(steps=5))
    optimizer.add_param_group({"params": [leaf()], "lr": 0.2})
    rates.set(clocks(steps=6))
    assert rates_of(optimizer) == pytest.approx([0.4, 0.08])
    optimizer.add_param_group({"params": [leaf()], "lr": 0.3})
    rates.set_on(clocks(steps=5), torch.device("cpu"))
    assert rates_of(optimizer) == pytest.approx([0.5, 0.1, 0.15])


def test_on_a_device_the_rates_are_tensors_with_the_same_numbers() -> None:
    optimizer = AdamW([{"params": [leaf()]}, {"params": [leaf()], "lr": 0.02}], lr=0.1, fused=True)
    for schedule in (cosine(total=20, warmup=3), constant(warmup=3), lambda count: 0.25):
        rates = Rates(schedule, [optimizer])
        for count in range(0, 22, 3):
            rate = rates.set_on(clocks(steps=count), torch.device("cpu"))
            assert isinstance(rate, Tensor)
            assert rate.dtype == torch.float32
            assert rate.shape == ()
            on_device = rates_of(optimizer)
            rates.set(clocks(steps=count))
            assert on_device == pytest.approx(rates_of(optimizer), rel=1e-7)
    plain = Rates(None, [SGD([leaf()], lr=0.1)])
    assert plain.set_on(clocks(), torch.device("cpu")) == 0.1


def test_a_resumed_optimizer_keeps_the_rate_it_began_with() -> None:
    """Its state holds the scheduled rate as `lr` and the one it began with as `initial_lr`."""
    old = SGD([leaf()], lr=1.0)
    Rates(linear(total=10), [old]).set(clocks(steps=9))
    assert rates_of(old) == pytest.approx([0.1])
    for loaded_first in (True, False):
        new = SGD([leaf()], lr=777.0)
        if loaded_first:
            new.load_state_dict(copy.deepcopy(old.state_dict()))
        rates = Rates(linear(total=10), [new])
        if not loaded_first:
            new.load_state_dict(copy.deepcopy(old.state_dict()))
        assert rates.set(clocks(steps=5)) == 0.5


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_rate_that_is_no_number_is_refused_before_the_step(bad: float) -> None:
    model = nn.Linear(2, 1)
    before = [parameter.clone() for parameter in model.parameters()]
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    step = Step(model, square, optimizer, schedule=lambda count: bad)
    with pytest.raises(ConfigError, match=r"the schedule .* gives the learning rate (nan|inf|-inf)\."):
        step([GOOD])
    assert rates_of(optimizer) == [0.1]
    for rate in (bad, torch.tensor(bad)):
        optimizer.param_groups[0]["lr"] = rate
        with pytest.raises(ConfigError, match="the optimizer's learning rate is .*: the step is not taken"):
            Step(model, square, optimizer)([GOOD])
        with pytest.raises(ConfigError, match="the step is not taken"):
            Rates(None, [optimizer]).set_on(clocks(), torch.device("cpu"))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    assert not optimizer.state


# Schedulers of torch


@pytest.mark.parametrize("name", TORCH)
def test_a_scheduler_of_torch_ticks_once_a_taken_step(name: str) -> None:
    """Against the loop that one would write by hand; torch warns where the order is wrong, and warnings are errors."""
    model, other = nn.Linear(2, 1), nn.Linear(2, 1)
    other.load_state_dict(model.state_dict())
    optimizer, reference = SGD(model.parameters(), lr=0.1, fused=True), SGD(other.parameters(), lr=0.1, fused=True)
    step = Step(model, square, optimizer, schedule=TORCH[name](optimizer))
    scheduler = TORCH[name](reference)
    for x in (GOOD, BAD, GOOD, GOOD, BAD, GOOD, GOOD, GOOD):
        report = step([x])
        assert report.skipped == (x is BAD)
        if x is not BAD:
            assert report.lr == reference.param_groups[0]["lr"]
            reference.zero_grad()
            square(other, x).backward()
            reference.step()
            scheduler.step()
        assert rates_of(optimizer) == rates_of(reference)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("name", TORCH)
def test_a_scheduler_of_torch_goes_on_from_its_state(name: str) -> None:
    def made() -> tuple[Any, Step]:
        torch.manual_seed(0)
        model = nn.Linear(2, 1)
        optimizer = SGD(model.parameters(), lr=0.1)
        return optimizer, Step(model, square, optimizer, schedule=TORCH[name](optimizer))

    optimizer, step = made()
    for _ in range(4):
        step([GOOD])
    state, groups = copy.deepcopy(step.rates.state_dict()), copy.deepcopy(optimizer.state_dict())
    json.dumps(state)  # numbers and words only: it goes into a checkpoint
    wanted = [step([GOOD]).lr for _ in range(5)]
    resumed, again = made()
    resumed.load_state_dict(groups)
    again.rates.load_state_dict(state)
    assert [again([GOOD]).lr for _ in range(5)] == wanted


def test_a_scheduler_of_torch_must_be_told() -> None:
    optimizer = SGD([leaf()], lr=0.1)
    assert Rates(None, [optimizer]).defers
    assert Rates(constant(), [optimizer]).defers
    assert not Rates(lr_scheduler.StepLR(optimizer, 1), [optimizer]).defers


# What is refused


def test_what_is_refused() -> None:
    optimizer, other = SGD([leaf()], lr=0.1), SGD([leaf()], lr=0.1)
    with pytest.raises(ConfigError, match="ReduceLROnPlateau follows a metric, not a clock: use a schedule of trainer"):
        Rates(lr_scheduler.ReduceLROnPlateau(optimizer), [optimizer])
    with pytest.raises(ConfigError, match=r"the schedule 0\.5 cannot be called with a count: give a function"):
        Rates(0.5, [optimizer])
    with pytest.raises(ConfigError, match="the StepLR was made for another optimizer"):
        Rates(lr_scheduler.StepLR(other, 1), [optimizer])
    Rates(lr_scheduler.StepLR(other, 1), [optimizer, other])


def test_an_optimizer_without_a_rate() -> None:
    class NoRate:
        param_groups = [{"params": [leaf()]}]

        def step(self) -> None: ...

    rates = Rates(None, [NoRate()])  # type: ignore[list-item]
    assert rates.set(clocks()) == 0.0
    with pytest.raises(ConfigError, match="groups hold no lr for a schedule to follow: set schedule=null"):
        Rates(constant(), [NoRate()])  # type: ignore[list-item]


def test_a_state_of_another_kind_of_schedule_is_a_sentence() -> None:
    optimizer = SGD([leaf()], lr=0.1)
    made = {
        "LambdaLR": Rates(lr_scheduler.LambdaLR(optimizer, lambda count: 1.0), [optimizer]),
        "StepLR": Rates(lr_scheduler.StepLR(optimizer, 1), [optimizer]),
        "no scheduler of torch": Rates(constant(), [optimizer]),
    }
    for saved, saver in made.items():
        for now, loader in made.items():
            if saved == now:
                loader.load_state_dict(saver.state_dict())
                continue
            with pytest.raises(
                CheckpointError, match=f"was saved with {saved}, and this run's schedule is {now}: give"
            ):
                loader.load_state_dict(saver.state_dict())


def test_a_scheduler_of_torch_that_keeps_its_old_rate_is_told() -> None:
    def made(lr: float) -> tuple[torch.optim.Optimizer, Rates]:
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
        return optimizer, Rates(torch.optim.lr_scheduler.StepLR(optimizer, 3), [optimizer])

    _, before = made(0.1)
    _, same = made(0.1)
    same.load_state_dict(before.state_dict())
    same.check_accepted()
    _, changed = made(0.5)
    changed.load_state_dict(before.state_dict())
    with pytest.raises(ConfigError, match=r"changed to 0.5, but StepLR goes on with the 0.1 that it was saved with"):
        changed.check_accepted()
