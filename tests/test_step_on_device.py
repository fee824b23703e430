"""The path of a device, where the verdict is never read, taken on the CPU and held against the path that reads.

`FREE_READS` says on which devices a read waits for nothing; emptied, the CPU is treated as any other device.
"""

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from reference import cut, differing, farthest, state_of
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from trainer import DivergedError, Report, Step, Sum, supervised
from trainer.gradient.report import FREE_READS
from trainer.gradient.skips import ZERO_WEIGHT
from trainer.optim import linear

KINDS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.02, fused=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.02, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.02, fused=True),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, nesterov=True, fused=True),
    "not fused": lambda p: torch.optim.AdamW(p, lr=0.02),
}


@pytest.fixture
def no_read_is_free() -> Iterator[None]:
    FREE_READS.discard("cpu")
    yield
    FREE_READS.add("cpu")


class Reads(TorchDispatchMode):
    """Counts what brings numbers to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        if function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default):
            self.count += 1
        return function(*arguments, **(keywords or {}))


def build(kind: str, objective: Any, **toggles: Any) -> tuple[nn.Module, torch.optim.Optimizer, Step]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3))
    groups: list[Any] = list(model.parameters())
    if "groups" in toggles:
        groups = [{"params": groups[:2], **toggles.pop("groups")}, {"params": groups[2:]}]
    optimizer = KINDS[kind](groups)
    return model, optimizer, Step(model, objective, optimizer, **toggles)


def windows(count: int, classes: bool = False) -> list[list[tuple[Tensor, Tensor]]]:
    """Windows of 4 + 3 rows; the first, and every seventh after it, are not finite."""
    generator = torch.Generator().manual_seed(2)
    drawn = []
    for index in range(count):
        inputs = torch.randn(7, 3, generator=generator)
        targets = torch.randn(7, 3, generator=generator)
        if classes:
            targets = targets.argmax(1).where(torch.rand(7, generator=generator) < 0.7, -100)
        if index % 7 == 0:
            inputs[5, 1] = float("nan")
        drawn.append(cut((inputs, targets), [4, 3]))
    return drawn


def run(kind: str, objective: Any, drawn: list[Any], **toggles: Any) -> tuple[dict[str, Tensor], list[Report], Step]:
    model, optimizer, step = build(kind, objective, **toggles)
    reports = [step(window) for window in drawn]
    return state_of(model, optimizer), reports, step


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("zero_grad", ["set_to_none", "zeros", "never"])
def test_fifty_windows_are_bit_equal_to_the_path_that_reads(kind: str, zero_grad: str) -> None:
    mse = supervised(nn.MSELoss())
    state, reports, step = run(kind, mse, windows(50), zero_grad=zero_grad)
    FREE_READS.discard("cpu")
    try:
        other_state, other_reports, other = run(kind, mse, windows(50), zero_grad=zero_grad)
    finally:
        FREE_READS.add("cpu")
    assert differing(state, other_state) == []
    assert [r.skipped for r in reports] == [r.skipped for r in other_reports] == [i % 7 == 0 for i in range(50)]
    assert [r.clocks for r in reports] == [r.clocks for r in other_reports]
    for one, two in zip(reports, other_reports, strict=True):
        assert one.loss == pytest.approx(two.loss, rel=1e-6, nan_ok=True)
    assert step.clocks.as_dict() == other.clocks.as_dict()
    assert int(step.skips_in_a_row) == int(other.skips_in_a_row) == 1
    assert step.state_dict()["clocks"] == other.state_dict()["clocks"]


@pytest.mark.parametrize(
    "toggles",
    [
        {"clip_norm": 0.3},
        {"clip_norm": 0.2, "norm_order": math.inf},
        {"clip_value": 0.01},
        {"clip_adaptive": 0.05},
        {"groups": {"clip_norm": 0.1}},
        {"groups": {"clip_norm": None}, "clip_norm": 0.3},
        {"schedule": linear(60)},
        {"reduction": "sum"},
    ],
)
@pytest.mark.parametrize("classes", [True, False])
def test_clips_schedules_and_weights_on_the_device_are_near(toggles: dict[str, Any], classes: bool) -> None:
    """Weights of ignored targets stay tensors; a rate and a factor that are tensors are float32."""
    objective = supervised(nn.CrossEntropyLoss() if classes else nn.MSELoss())
    state, reports, _ = run("momentum", objective, windows(30, classes), **toggles)
    FREE_READS.discard("cpu")
    try:
        other_state, other_reports, _ = run("momentum", objective, windows(30, classes), **toggles)
    finally:
        FREE_READS.add("cpu")
    state = {name: value for name, value in state.items() if value.is_floating_point()}
    assert farthest({name: other_state[name] for name in state}, state) < 2e-5
    for one, two in zip(reports, other_reports, strict=True):
        assert one.skipped == two.skipped
        assert one.weight == two.weight
        assert one.skipped or one.lr == pytest.approx(two.lr, rel=1e-6)
        by_norm = "clip_norm" in toggles or "groups" in toggles
        assert (one.grad_norm is None) == (two.grad_norm is None) == (not by_norm)
        if by_norm and not one.skipped:
            for name in ("grad_norm", "grad_norm_after", "group_norms", "group_clip_factors"):
                assert getattr(one, name) == pytest.approx(getattr(two, name), rel=1e-4), name
            assert (one.clip_factor is None) == (two.clip_factor is None) == ("groups" in toggles)
            assert "groups" in toggles or one.clip_factor == pytest.approx(two.clip_factor, rel=1e-4)


@pytest.mark.usefixtures("no_read_is_free")
@pytest.mark.parametrize(
    "toggles",
    [
        {},
        {"clip_norm": 0.3},
        {"clip_norm": 0.2, "norm_order": math.inf},
        {"clip_value": 0.1},
        {"clip_adaptive": 0.05},
        {"groups": {"clip_norm": 0.1}},
        {"groups": {"clip_value": 0.1}, "clip_norm": 0.3},
        {"schedule": linear(60)},
        {"zero_grad": "never"},
        {"zero_grad": "never", "clip_adaptive": 0.05},
        {"zero_grad": "never", "groups": {"clip_norm": 0.1}},
        {"precision": "fp16", "loss_scale": 1024.0},
        {"precision": "fp16", "loss_scale": 1024.0, "clip_norm": 0.3},
        {"precision": "fp16", "loss_scale": 1024.0, "zero_grad": "never"},
    ],
)
@pytest.mark.parametrize("classes", [True, False])
def test_in_steady_state_nothing_is_read(
    toggles: dict[str, Any], classes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective = supervised(nn.CrossEntropyLoss() if classes else nn.MSELoss())
    _, _, step = build("adamw", objective, **toggles)
    drawn = windows(20, classes)
    for window in drawn[:3]:
        step(window)
    taken = step.clocks.as_dict()["steps"]

    def read(*_: Any) -> None:
        raise RuntimeError("a number was read")

    with monkeypatch.context() as patch, Reads() as reads:
        for name in ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__"):
            patch.setattr(Tensor, name, read)
        for window in drawn[3:]:
            step(window)
    assert reads.count == 0
    assert step.clocks.steps == 0 or step.clocks.steps == taken
    assert step.clocks.as_dict()["steps"] == taken + 17 - 2


def test_on_the_cpu_a_step_reads_a_loss_a_micro_batch_and_a_flag() -> None:
    for toggles, norms in (({}, 0), ({"clip_norm": 0.3}, 1)):
        model, _, step = build("adamw", supervised(nn.MSELoss()), **toggles)
        drawn = windows(6)[1:]
        step(drawn[0])
        with Reads() as reads:
            for window in drawn[1:]:
                step(window)
        parameters = len(list(model.parameters()))
        assert 0 < reads.count <= len(drawn[1:]) * (2 + (parameters if norms else 1)), toggles


@pytest.mark.usefixtures("no_read_is_free")
def test_a_window_of_weight_zero_is_a_skip_with_its_sentence_on_the_device() -> None:
    ignored = (torch.randn(4, 3), torch.full((4,), -100))
    good = (torch.randn(4, 3), torch.zeros(4, dtype=torch.long))
    for nonfinite in ("skip", "raise", "allow"):
        model, optimizer, step = build("adamw", supervised(nn.CrossEntropyLoss()), nonfinite=nonfinite)
        for window in ([ignored], [good], [ignored, ignored], [ignored, good]):
            before = state_of(model, optimizer)
            report = step(window)
            nothing = all(micro_batch is ignored for micro_batch in window)
            assert report.skipped == nothing, nonfinite
            assert report.reason == (ZERO_WEIGHT if nothing else None)
            assert (differing(before, state_of(model, optimizer)) == []) == nothing


@pytest.mark.usefixtures("no_read_is_free")
def test_one_term_of_weight_zero_does_not_skip_the_others() -> None:
    def objective(m: nn.Module, b: tuple[Tensor, Tensor]) -> dict[str, Sum]:
        error = (m(b[0]) - b[1]).square().sum()
        return {"error": Sum(error, torch.tensor(12)), "none": Sum(error * 0.0, torch.tensor(0))}

    for whole in (True, False):
        model, _, step = build("sgd", objective)
        before = state_of(model)
        window = windows(2)[1]
        for micro_batch in window:
            step.accumulate(micro_batch, window if whole else None)
        report = step.finish()
        assert not report.skipped
        assert differing(before, state_of(model)) != []
        assert all(value.isfinite().all() for value in state_of(model).values())


@pytest.mark.usefixtures("no_read_is_free")
def test_nonfinite_raise_reads_and_names_the_place() -> None:
    _, _, step = build("adamw", supervised(nn.MSELoss()), nonfinite="raise")
    with pytest.raises(DivergedError, match="step 1 was not taken: the loss of micro-batch 2 of 2 is nan"):
        step(windows(1)[0])


@pytest.mark.usefixtures("no_read_is_free")
def test_a_deferred_skip_says_what_is_still_known() -> None:
    _, _, step = build("sgd", supervised(nn.MSELoss()))
    report = step(windows(1)[0])
    assert isinstance(report._skipped, Tensor)
    assert report.reason == "the loss or the gradient is not finite"


@pytest.mark.usefixtures("no_read_is_free")
def test_the_divisor_of_a_float64_model_is_exact() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 4).double()
    inputs, targets = torch.randn(7, 3).double(), torch.tensor([0, 1, -100, 3, 2, -100, 1])
    nn.functional.cross_entropy(model(inputs), targets).backward()
    true = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    step = Step(model, supervised(nn.CrossEntropyLoss()), torch.optim.SGD(model.parameters(), lr=0.0))
    step(cut((inputs, targets), [4, 3]))
    assert farthest({name: parameter.grad for name, parameter in model.named_parameters()}, true) <= 1e-12


@pytest.mark.usefixtures("no_read_is_free")
def test_a_large_finite_float64_loss_is_no_skip() -> None:
    model = nn.Linear(1, 1).double()
    step = Step(model, lambda m, x: m(x).mean() + 1e300, torch.optim.SGD(model.parameters(), lr=0.1))
    assert not step([torch.ones(2, 1).double()]).skipped


def test_the_counter_counts() -> None:
    """The instrument itself: without it, zero reads would mean nothing."""
    with Reads() as reads:
        torch.ones(()).item()
        bool(torch.ones(()))
    assert reads.count == 2
    assert Counter(FREE_READS) == {"cpu": 1}
