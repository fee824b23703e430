"""Zeroing: what stands in `.grad` before, during and after a window."""

import pytest
import torch
from torch import Tensor

from trainer.gradient.zeroing import add, add_back, can_put_back, put_back, zero


def pair() -> tuple[Tensor, Tensor]:
    used, unused = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    used.grad = torch.tensor([1.0, 2.0])
    return used, unused


def test_set_to_none_lets_go_of_the_tensor() -> None:
    used, unused = pair()
    assert zero([used, unused], "set_to_none") == []
    assert used.grad is unused.grad is None


def test_zeros_keeps_the_tensor_and_cuts_its_graph() -> None:
    used, unused = pair()
    used.grad = standing = used.grad * used
    assert zero([used, unused], "zeros") == []
    assert used.grad is standing
    assert not standing.requires_grad
    assert standing.tolist() == [0, 0]
    assert unused.grad is None


def test_never_sets_aside_and_adds_back_without_touching_what_stood() -> None:
    used, unused = pair()
    standing = used.grad
    aside = zero([used, unused], "never")
    assert used.grad is None
    used.grad, unused.grad = torch.tensor([10.0, 20.0]), torch.tensor([5.0, 5.0])
    add_back(aside)
    assert (used.grad.tolist(), unused.grad.tolist()) == ([11, 22], [5, 5])
    assert standing.tolist() == [1, 2]
    put_back(aside)
    assert used.grad is standing
    assert unused.grad is None


@pytest.mark.parametrize("flag", [0.0, 1.0])
def test_a_flag_chooses_without_being_read(flag: float) -> None:
    used, unused = pair()
    aside = zero([used, unused], "never")
    used.grad = torch.tensor([7.0, float("nan")])
    assert can_put_back(aside)
    put_back(aside, torch.tensor(flag))
    assert (used.grad.tolist() == [1, 2]) == (flag == 1.0)
    unused.grad = torch.ones(2)
    assert not can_put_back(aside)  # None is no tensor that a flag could choose


def test_dense_and_sparse_add_in_both_orders() -> None:
    dense = torch.tensor([1.0, 2.0, 3.0])
    sparse = torch.sparse_coo_tensor([[1]], [10.0], (3,), check_invariants=True)
    for left, right in ((dense, sparse), (sparse, dense)):
        assert add(left, right).tolist() == [1, 12, 3]
    assert add(sparse, sparse).to_dense().tolist() == [0, 20, 0]
