"""What made a number that is not finite: planted in forward, backward and by float16; found by name, line and rows."""

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trainer import Cotangents, rng, supervised
from trainer.diagnose.enough import fewest
from trainer.diagnose.nonfinite import Culprit, Suspect, culprit
from trainer.diagnose.numbers import spread
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
    assert str(found) == (
        "tensor 0 of the micro-batch is not finite before anything is done with it: nan (6 of 48).\n"
        "  rows of the micro-batch that hold it: 1, 9"
    )
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

    assert fewest(list(range(10)), is_enough) == guilty
    assert len(calls) < 80


def test_words_for_a_tensor() -> None:
    assert spread(torch.tensor([1, 2])) == "2 int64 in [1, 2]"
    assert spread(torch.tensor(float("nan"))) == "a scalar float32, with nan (1 of 1)"
    assert str(Culprit("backward", "MulBackward0", result="nan (1 of 1)")) == (
        "MulBackward0 made nan (1 of 1) out of finite numbers in backward."
    )


class Attends(nn.Module):
    """Masks with minus infinity, as attention does; `plants` says how the mask comes about."""

    def __init__(self, plants: str) -> None:
        super().__init__()
        self.plants = plants
        self.scale = nn.Parameter(torch.ones(3))
        self.register_buffer("mask", torch.tensor([0.0, float("-inf"), float("-inf")]))

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        scores = x * self.scale
        if self.plants == "buffer":
            scores = scores + torch.where(hidden, self.mask[1], self.mask[0])
        else:
            scores = scores.masked_fill(hidden, float("-inf"))
        return scores.softmax(-1)  # HERE


def attend(model: nn.Module, micro_batch: tuple[Tensor, Tensor]) -> Tensor:
    return model(*micro_batch)[:, 0].mean()


@pytest.mark.parametrize("plants", ["buffer", "number"])
def test_a_mask_of_infinities_is_no_fault_and_what_makes_a_nan_of_it_is(plants: str) -> None:
    x, hidden = torch.randn(6, 3), torch.zeros(6, 3, dtype=torch.bool)
    hidden[:, 1:] = True
    assert culprit(Suspect(Attends(plants), attend, (x, hidden))) is None
    hidden[4] = True  # a row that attends to nothing
    found = culprit(Suspect(Attends(plants), attend, (x, hidden)))
    assert found is not None
    assert (found.where, found.what, found.rows) == ("forward", "softmax()", [4])
    assert found.place is not None
    assert found.place.line == line_of(Attends)
    assert "softmax() made nan (3 of 18) out of infinite numbers in forward." in str(found).replace(
        f", {found.place}", ""
    )
    assert found.ranges[0].endswith("with -inf (13 of 18)")


def test_a_call_that_overflows_is_named_and_not_the_nan_that_comes_of_it() -> None:
    def objective(model: nn.Module, x: Tensor) -> Tensor:
        large = (model(x) * 1e3).exp()
        return (large - large).mean()

    model = nn.Linear(3, 1)
    nn.init.ones_(model.weight)
    found = culprit(Suspect(model, objective, rows([], 0.0)))
    assert found is not None
    assert (found.what, found.result) == ("exp()", "inf (16 of 16)")


def test_a_number_that_is_given_is_said_so() -> None:
    found = culprit(
        Suspect(nn.Linear(3, 1), lambda m, x: m(x).masked_fill(x[:, :1] > 0, float("nan")).mean(), rows([], 0.0))
    )
    assert found is not None
    assert found.what == "masked_fill()"
    assert found.out_of == "a number that it was given"


def test_what_was_wrong_in_place_and_through_a_view() -> None:
    def objective(model: nn.Module, x: Tensor) -> Tensor:
        y = model(x)
        y[:, 0].sub_(y[:, 0]).log_()
        return y.mean()

    found = culprit(Suspect(nn.Linear(3, 2), objective, rows([], 0.0)))
    assert found is not None
    assert found.what == "log_()"


def test_in_backward_what_is_selected_away_is_no_fault() -> None:
    def safe(model: nn.Module, x: Tensor) -> Tensor:
        y = model(x)
        return torch.where(y > 0, torch.where(y > 0, y, torch.ones_like(y)).sqrt(), torch.zeros_like(y)).mean()

    def trap(model: nn.Module, x: Tensor) -> Tensor:
        y = model(x)
        return torch.where(y > 0, y.sqrt(), torch.zeros_like(y)).mean()  # its slope is 0 times infinity

    model = Scaled(nn.Identity())
    assert culprit(Suspect(model, safe, rows([3], 0.0))) is None
    found = culprit(Suspect(model, trap, rows([3], 0.0)))
    assert found is not None
    assert (found.where, found.what, found.rows) == ("backward", "SqrtBackward0", [3])


def test_only_the_gradients_that_are_asked_for_matter() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.good, self.bad = nn.Parameter(torch.ones(3)), nn.Parameter(torch.zeros(3))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.good + self.bad.sqrt()

    assert culprit(Suspect(Two(), mean, rows([], 0.0), wanted=frozenset({"good"}))) is None
    found = culprit(Suspect(Two(), mean, rows([], 0.0)))
    assert found is not None
    assert (found.what, found.rows) == ("SqrtBackward0", [0])


def test_no_line_of_the_callers_is_named() -> None:
    """What goes wrong in a loss of torch's that the user only names has no line of the user's."""
    found = culprit(Suspect(nn.Linear(3, 1), supervised(nn.MSELoss()), (rows([], 0.0) * 1e30, torch.zeros(16, 1))))
    assert found is not None
    assert (found.what, found.place) == ("mse_loss()", None)


def test_seeds_by_term_and_a_vector() -> None:
    def two(model: nn.Module, x: Tensor) -> dict[str, Any]:
        y = model(x)
        return {"a": Cotangents(y, torch.full_like(y, 1e30)), "b": y.mean().sqrt() * 0.0}

    model = Scaled(nn.Identity())
    assert culprit(Suspect(model, two, rows([], 0.0), seeds={"a": 1.0, "b": 1.0})) is None
    found = culprit(Suspect(model, two, rows([], 0.0), seeds={"a": 1e10}))
    assert found is not None
    assert found.where == "backward"
    assert culprit(Suspect(model, lambda m, x: m(x - x).mean().sqrt(), rows([], 0.0), seeds={})) is None


def test_the_rows_where_the_forward_draws() -> None:
    """Each row keeps its place, and with it what is drawn for it."""

    class Drops(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.drop = nn.Parameter(torch.ones(1)), nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            return torch.log(self.drop(x[:, 0] * self.w) + x[:, 1])

    x = torch.ones(16, 2)
    risky = [1, 4, 6, 7, 9, 10, 11, 14]
    x[risky, 1] = 0.0  # the logarithm of 0 where the row is dropped
    named = set()
    for seed in range(6):
        torch.manual_seed(seed)
        state = rng.capture()
        dropped = (nn.functional.dropout(torch.ones(16), 0.5) == 0).nonzero().flatten().tolist()
        found = culprit(Suspect(Drops(), mean, x, state=state))
        assert found is not None
        assert found.rows is not None
        assert len(found.rows) == 1
        assert found.rows[0] in set(dropped) & set(risky)
        named.add(found.rows[0])
    assert len(named) > 1
