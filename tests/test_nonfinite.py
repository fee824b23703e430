"""What made a number that is not finite: planted in forward, backward and by float16; found by name, line and rows."""

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trainer import rng
from trainer.diagnose.nonfinite import Culprit, Suspect, _fewest, culprit, spread
from trainer.gradient.precision import autocast


def line_of(code: Any) -> int:
    lines, first = inspect.getsourcelines(code)
    return first + next(index for index, line in enumerate(lines) if "# HERE" in line)


class Logs(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.log(x)  # HERE


class Rooted(nn.Module):
    """Its forward is finite everywhere; the square root's slope at zero is not."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sqrt(x)  # HERE


def rows(bad: list[int], value: float, count: int = 16) -> Tensor:
    x = torch.full((count, 3), 2.0)
    x[bad] = value
    return x


def mean(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).mean()


class Scaled(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x * self.scale)


def test_a_forward_names_module_operation_line_ranges_and_rows() -> None:
    found = culprit(Suspect(Scaled(Logs()), mean, rows([5], 0.0)))
    assert found is not None
    assert (found.where, found.what, found.module) == ("forward", "log()", "inner")
    assert found.place is not None
    assert found.place.line == line_of(Logs)
    assert found.result == "-inf (3 of 48)"
    assert found.ranges == ["16 × 3 float32 in [0, 2]"]
    assert found.rows == [5]
    assert str(found).startswith("log() in module 'inner', tests/test_nonfinite.py:")


def test_a_backward_names_the_node_and_the_line() -> None:
    found = culprit(Suspect(Scaled(Rooted()), mean, rows([2], 0.0)))
    assert found is not None
    assert (found.where, found.what, found.module) == ("backward", "SqrtBackward0", "inner")
    assert found.place is not None
    assert found.place.line == line_of(Rooted)
    assert found.result.startswith("inf (3 of 48)")
    assert found.rows == [2]


def test_a_float16_overflow_under_autocast() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 1, bias=False))
    with torch.no_grad():
        model[0].weight.fill_(200.0)
        model[1].weight.fill_(200.0)
    x = rows([7], 500.0)
    assert culprit(Suspect(model, mean, x)) is None
    context = autocast("fp16", "cpu")
    assert context is not None
    found = culprit(Suspect(model, mean, x, around=lambda: context))
    assert found is not None
    assert (found.where, found.what, found.module) == ("forward", "linear()", "0")
    assert found.result == "inf (4 of 64)"
    assert found.rows == [7]


def test_a_loss_scale_that_is_too_large_is_found_in_backward() -> None:
    model = nn.Linear(3, 1, bias=False).half()
    suspect = Suspect(model, lambda m, x: m(x.half()).sum().float(), rows([], 0.0), seed=65536.0)
    found = culprit(suspect)
    assert found is not None
    assert found.where == "backward"
    assert "inf" in found.result
    assert culprit(Suspect(model, suspect.objective, suspect.micro_batch, seed=1.0)) is None


def test_what_came_in_bad_is_called_so() -> None:
    found = culprit(Suspect(nn.Linear(3, 1), mean, rows([1, 9], float("nan"))))
    assert found is not None
    assert found.where == "input"
    assert str(found) == "tensor 0 of the micro-batch is not finite before anything is done with it: nan (6 of 48)."
    model = nn.Linear(3, 1)
    with torch.no_grad():
        model.weight[0, 1] = float("inf")
    assert str(culprit(Suspect(model, mean, rows([], 0.0)))) == (
        "the parameter 'weight' is not finite before anything is done with it: inf (1 of 3)."
    )


def test_rows_that_only_matter_together() -> None:
    def objective(model: nn.Module, x: Tensor) -> Tensor:
        spread_of = x[:, 0].max() - x[:, 0].min()
        return (model(x) / (6.0 - spread_of)).mean()  # a division by zero where rows of -3 and 3 meet

    x = torch.zeros(12, 3)
    x[2], x[8] = -3.0, 3.0
    found = culprit(Suspect(nn.Linear(3, 1), objective, x))
    assert found is not None
    assert found.what == "div()" or found.what == "__truediv__()"
    assert found.rows == [2, 8]


def test_the_same_is_drawn_again() -> None:
    class Risky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            return torch.log(self.w * (torch.rand(()) > 0.5).float()) + x.sum()

    model, states = Risky(), []
    torch.manual_seed(0)
    for _ in range(20):
        states.append((rng.capture(), bool(torch.rand(()) > 0.5)))
    assert {well for _, well in states} == {True, False}
    for state, well in states:
        found = culprit(Suspect(model, lambda m, x: m(x), torch.ones(2, 3), state=state), with_rows=False)
        assert (found is None) == well


def test_nothing_is_left_behind() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), Logs())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert culprit(Suspect(model, mean, torch.randn(8, 3))) is not None
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("guilty", [[0], [9], [3, 4], [0, 5, 9], list(range(10))])
def test_the_fewest_rows(guilty: list[int]) -> None:
    calls: list[Any] = []

    def is_enough(some: list[int]) -> bool:
        calls.append(some)
        return set(guilty) <= set(some)

    assert _fewest(list(range(10)), is_enough) == guilty
    assert len(calls) < 80


def test_words_for_a_tensor() -> None:
    assert spread(torch.tensor([1, 2])) == "2 int64 in [1, 2]"
    assert spread(torch.tensor(float("nan"))) == "a scalar float32"
    assert str(Culprit("backward", "MulBackward0", result="nan (1 of 1)")) == (
        "MulBackward0 made nan (1 of 1) out of finite numbers in backward."
    )
