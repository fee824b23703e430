"""What autograd raises inside a step, as a sentence: each mistake as a beginner would write it, and the line of it."""

import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer import GradientError, ObjectiveError, Step, TrainerError
from trainer.diagnose.mistakes import Forward, explain, explained
from trainer.optim import Manual, sgd

ROWS = torch.ones(3, 2)


def line_of(code: Any) -> str:
    """`file:line` of the line in a function or class that says HERE."""
    lines, first = inspect.getsourcelines(code)
    return f"test_mistakes.py:{first + next(index for index, line in enumerate(lines) if '# HERE' in line)}"


def sentence(model: Any, objective: Callable[..., Any], windows: int = 1) -> TrainerError:
    """What the last of so many steps says."""
    parameters = list(model.parameters()) if isinstance(model, nn.Module) else [model.w]
    step = Step(model, objective, Manual(parameters))
    for _ in range(windows - 1):
        step([ROWS])
    with pytest.raises(TrainerError) as found:
        step([ROWS])
    assert step._open is None
    return found.value


# A loss that is not connected.


def detached(model: nn.Module, x: Tensor) -> Tensor:
    hidden = model(x)
    hidden = hidden.detach()  # HERE
    return hidden.square().mean()


def through_data(model: nn.Module, x: Tensor) -> Tensor:
    out = model(x).data  # HERE
    return (out * 2).mean()


def hard_choice(model: nn.Module, x: Tensor) -> Tensor:
    chosen = model(x).argmax(dim=1)  # HERE
    return chosen.float().mean()


def compared(model: nn.Module, x: Tensor) -> Tensor:
    right = model(x) > 0  # HERE
    return right.float().mean()


