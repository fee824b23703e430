"""The wiring of parameters, optimizers and gradients: each fault is named, and what is well raises nothing."""

import copy
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trainer import Step
from trainer.diagnose.audit import FirstStep, not_moved, wiring
from trainer.diagnose.words import listed
from trainer.gradient.parameters import named_for
from trainer.optim import Manual, adamw, sgd

ROWS = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))


def line_of(code: Any) -> str:
    lines, first = inspect.getsourcelines(code)
    return f"test_audit.py:{first + next(index for index, line in enumerate(lines) if '# HERE' in line)}"


def mean_square(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def first_step(model: Any, optimizer: Any, objective: Any = mean_square, rows: Tensor = ROWS) -> list[str]:
    found: list[str] = []
    over: list[bool] = []
    FirstStep(Step(model, objective, optimizer), found.append, lambda: over.append(True))([rows])
    assert over == [True]
    return found


# At the start.


def test_a_sound_wiring_says_nothing() -> None:
    model = net()
    for optimizer in (sgd(model.parameters(), lr=0.1), adamw(model.parameters())):
        assert wiring(model, named_for(model, [optimizer])) == []
        assert first_step(model, optimizer) == []


def test_an_optimizer_built_on_a_copy() -> None:
    model = net()
    said = wiring(model, named_for(model, [sgd(copy.deepcopy(model).parameters(), lr=0.1)]))
    assert len(said) == 1
    assert "none of the optimizer's parameters is the model's" in said[0]


def test_parameters_that_no_optimizer_has() -> None:
    model = net()
    (said,) = wiring(model, named_for(model, [sgd(model[2].parameters(), lr=0.1)]))
    assert said == "in the model but in no optimizer, so not trained: '0.weight', '0.bias'."
    model[0].requires_grad_(False)  # then it is meant
    assert wiring(model, named_for(model, [sgd(model[2].parameters(), lr=0.1)])) == []


def test_frozen_parameters_in_the_optimizer() -> None:
    model = net()
    model[0].weight.requires_grad_(False)
    (said,) = wiring(model, named_for(model, [sgd(model.parameters(), lr=0.1)]))
    assert said == "in the optimizer but with requires_grad off, so not trained: '0.weight'."


# In the first step.


class Branches(nn.Module):
    """Every way to lose a gradient, and one way to keep it."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.never, self.aside, self.head = (nn.Linear(3, 3) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        features = [self.trunk(row).detach() for row in x]  # HERE
        self.aside(x)
        return self.head(torch.stack(features))


def test_each_parameter_without_a_gradient_is_named_with_the_reason() -> None:
    model = Branches()
    cut, unused, unread = first_step(model, sgd(model.parameters(), lr=0.1))
    assert "'trunk.weight', 'trunk.bias': the graph was cut by detach()" in cut
    assert line_of(Branches) in cut
    assert "'never.weight', 'never.bias': no operation of the forward used it" in unused
    assert "'aside.weight', 'aside.bias': what was made of it does not reach the loss" in unread
    assert "self.aside(x)" in unread


def test_a_function_whose_backward_gives_none() -> None:
    class OneSided(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
            return a + b

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
            return gradient, None

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return OneSided.apply(self.a(x), self.b(x))

    model = Two()
    (said,) = first_step(model, sgd(model.parameters(), lr=0.1))
    assert "'b.weight', 'b.bias'" in said
    assert "backward of OneSided gave none" in said


def test_a_branch_that_is_not_always_taken() -> None:
    class Alternating(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ways = nn.ModuleList([nn.Linear(3, 1), nn.Linear(3, 1)])
            self.turn = 1

        def forward(self, x: Tensor) -> Tensor:
            self.turn = 1 - self.turn
            return self.ways[self.turn](x)

    model = Alternating()
    (said,) = first_step(model, sgd(model.parameters(), lr=0.1))
    assert said == "no gradient reached 'ways.1.weight', 'ways.1.bias': this forward does not always use it."


@pytest.mark.parametrize(("dtype", "lr"), [(torch.float32, 1e-12), (torch.bfloat16, 1e-6)])
def test_a_step_that_is_lost_in_rounding(dtype: torch.dtype, lr: float) -> None:
    model = net().to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    (said,) = first_step(model, sgd(model.parameters(), lr=lr), rows=ROWS.to(dtype))
    assert said.startswith("the first step did not move '0.weight'")
    assert "lost in rounding" in said


def test_a_low_precision_step_that_is_mostly_lost() -> None:
    before = {"w": torch.ones(100, dtype=torch.bfloat16)}
    parameter = torch.ones(100, dtype=torch.bfloat16, requires_grad=True)
    parameter.grad = torch.ones_like(parameter)
    with torch.no_grad():
        parameter[:5] += 1
    (said,) = not_moved(before, {"w": parameter}, lr=0.1)
    assert "moved less than a tenth of the elements of 'w': in torch.bfloat16" in said
    with torch.no_grad():
        parameter[:20] += 1
    assert not_moved(before, {"w": parameter}, lr=0.1) == []


def test_a_learning_rate_of_zero_is_taken_as_meant() -> None:
    model = net()
    assert first_step(model, Manual(model.parameters(), lr=0.0)) == []


def test_it_waits_for_a_step_that_is_taken() -> None:
    model, found, over = net(), [], []
    step = Step(model, mean_square, sgd(model.parameters(), lr=0.1))
    first = FirstStep(step, found.append, lambda: over.append(True))
    assert first([torch.full((2, 3), float("nan"))]).skipped
    assert over == []
    first([ROWS])
    assert over == [True]
    assert found == []


def test_long_lists_are_cut() -> None:
    assert listed("abc") == "'a', 'b', 'c'"
    assert listed("abcdef") == "'a', 'b', 'c', 'd' and 2 more"
