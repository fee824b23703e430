"""A window run again: three planted faults are named by module, operation, line and rows; each with its control."""

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import MSE
from torch import Tensor, nn

from trainer import CheckpointError, ConfigError, Replay, Step, Sum, capture, replay, rng, supervised
from trainer.diagnose.capture import Captured, load

WORSE = 3
"""The row of the second micro-batch that is planted."""


def line_of(code: Any) -> int:
    lines, first = inspect.getsourcelines(code)
    return first + next(index for index, line in enumerate(lines) if "# HERE" in line)


class Logs(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.log(x)  # HERE


class Norms(nn.Module):
    """Finite everywhere; the slope of a norm at zero is not (a square root's is infinite, times zero)."""

    def forward(self, x: Tensor) -> Tensor:
        return (x * x).sum(-1, keepdim=True).sqrt()  # HERE


class Net(nn.Module):
    """A dropout in front of what goes wrong, and statistics that every forward changes."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.statistics = nn.BatchNorm1d(3)
        self.drop = nn.Dropout(0.5)
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        self.statistics(x)
        return self.head(self.drop(x * self.scale) + x)


def objective(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).mean()


def window(value: float) -> list[Tensor]:
    batches = [torch.full((8, 3), 2.0) + 0.1 * torch.rand(8, 3) for _ in range(3)]
    batches[1][WORSE] = value
    return batches


def caught(model: nn.Module, batches: list[Any], aim: Any = objective, **toggles: Any) -> Captured:
    """The window that a step has skipped."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = Step(model, aim, optimizer, **toggles)
    generators = rng.capture()
    report = step(batches)
    assert report.skipped
    return capture(step, batches, why=str(report.reason), generators=generators, loss_scale=report.loss_scale)


def faults() -> dict[str, tuple[nn.Module, float, float, tuple[str, str, str]]]:
    return {
        "forward": (Net(Logs()), -1.0, 1.0, ("forward", "log()", "head")),
        "backward": (Net(Norms()), 0.0, 1.0, ("backward", "SqrtBackward0", "head")),
    }


@pytest.mark.parametrize("fault", ["forward", "backward"])
def test_a_fault_is_named_by_module_operation_line_and_rows(fault: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, value, harmless, named = faults()[fault]
    made = caught(model, window(value))
    made.save(tmp_path / "window-000001")
    found = replay(tmp_path / "window-000001", model, objective)
    assert found.micro_batch == 1
    assert found.culprit is not None
    assert (found.culprit.where, found.culprit.what, found.culprit.module) == named
    assert found.culprit.place is not None
    assert found.culprit.place.line == line_of(type(model.head))
    assert found.culprit.rows == [WORSE]
    assert found.exit_code == 4
    line = f"{named[1]} in module 'head', tests/test_replay.py:{line_of(type(model.head))} (`return "
    assert str(found).splitlines()[1].startswith(f"micro-batch 2 of 3: {line}")
    again = replay(tmp_path / "window-000001", model, objective)
    assert str(again) == str(found)
    whole = dataclasses.replace(made, window=window(harmless))
    control = replay(whole, model, objective)
    assert control.finite
    assert control.exit_code == 0


class Halves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4, bias=False), nn.Linear(4, 1, bias=False)
        nn.init.ones_(self.first.weight)
        nn.init.ones_(self.second.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))  # HERE


def total(model: nn.Module, x: Tensor) -> Sum:
    return Sum(model(x).float().sum(), 1.0)


def test_an_overflow_of_float16_in_backward_with_the_loss_scale_as_it_was(tmp_path: Path) -> None:
    model = Halves()
    batches = [torch.ones(8, 3) for _ in range(3)]
    batches[1][WORSE] = 1000.0
    made = caught(model, batches, total, precision="fp16", loss_scale=256.0)
    assert made.loss_scale == 256.0
    made.save(tmp_path / "one")
    found = replay(tmp_path / "one", model, total)
    assert found.micro_batch == 1
    assert found.culprit is not None
    assert found.culprit.where == "backward"
    assert found.culprit.place is not None
    assert found.culprit.place.line == line_of(Halves)
    assert found.culprit.rows == [WORSE]
    assert "in fp16 with loss scale 256: the loss scale 256 overflowed" in str(found)
    for changed in ({"loss_scale": 1.0}, {"precision": "fp32"}):
        assert replay(dataclasses.replace(load(tmp_path / "one"), **changed), model, total).finite


def test_an_overflow_of_float16_in_forward() -> None:
    model = Halves()
    nn.init.constant_(model.first.weight, 300.0)
    batches = [torch.ones(8, 3) for _ in range(2)]
    batches[1][WORSE] = 100.0
    made = caught(model, batches, total, precision="fp16", loss_scale=1.0)
    found = replay(made, model, total)
    assert replay(dataclasses.replace(made, precision="bf16"), model, total).finite
    assert found.culprit is not None
    assert (found.culprit.what, found.culprit.module, found.culprit.rows) == ("linear()", "first", [WORSE])
    assert found.culprit.result == "inf (4 of 32)"