def switched_off(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        out = model(x)  # HERE
    return out.mean()


def by_comprehension(model: nn.Module, x: Tensor) -> Tensor:
    return torch.stack([model(row).detach() for row in x]).mean()  # HERE


def into_whole_numbers(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).to(torch.int64).double().mean()  # HERE


@pytest.mark.parametrize(
    ("objective", "reason"),
    [
        (detached, r"cut by detach\(\)"),
        (through_data, r"cut by data\(\)"),
        (hard_choice, r"cut by argmax\(\).*whole numbers, which have no gradient"),
        (compared, r"cut by .*bool, which have no gradient"),
        (switched_off, r"cut by linear\(\).*switched off there \(no_grad\)"),
        (by_comprehension, r"cut by detach\(\)"),
        (into_whole_numbers, r"cut by to\(\).*whole numbers"),
    ],
)
def test_a_loss_that_was_cut_off_names_the_operation_and_its_line(objective, reason) -> None:
    error = sentence(nn.Linear(2, 1), objective)
    assert isinstance(error, ObjectiveError)
    assert line_of(objective) in str(error)
    assert re.search(reason, str(error)), str(error)


def test_a_frozen_trunk_is_not_what_is_blamed() -> None:
    class Headed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.head = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            features = self.trunk(x).detach()
            return self.head(features).argmax(1)  # HERE

    error = sentence(Headed(), lambda model, x: model(x).float().mean())
    assert line_of(Headed) in str(error)
    assert "argmax()" in str(error)


def test_a_cut_inside_a_function_of_ones_own() -> None:
    class Halved(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            twice = x * 2
            return twice / 4

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient / 2

    def objective(model: nn.Module, x: Tensor) -> Tensor:
        out = Halved.apply(model(x))
        return out.detach().mean()  # HERE

    assert line_of(objective) in str(sentence(nn.Linear(2, 1), objective))


def test_a_value_that_left_torch() -> None:
    def objective(model: nn.Module, x: Tensor) -> Tensor:
        loss = model(x).square().mean().item()  # HERE
        return torch.tensor(loss)

    error = sentence(nn.Linear(2, 1), objective)
    assert "left torch as a number by item()" in str(error)
    assert line_of(objective) in str(error)


def test_where_two_values_left_torch_both_are_said() -> None:
    def objective(model: nn.Module, x: Tensor) -> Tensor:
        seen = model(x).sum().item()
        return torch.tensor(model(x).square().mean().item() + 0 * seen)  # HERE

    error = str(sentence(nn.Linear(2, 1), objective))
    assert "(`seen = model(x).sum().item()`) or by item()" in error
    assert line_of(objective) in error


def test_a_loss_that_no_parameter_is_in_says_what_it_is_made_of() -> None:
    def objective(model: nn.Module, x: Tensor) -> Tensor:
        w = torch.tensor([3.0])  # HERE
        return (w * x).mean()

    error = sentence(nn.Linear(2, 1), objective)
    assert "no parameter that requires a gradient took part" in str(error)
    assert line_of(objective) in str(error)


def test_parameters_that_do_not_require_a_gradient_are_named_with_where_they_are_made() -> None:
    class Forgetful:
        def __init__(self) -> None:
            self.size = 2
            self.w = torch.ones(self.size, 1)  # HERE

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.w

    model = Forgetful()
    step = Step(model, lambda m, x: m.forward(x).mean(), Manual([model.w]))
    with pytest.raises(ObjectiveError) as found:
        step([ROWS])
    said = str(found.value)
    assert re.search(r"no parameter requires a gradient \(w\); 'w' is made in .*requires_grad=True", said), said
    assert line_of(Forgetful) in said


def test_a_step_under_no_grad() -> None:
    step = Step(nn.Linear(2, 1), lambda m, x: m(x).mean(), Manual(nn.Linear(2, 1).parameters()))
    with torch.no_grad(), pytest.raises(ObjectiveError, match="gradients are switched off here"):
        step([ROWS])


# Changes in place.


class Plain:
    def __init__(self) -> None:
        self.w = torch.ones(2, 1, requires_grad=True)


def test_a_parameter_changed_in_place() -> None:
    def objective(model: Plain, x: Tensor) -> Tensor:
        model.w += 1  # HERE
        return (x @ model.w).mean()

    error = sentence(Plain(), objective)
    assert "the parameter 'w' is changed in place while autograd records" in str(error)
    assert line_of(objective) in str(error)
    assert "leaf Variable" in str(error.__cause__)


def test_a_view_of_a_parameter_changed_in_place() -> None:
    def objective(model: nn.Linear, x: Tensor) -> Tensor:
        model.weight[0, 0] = 0.5  # HERE
        return model(x).mean()

    error = sentence(nn.Linear(2, 1), objective)
    assert "the parameter 'weight' is changed in place" in str(error)
    assert line_of(objective) in str(error)


class Squashed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.sigmoid(self.line(x))  # saved by sigmoid
        out = hidden * 2
        hidden += 1  # HERE
        return out + hidden


def test_a_saved_tensor_changed_in_place_names_both_lines() -> None:
    error = sentence(Squashed(), lambda model, x: model(x).mean())
    assert isinstance(error, GradientError)
    assert "sigmoid()" in str(error)
    assert "saved by sigmoid" in str(error)
    assert f"changed in place since, by add_() in tests/{line_of(Squashed)}" in str(error)
    assert "modified by an inplace operation" in str(error.__cause__)


def test_a_weight_changed_in_place_under_no_grad_is_named() -> None:
    class Decayed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            out = self.second(self.first(x))
            with torch.no_grad():
                self.second.weight.mul_(0.9)  # HERE
            return out

    error = sentence(Decayed(), lambda model, x: model(x).mean())
    assert "the parameter 'second.weight'" in str(error)
    assert line_of(Decayed) in str(error)


def test_what_a_function_of_ones_own_saved_changed_in_place() -> None:
    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
            ctx.save_for_backward(a, b)
            return a * b

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
            a, b = ctx.saved_tensors
            return gradient * b, gradient * a

    def objective(model: nn.Module, x: Tensor) -> Tensor:
        scale = torch.full((3, 1), 2.0)
        out = Product.apply(model(x), scale)
        scale.zero_()  # HERE
        return out.mean()

    error = sentence(nn.Linear(2, 1), objective)
    assert f"by zero_() in tests/{line_of(objective)}" in str(error)


def test_a_change_that_came_before_the_save_is_not_blamed() -> None:
    def objective(model: nn.Module, x: Tensor) -> Tensor:
        hidden = model(x)
        hidden += 1  # harmless
        out = hidden.exp()
        out.mul_(2)  # HERE
        return out.mean()

    error = sentence(nn.Linear(2, 1), objective)
    assert line_of(objective) in str(error)
    assert "harmless" not in str(error)


# A graph that was walked already.


@pytest.mark.parametrize("keep", [False, True])
def test_a_backward_in_the_objective(keep: bool) -> None:
    def objective(model: nn.Module, x: Tensor) -> Tensor:
        loss = model(x).square().mean()
        loss.backward(retain_graph=keep)  # HERE
        return loss

    error = sentence(nn.Linear(2, 1), objective)
    assert "leave backward to the step" in str(error)
    assert "retain_graph" in str(error)
    assert line_of(objective) in str(error)


class Recurrent(nn.Module):
    """Carries its hidden state over without detaching it."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.RNNCell(2, 2)
        self.hidden: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.hidden = self.cell(x, self.hidden)  # HERE
        return self.hidden


def test_a_state_carried_over_is_named() -> None:
    error = sentence(Recurrent(), lambda model, x: model(x).mean(), windows=2)
    assert "the old 'model.hidden' goes into" in str(error)
    assert line_of(Recurrent) in str(error)
    assert "detach()" in str(error)


def test_a_sum_carried_over_in_a_closure_is_named() -> None:
    total: list[Any] = [0.0]

    def objective(model: nn.Module, x: Tensor) -> Tensor:
        total[0] = total[0] + model(x).square().mean()  # HERE
        return total[0]

    error = sentence(nn.Linear(2, 1), objective, windows=2)
    assert "the old 'total[0]' goes" in str(error)
    assert line_of(objective) in str(error)


def test_a_list_that_grows_with_every_forward_is_carried_over_too() -> None:
    total: list[Any] = []

    def objective(model: nn.Module, x: Tensor) -> Tensor:
        total.append(model(x).square().mean() + (total[-1] if total else 0))  # HERE
        return total[-1]

    error = sentence(nn.Linear(2, 1), objective, windows=2)
    assert "the old 'total[1]' goes" in str(error) and line_of(objective) in str(error)


# What was made under inference mode, and what is not ours to explain.


class Caching(nn.Module):
    """Keeps a table from its first forward, as models with positions do."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(2, 2)
        self.table: Tensor | None = None

    def forward(self, inputs: Tensor) -> Tensor:
        if self.table is None:
            self.table = torch.ones(2) * 2
        return self.line(inputs) * self.table


@pytest.mark.parametrize("nested", [False, True])
def test_a_cached_inference_tensor_is_named(nested: bool) -> None:
    model = nn.Sequential(nn.Linear(2, 2), Caching()) if nested else Caching()
    with torch.inference_mode():
        model(ROWS)
    step = Step(model, lambda m, x: m(x).mean(), Manual(model.parameters()))
    name = "'1.table'" if nested else "'table'"
    with pytest.raises(
        GradientError, match=f"^{name} keeps a tensor that was made under inference mode.*no_grad"
    ) as found:
        step([ROWS])
    assert "Inference tensors cannot be saved" in str(found.value.__cause__)
    (model[1] if nested else model).table = None
    assert not step([ROWS]).skipped


def test_an_inference_tensor_that_nobody_known_holds() -> None:
    with torch.inference_mode():
        hidden = [torch.ones(2)]
    model = nn.Linear(2, 2)
    step = Step(model, lambda m, x: (m(x) * hidden[0]).sum(), Manual(model.parameters()))
    with pytest.raises(GradientError, match="^something in the model or the objective keeps a tensor"):
        step([ROWS])


def test_an_error_of_the_users_own_stays_what_it_is() -> None:
    forward = Forward(None, lambda m, x: x, ROWS, {})
    error = RuntimeError("mine")
    assert explained(error, forward) is error
    explain(error, forward)
    model = nn.Linear(2, 1)
    with pytest.raises(RuntimeError, match="mat1 and mat2") as found:
        Step(model, lambda m, x: m(x).mean(), Manual(model.parameters()))([torch.ones(3, 5)])
    assert found.value.__cause__ is None


def test_an_error_in_backward_keeps_its_own_class() -> None:
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, value: Tensor) -> Tensor:
            return value.clone()

        @staticmethod
        def backward(ctx: object, gradient: Tensor) -> Tensor:
            raise LookupError("mine")

    model = nn.Linear(2, 1)
    step = Step(model, lambda m, x: Broken.apply(m(x)).mean(), Manual(model.parameters()))
    with pytest.raises(LookupError, match="mine"):
        step([ROWS])
    assert step._open is None


def test_nothing_is_left_behind_by_the_second_run() -> None:
    """Parameters, buffers and generators are as they were, so that a run which catches the error can go on."""
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout(0.5))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    step = Step(model, lambda m, x: m(x).detach().mean(), sgd(model.parameters(), lr=0.1))
    torch.manual_seed(0)
    F.dropout(torch.ones(3, 2))
    expected = torch.rand(2)
    torch.manual_seed(0)
    with pytest.raises(ObjectiveError):
        step([ROWS])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.rand(2), expected)


def test_a_gradient_that_something_else_wrote_during_forward() -> None:
    def objective(model: nn.Module, x: Tensor) -> Tensor:
        model.weight.grad = torch.ones_like(model.weight)
        return model(x).square().mean()

    assert "the gradient of 'weight' was written during forward" in str(sentence(nn.Linear(2, 1), objective))
