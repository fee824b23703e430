"""Terms held apart: each is divided by its own weight when the window ends."""

import pytest
import torch
from torch import Tensor, nn

from trainer import Step, Sum
from trainer.gradient.apart import add_apart, backward_apart
from trainer.optim import Manual


def test_gradients_add_up_apart_and_the_graph_stays() -> None:
    w = torch.tensor([1.0, 2.0], requires_grad=True)
    unused = torch.ones(1, requires_grad=True)
    frozen = torch.ones(1)
    parameters = {"w": w, "unused": unused, "frozen": frozen}
    held: dict[str, Tensor] = {}
    value = (w * w).sum()
    for _ in range(2):
        backward_apart(value, torch.tensor(0.5), parameters, held)
    assert {name: gradient.tolist() for name, gradient in held.items()} == {"w": [2, 4]}
    assert w.grad is None
    add_apart(held, 4.0, parameters)
    add_apart(held, 2.0, parameters)
    assert w.grad.tolist() == [1.5, 3.0]
    assert held["w"].tolist() == [2, 4]


def test_parameters_that_share_a_gradient_do_not_share_its_memory() -> None:
    a, b = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    held: dict[str, Tensor] = {}
    backward_apart((a + b).sum(), torch.tensor(1.0), {"a": a, "b": b}, held)
    add_apart(held, 1.0, {"a": a, "b": b})
    a.grad.mul_(5)
    assert b.grad.tolist() == [1, 1]


@pytest.mark.parametrize("zero_grad", ["set_to_none", "zeros", "never"])
def test_a_sparse_and_a_dense_term_meet(zero_grad: str) -> None:
    found = []
    for sparse in (False, True):
        torch.manual_seed(0)
        model = nn.Embedding(4, 2, sparse=sparse)

        def objective(m: nn.Embedding, rows: Tensor, sparse: bool = sparse) -> dict[str, Sum]:
            looked_up = nn.functional.embedding(rows, m.weight, sparse=sparse)
            return {"look": Sum(looked_up.square().sum(), len(rows)), "all": Sum(m.weight.square().sum(), 3)}

        step = Step(model, objective, Manual(model.parameters(), lr=0.1), zero_grad=zero_grad, clip_norm=2.0)
        for _ in range(3):
            assert not step([torch.tensor([0, 1]), torch.tensor([1])]).skipped
        found.append(model.weight.detach())
    torch.testing.assert_close(found[0], found[1])


def test_a_non_finite_gradient_of_a_term_that_is_held_apart_is_a_skip() -> None:
    model = nn.Linear(1, 1, bias=False)
    before = model.weight.detach().clone()

    def objective(m: nn.Linear, x: Tensor) -> dict[str, Sum]:
        root = (m.weight - m.weight.detach()).square().sum().sqrt()  # 0, with an infinite slope
        return {"a": Sum(m(x).sum(), 2.0), "b": Sum(root, 3.0)}

    report = Step(model, objective, Manual(model.parameters()))([torch.ones(2, 1)])
    assert report.reason == "the gradient of weight is not finite, while the loss is"
    assert torch.equal(before, model.weight)