def test_what_is_drawn_is_drawn_again() -> None:
    """A row goes wrong by what dropout drew for it in this very window; other draws name another row, or none."""

    class Risky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.drop = nn.Parameter(torch.ones(1)), nn.Dropout(0.1)

        def forward(self, x: Tensor) -> Tensor:
            return torch.log(self.drop(x * self.w))

    torch.manual_seed(5)
    model = Risky()
    batches = [torch.ones(16) for _ in range(4)]
    rng_before = rng.capture()
    dropped = [(nn.functional.dropout(one, 0.1) == 0).nonzero().flatten().tolist() for one in batches]
    rng.restore(rng_before)
    made = caught(model, batches)
    found = replay(made, model, objective)
    undrawn = replay(dataclasses.replace(made, generators=None), model, objective)
    assert "note: the random generators were not kept" in str(undrawn)
    first = next(index for index, rows in enumerate(dropped) if rows)
    assert found.micro_batch == first
    assert first > 0  # so that what the first micro-batch draws matters
    assert found.culprit is not None
    assert found.culprit.result == f"-inf ({len(dropped[first])} of 16)"
    torch.manual_seed(5 + 1)
    other = replay(dataclasses.replace(made, generators=rng.capture()), model, objective)
    assert str(other) != str(found)


def test_the_model_and_the_generators_are_as_they_were() -> None:
    torch.manual_seed(0)
    model = Net(Logs())
    made = caught(model, window(-1.0))
    with torch.no_grad():
        model.scale.mul_(3.0)
        model.statistics.running_mean.add_(1.0)
    model.drop.eval()
    model.scale.requires_grad_(False)
    before, drawn = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    assert not replay(made, model, objective).finite
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), drawn)
    assert (model.drop.training, model.statistics.training, model.scale.requires_grad) == (False, True, False)


def test_what_only_the_window_makes_of_it() -> None:
    """Each micro-batch is finite; their sum, the norm, or the division is not."""
    model = nn.Linear(1, 1, bias=False)
    huge = torch.full((1, 1), 2e38)

    def sums(model: nn.Module, x: Tensor) -> Sum:
        return Sum(model(x).sum() * 0.0 + (model.weight * x).sum() - (model.weight * x).sum().detach(), 1.0)

    with torch.no_grad():
        model.weight.zero_()
    made = caught(model, [huge, huge], sums, reduction="sum")
    found = replay(made, model, sums)
    assert found.micro_batch is None
    assert found.of_window == (
        "the sum of the gradient of 'weight' over micro-batches 1 to 2 is inf (1 of 1), and each of them is finite."
    )
    assert replay(
        dataclasses.replace(caught(model, [huge, huge], sums, reduction="sum"), window=[huge / 2, huge / 2]),
        model,
        sums,
    ).finite
    wide = nn.Linear(4, 1, bias=False)
    nn.init.zeros_(wide.weight)
    large = torch.full((1, 4), 1e20)
    found = replay(caught(wide, [large], sums, clip_norm=1.0), wide, sums)
    assert found.of_window == "every gradient is finite (the largest number is 1e+20), and their norm is inf (1 of 1)."


def test_pairs_terms_and_weights_as_the_step_has_them(tmp_path: Path) -> None:
    """Coefficients and weights make the seeds: with others than these the overflow would not come."""
    model = nn.Linear(3, 1)
    nn.init.ones_(model.weight)

    def two(model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Any]:
        outputs = model(batch[0])
        return {"far": Sum(outputs.sum() * 1e30, 1.0), "near": MSE(model, batch)}

    batches = [(torch.ones(4, 3), torch.ones(4, 1)), (torch.full((4, 3), 1e2), torch.ones(4, 1))]
    made = caught(model, batches, two, coefficients={"far": 1e7, "near": 1.0})
    made.save(tmp_path / "one")
    found = replay(tmp_path / "one", model, two)
    assert found.culprit is not None
    assert found.culprit.where == "backward"
    gradient = {**made.gradient, "coefficients": {"far": 1.0, "near": 1.0}}
    assert replay(dataclasses.replace(made, gradient=gradient), model, two).finite


def test_a_loss_of_torchs_and_data_that_came_in_bad() -> None:
    model = nn.Linear(3, 1)
    targets = torch.tensor([[1.0], [float("nan")], [1.0], [1.0]])
    batches = [(torch.ones(4, 3), torch.ones(4, 1)), (torch.ones(4, 3), targets)]
    aim = supervised(nn.MSELoss())
    made = dataclasses.replace(caught(model, batches, aim), rows=[torch.arange(4), torch.tensor([9, 40, 2, 7])])
    found = replay(made, model, aim)
    assert str(found).splitlines()[1:] == [
        "micro-batch 2 of 2: tensor 1 of the micro-batch is not finite before anything is done with it: nan (1 of 4).",
        "  rows of the micro-batch that hold it: 1",
        "  rows of the data: 40",
    ]
    plain = found.as_dict()
    assert (plain["data_rows"], plain["culprit"]["where"], plain["finite"]) == ([40], "input", False)


def test_what_does_not_fit_is_a_sentence(tmp_path: Path) -> None:
    torch.manual_seed(0)
    caught(Net(Logs()), window(-1.0)).save(tmp_path / "one")
    with pytest.raises(CheckpointError, match="one: 'scale' has shape|has no|which the model has not"):
        replay(tmp_path / "one", nn.Linear(3, 1), objective)
    with pytest.raises(ConfigError, match="needs the model itself"):
        replay(tmp_path / "one", Net, objective)
    assert isinstance(replay(tmp_path / "one", Net(Logs()), objective), Replay)
