"""fp16's loss scale: GradScaler's trajectory, exactness, back-offs that are no fault of the run, and its state."""

import copy
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from ranks import over_ranks
from reference import cut, differing, state_of
from torch import Tensor, nn

from trainer import ConfigError, DivergedError, Report, Step, Sum, supervised
from trainer.distributed import ManyProcesses
from trainer.gradient.report import FREE_READS
from trainer.gradient.scaler import LARGEST, LossScale
from trainer.gradient.skips import ZERO_WEIGHT
from trainer.gradient.transforms import centralise

CPU = torch.device("cpu")


@pytest.fixture(params=["read", "deferred"])
def reads(request: pytest.FixtureRequest) -> Iterator[str]:
    """Both paths: the verdict read at once, and left on the device."""
    if request.param == "deferred":
        FREE_READS.discard("cpu")
    yield request.param
    FREE_READS.add("cpu")


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2))


def sgd(model: nn.Module, **options: Any) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, fused=True, **options)


def error(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(batch[0]).float() - batch[1]).square().mean()


def rows(count: int = 8, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, generator=generator), torch.randn(count, 2, generator=generator)


def made(scale: float = 1024.0, **toggles: Any) -> tuple[nn.Module, torch.optim.SGD, Step]:
    model = net()
    optimizer = sgd(model)
    objective = toggles.pop("objective", error)
    return model, optimizer, Step(model, objective, optimizer, precision="fp16", loss_scale=scale, **toggles)


# The scale alone


@pytest.mark.parametrize("interval", [1, 3, 7])
def test_it_goes_where_the_scale_of_torch_goes(interval: int, reads: str) -> None:
    mine = LossScale(2.0**20, interval, CPU)
    scale, good = torch.tensor(2.0**20), torch.tensor(0, dtype=torch.int32)
    draw = random.Random(3)
    seen = set()
    for _ in range(300):
        overflowed = float(draw.random() < 0.5 / interval)
        mine.follow(1.0 - overflowed, overflowed)
        torch._amp_update_scale_(scale, good, torch.tensor(overflowed), 2.0, 0.5, interval)
        assert mine.state_dict() == {"scale": scale.item(), "good": float(good)}
        assert isinstance(mine.value, Tensor) == (reads == "deferred")
        seen.add(scale.item())
    assert len(seen) > 5


def test_it_stands_still_at_a_skip_for_something_else_and_ends_at_its_largest(reads: str) -> None:
    scale = LossScale(LARGEST / 2, 2, CPU)
    for taken, overflowed, value, good in ((1, 0, 0.5, 1), (0, 0, 0.5, 1), (1, 0, 1, 0), (1, 0, 1, 1), (1, 0, 1, 0)):
        scale.follow(float(taken), float(overflowed))
        assert scale.state_dict() == {"scale": value * LARGEST, "good": good}
    scale.follow(0.0, 1.0)
    assert scale.state_dict() == {"scale": LARGEST / 2, "good": 0.0}


# Through the step


