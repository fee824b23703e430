"""The update by hand: what the tutorial's line gives, bit for bit, and an Optimizer to everything else."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from trainer.errors import ConfigError
from trainer.optim import Manual, linear
from trainer.optim.update import Update
from trainer.step import Step


class ManualLinear:
    """The tutorial's: no nn.Module, two leaf tensors."""

    def __init__(self) -> None:
        self.weight = torch.full((2, 1), 0.3, requires_grad=True)
        self.bias = torch.zeros(1, requires_grad=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight + self.bias


def random_leaves(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    leaves = []
    for shape in [(37, 29), (1001,), ()]:
        leaf = torch.randn(shape, generator=generator).to(dtype).requires_grad_()
        leaf.grad = torch.randn(shape, generator=generator).to(dtype)
        leaves.append(leaf)
    return leaves


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("lr", [0.0137, 0.1, 3.0])
def test_it_is_the_line_of_the_tutorial_bit_for_bit(dtype: torch.dtype, lr: float) -> None:
    mine, theirs = random_leaves(dtype), random_leaves(dtype)
    optimizer = Manual(mine, lr=lr)
    for _ in range(5):
        optimizer.step()
        with torch.no_grad():
            for leaf in theirs:
                leaf -= lr * leaf.grad
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    assert all(leaf.is_leaf and leaf.requires_grad and leaf.grad_fn is None for leaf in mine)
    assert not optimizer.state


def test_through_step_it_is_the_line_of_the_tutorial() -> None:
    x = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    y = torch.tensor([[0.0], [1.0], [1.0], [0.0]])
    mine, theirs = ManualLinear(), ManualLinear()
    step = Step(mine, lambda m, b: (m.forward(b[0]) - b[1]).square().mean(), Manual([mine.weight, mine.bias], lr=0.01))
    for _ in range(50):
        step([(x, y)])
        (theirs.forward(x) - y).square().mean().backward()
        with torch.no_grad():
            for leaf in (theirs.weight, theirs.bias):
                leaf -= 0.01 * leaf.grad
                leaf.grad = None
    assert torch.equal(mine.weight, theirs.weight)
    assert torch.equal(mine.bias, theirs.bias)


def test_a_factor_multiplies_the_gradient_where_it_lies() -> None:
    """As torch's fused kernels do it: `.grad` is then what the parameters moved by."""
    mine, theirs = random_leaves(), random_leaves()
    Update(Manual(mine, lr=0.5)).apply(0.25)
    with torch.no_grad():
        for leaf in theirs:
            leaf.grad *= 0.25
            leaf -= 0.5 * leaf.grad
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(mine, theirs, strict=True))


def test_a_leaf_without_gradient_stays() -> None:
    leaves = random_leaves()
    leaves[1].grad = None
    before = [leaf.detach().clone() for leaf in leaves]
    Manual(leaves, lr=0.1).step()
    assert [torch.equal(a, b) for a, b in zip(leaves, before, strict=True)] == [False, True, False]
    Manual([torch.ones(2, requires_grad=True)]).step()


def test_complex_and_mixed_leaves() -> None:
    leaves = [
        torch.ones(3, dtype=torch.complex64, requires_grad=True),
        torch.ones(2, dtype=torch.float64, requires_grad=True),
    ]
    leaves[0].grad = torch.full((3,), 1 + 2j)
    leaves[1].grad = torch.full((2,), 3.0, dtype=torch.float64)
    Manual(leaves, lr=0.5).step()
    assert leaves[0].tolist() == [0.5 - 1j] * 3
    assert leaves[1].tolist() == [-0.5, -0.5]


def test_it_is_an_optimizer_with_groups_and_a_closure() -> None:
    leaves = random_leaves()
    optimizer = Manual([{"params": leaves[:1]}, {"params": leaves[1:], "lr": 0.3}], lr=0.1)
    assert isinstance(optimizer, Optimizer)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.3]
    theirs = random_leaves()

    def closure() -> Any:
        assert torch.is_grad_enabled()
        return 7.0

    assert optimizer.step(closure) == 7.0
    with torch.no_grad():
        for leaf, lr in zip(theirs, (0.1, 0.3, 0.3), strict=True):
            leaf -= lr * leaf.grad
    assert all(torch.equal(a, b) for a, b in zip(leaves, theirs, strict=True))
    optimizer.zero_grad()
    assert all(leaf.grad is None for leaf in leaves)


def test_schedules_and_saved_states_treat_it_as_any_other() -> None:
    model = nn.Linear(2, 1)
    optimizer = Manual(model.parameters(), lr=0.4)
    step = Step(model, lambda m, b: m(b).square().mean(), optimizer, schedule=linear(total=4))
    rates = [step([torch.ones(1, 2)]).lr for _ in range(5)]
    assert rates == pytest.approx([0.4, 0.3, 0.2, 0.1, 0.0])
    other = Manual(model.parameters(), lr=9.0)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert other.param_groups[0]["initial_lr"] == 0.4
    scheduler = torch.optim.lr_scheduler.StepLR(Manual(model.parameters(), lr=0.4), 1, gamma=0.5)
    ticking = Step(model, lambda m, b: m(b).square().mean(), scheduler.optimizer, schedule=scheduler)
    assert [ticking([torch.ones(1, 2)]).lr for _ in range(3)] == pytest.approx([0.4, 0.2, 0.1])


@pytest.mark.parametrize("lr", [-0.1, float("nan")])
def test_a_rate_that_is_not_possible(lr: float) -> None:
    with pytest.raises(ConfigError, match=r"Manual: lr=.* is not possible: it must be zero or more\."):
        Manual([torch.ones(1, requires_grad=True)], lr=lr)


def test_an_option_that_it_does_not_have() -> None:
    leaf = torch.ones(1, requires_grad=True)
    with pytest.raises(ConfigError, match=r"Manual has no option 'weight_decay': choose one of: lr\."):
        Manual([{"params": [leaf], "weight_decay": 0.1}])