# Not fused SGD with momentum: skipped on its first step by GradScaler, it goes on from momenta that nobody has set.
OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, fused=True),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("parts", [1, 2])
def test_forty_windows_are_bit_equal_to_autocast_and_grad_scaler(parts: int, kind: str, reads: str) -> None:
    """From a scale that overflows at first and grows every five steps, so that it overflows again and again."""
    model = net()
    optimizer = OPTIMIZERS[kind](model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=5)
    scales = []
    for index in range(40):
        optimizer.zero_grad()
        buffers = copy.deepcopy(dict(model.named_buffers()))
        for batch in cut(rows(seed=index), [8 // parts] * parts):
            with torch.autocast("cpu", torch.float16):
                loss = error(model, batch) / parts
            scaler.scale(loss).backward()
        scales.append(scaler.get_scale())
        scaler.step(optimizer)
        scaler.update()
        if scaler.get_scale() < scales[-1]:  # GradScaler leaves them as the window made them
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])
    mine = net()
    mine_optimizer = OPTIMIZERS[kind](mine.parameters())
    step = Step(mine, error, mine_optimizer, precision="fp16", loss_scale=2.0**20, loss_scale_interval=5)
    reports = [step(cut(rows(seed=index), [8 // parts] * parts)) for index in range(40)]
    assert [report.loss_scale for report in reports] == scales
    assert sum(report.overflowed for report in reports) > 5
    assert [report.skipped for report in reports] == [report.overflowed for report in reports]
    assert differing(state_of(model, optimizer), state_of(mine, mine_optimizer)) == []


def unknown(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Sum:
    return Sum((model(batch[0]).float() - batch[1]).square().sum(), torch.tensor(len(batch[0])))


def two_weights(model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Sum]:
    outputs = model(batch[0]).float()
    return {"error": Sum((outputs - batch[1]).square().sum(), 16), "size": Sum(outputs.abs().sum(), len(batch[0]) + 1)}


TOGGLES: list[dict[str, Any]] = [
    {},
    {"clip_norm": 0.3},
    {"clip_value": 0.05},
    {"clip_adaptive": 0.02},
    {"transforms": [centralise()]},
    {"zero_grad": "never"},
    {"zero_grad": "never", "clip_norm": 0.3},
    {"zero_grad": "zeros", "reduction": "micro_batches"},
    {"reduction": "sum"},
    {"objective": unknown},
    {"objective": two_weights},
    {"objective": two_weights, "clip_norm": 0.3},
]


@pytest.mark.parametrize(
    "toggles",
    TOGGLES,
    ids=", ".join,
)
def test_the_size_of_the_scale_changes_no_bit(toggles: dict[str, Any], reads: str) -> None:
    """A power of two multiplies and divides exactly, so that what comes out, `.grad` included, is one and the same."""
    found = []
    for scale in (128.0, 1024.0):
        model, optimizer, step = made(scale, **toggles)
        reports = []
        for index in range(6):
            window = cut(rows(9, seed=index), [5, 4])
            for micro_batch in window:
                step.accumulate(micro_batch, window if index % 2 else None)
            reports.append(step.finish())
        assert not any(report.skipped for report in reports)
        gradients = {f"grad.{n}": p.grad for n, p in model.named_parameters()}
        found.append(
            (state_of(model, optimizer) | gradients, [r.loss for r in reports], [r.grad_norm for r in reports])
        )
    assert differing(found[0][0], found[1][0]) == []
    assert found[0][1] == found[1][1]
    for one, other in zip(found[0][2], found[1][2], strict=True):
        assert one is other is None or one == pytest.approx(other, rel=1e-6)


def test_it_is_the_gradient_of_float32_to_the_rounding_of_float16(reads: str) -> None:
    for toggles in TOGGLES:
        model, _, step = made(1024.0, **toggles)
        exact = net()
        reference = Step(exact, toggles.get("objective", error), sgd(exact), **_without(toggles, "objective"))
        for one in (step, reference):
            one(cut(rows(9), [5, 4]))
        narrow, wide = (torch.cat([p.grad.flatten() for p in m.parameters()]) for m in (model, exact))
        assert 0.0 < float((narrow - wide).norm() / wide.norm()) < 4 * 2.0**-11, toggles


def _without(toggles: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in toggles.items() if key != name}


def tiny(model: nn.Module, inputs: Tensor) -> Tensor:
    return 1e-9 * model(inputs).float().sum()


def test_what_it_is_for() -> None:
    """A gradient of 1e-9 is zero in float16, whose smallest number is 6e-8."""
    found = {}
    for scale in (1.0, 65536.0):
        model = nn.Linear(1, 1, bias=False)
        still = torch.optim.SGD(model.parameters(), lr=0.0)
        step = Step(model, tiny, still, precision="fp16", loss_scale=scale, clip_value=1.0)
        step([torch.ones(1, 1)])
        found[scale] = model.weight.grad.item()
    assert found[1.0] == 0.0
    assert found[65536.0] == pytest.approx(1e-9, rel=1e-2)


def overflowing(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """A gradient of 800 at the last bias: finite in float16 up to a scale of 64."""
    return 100.0 * model(batch[0]).float().sum()


@pytest.mark.parametrize("zero_grad", ["set_to_none", "zeros", "never"])
@pytest.mark.parametrize("nonfinite", ["skip", "raise"])
def test_an_overflow_backs_off_and_is_not_held_against_the_run(zero_grad: str, nonfinite: str, reads: str) -> None:
    model, optimizer, step = made(256.0, objective=overflowing, zero_grad=zero_grad, nonfinite=nonfinite)
    reports: list[Report] = []
    for overflows in (True, True, False):
        before, taken = state_of(model, optimizer), step.clocks.as_dict()["steps"]
        reports.append(step([rows()]))
        assert reports[-1].skipped == reports[-1].overflowed == overflows
        assert (differing(before, state_of(model, optimizer)) == []) == overflows
        assert step.clocks.as_dict()["steps"] == taken + (not overflows)
        assert int(step.skips_in_a_row) == 0
    assert [report.loss_scale for report in reports] == [256.0, 128.0, 64.0]
    assert str(reports[0].reason).startswith("the loss scale 256 overflowed in the gradient of ")
    assert str(reports[0].reason).endswith(", now 128")
    assert reports[2].reason is None


def test_a_deferred_overflow_says_what_is_still_known() -> None:
    _, _, step = made(64.0, objective=overflowing)
    step([rows()])  # makes the momenta; from here on nothing is read
    FREE_READS.discard("cpu")
    try:
        step._scale = LossScale(128.0, 10, CPU)
        step._inspector.reads = False
        report = step([rows()])
    finally:
        FREE_READS.add("cpu")
    assert isinstance(report._skipped, Tensor)
    assert report.reason == "the loss scale 128 overflowed, now 64"
    assert int(step.skips_in_a_row) == 0
    assert step._scale.state_dict() == {"scale": 64.0, "good": 0.0}


def test_at_the_smallest_scale_it_is_the_gradient_itself(reads: str) -> None:
    def objective(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return 1e6 * model(batch[0]).float().sum()

    _, _, step = made(2.0, objective=objective)
    reports = [step([rows()]) for _ in range(3)]
    assert [report.overflowed for report in reports] == [True, False, False]
    assert [report.loss_scale for report in reports] == [2.0, 1.0, 1.0]
    assert int(step.skips_in_a_row) == 2
    assert all(report.skipped for report in reports)
    assert "is not finite, while the loss is" in str(reports[1].reason)
    _, _, step = made(1.0, objective=objective, nonfinite="raise")
    with pytest.raises(DivergedError, match=r"the gradient of 0.weight and of 5 more is not finite, while the loss is"):
        step([rows()])


def test_a_loss_that_is_not_finite_and_a_window_of_no_weight_are_not_its_doing(reads: str) -> None:
    _, _, step = made(1024.0, objective=supervised(nn.MSELoss()))
    step([rows()])
    inputs, targets = rows()
    inputs[3] = float("nan")
    report = step([rows(), (inputs, targets)])
    assert report.skipped and not report.overflowed
    assert int(step.skips_in_a_row) == 1
    assert step._scale.state_dict() == {"scale": 1024.0, "good": 1.0}
    _, _, step = made(1024.0, objective=supervised(nn.CrossEntropyLoss()))
    ignored = (rows()[0], torch.full((8,), -100))
    report = step([ignored])
    assert report.reason == ZERO_WEIGHT and not report.overflowed
    assert step._scale.state_dict() == {"scale": 1024.0, "good": 0.0}


def test_a_norm_that_overflows_with_the_scale_backs_off() -> None:
    model = nn.Linear(4, 4, bias=False)
    step = Step(
        model, lambda m, x: (m.weight * 1e33).sum(), torch.optim.SGD(model.parameters(), lr=0.0), precision="fp16",
        clip_norm=1.0,
    )  # fmt: skip
    report = step([torch.ones(1, 1)])
    assert report.reason == "the loss scale 65536 overflowed in the gradient's norm, now 32768"


# Its state


def test_a_run_that_goes_on_is_bit_equal_also_inside_a_window() -> None:
    windows = [cut(rows(seed=index), [5, 3]) for index in range(8)]
    finals = []
    for stops in ((), range(1, 24)):
        model, optimizer, step = made(2.0**18, loss_scale_interval=3)
        scales = []
        for place in range(24):
            if place in stops:
                state = copy.deepcopy((step.state_dict(), model.state_dict(), optimizer.state_dict()))
                model, optimizer, step = made(2.0, loss_scale_interval=3)
                model.load_state_dict(state[1])
                optimizer.load_state_dict(state[2])
                step.load_state_dict(state[0])
            drawn = windows[place // 3]
            if place % 3 < 2:
                step.accumulate(drawn[place % 3], drawn)
            else:
                scales.append(step.finish().loss_scale)
        finals.append((state_of(model, optimizer), scales, step.state_dict()["loss_scale"]))
    assert differing(finals[0][0], finals[1][0]) == []
    assert finals[0][1:] == finals[1][1:]
    assert len(set(finals[0][1])) > 2


def test_a_state_of_another_precision_leaves_it_as_it_is() -> None:
    model, _, step = made(512.0)
    wide = Step(net(), error, sgd(model))
    assert wide.state_dict()["loss_scale"] == {}
    step.load_state_dict(wide.state_dict())
    assert step._scale.state_dict() == {"scale": 512.0, "good": 0.0}
    wide.load_state_dict(step.state_dict())
    assert wide([rows()]).loss_scale is None


# What is refused


def test_what_cannot_go_with_it_is_refused() -> None:
    with pytest.raises(ConfigError, match="nonfinite=allow cannot go with precision=fp16"):
        made(nonfinite="allow")
    model = nn.Linear(2, 2).half()
    with pytest.raises(ConfigError, match="the parameter 'weight' is float16 itself"):
        Step(model, error, torch.optim.SGD(model.parameters()), precision="fp16")
    with pytest.raises(ConfigError, match="loss_scale=1000 is no power of two, .*: set 1024"):
        made(1000.0)
    for scale in (0.5, 2.0**65, float("inf")):
        with pytest.raises(ConfigError, match="loss_scale"):
            made(scale)


# Over ranks


def uneven(rank: int, world: int, deferred: bool) -> list[Any]:
    """One rank's rows alone make the gradient overflow, then one rank's loss is not finite."""
    if deferred:
        FREE_READS.discard("cpu")
    try:
        model, optimizer, step = made(256.0, objective=overflowing, ranks=ManyProcesses(), loss_scale_interval=2)
        said = []
        for index in range(8):
            inputs, targets = rows()
            if rank == 1:
                inputs = inputs * (100.0 if index in (2, 3) else float("nan") if index == 5 else 0.01)
            report = step([(inputs * 0.01 if rank == 0 else inputs, targets)])
            said.append((report.loss_scale, report.skipped, report.overflowed, int(step.skips_in_a_row)))
        return [said, state_of(model.get_submodule("3"), optimizer)]
    finally:
        FREE_READS.add("cpu")


@pytest.mark.parametrize("deferred", [False, True])
def test_all_ranks_have_one_scale(deferred: bool) -> None:
    (first, left), (second, right) = over_ranks(uneven, deferred)
    assert first == second
    assert differing(left, right) == []
    assert any(overflowed for _, _, overflowed, _ in first)
    assert not all(skipped for _, skipped, _, _ in first)
    assert first[5][1:] == (True, False, 1)
    assert first[6][0] == first[5][0]
