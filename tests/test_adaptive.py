"""Adaptive clipping against the paper's formula, written out unit by unit."""

import pytest
import torch
from torch import Tensor, nn

from trainer import GradientError
from trainer.gradient.adaptive import SMALLEST, clip_adaptive, unit_norms

SHAPES = {"linear": (4, 3), "conv": (5, 2, 3, 3), "bias": (6,), "one_output": (1, 7), "scalar": (), "thin": (4, 1)}


def drawn(dtype: torch.dtype = torch.float64, scale: float = 1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {n: (scale * torch.randn(s, generator=generator, dtype=torch.float64)).to(dtype) for n, s in SHAPES.items()}


def units(tensor: Tensor) -> list[Tensor]:
    """Rows of the first dimension where more than one dimension is longer than 1; else the whole."""
    return [tensor] if sum(size > 1 for size in tensor.shape) <= 1 else list(tensor)


def by_hand(gradient: Tensor, parameter: Tensor, largest: float) -> Tensor:
    found = []
    for own, held in zip(units(gradient), units(parameter), strict=True):
        limit = largest * max(held.norm().item(), SMALLEST)
        found.append(own * (limit / own.norm()) if own.norm() > limit else own)
    return torch.stack(found).reshape(gradient.shape)


@pytest.mark.parametrize("largest", [1e-4, 1e-2, 0.3, 1.0, 10.0])
def test_each_unit_is_clipped_to_its_own_parameters_and_a_second_time_changes_nothing(largest: float) -> None:
    parameters = {name: value.flip(0) if value.dim() else value * 0.3 for name, value in drawn(scale=0.7).items()}
    parameters["linear"][0] = 0.0  # counts as the smallest norm
    gradients = drawn()
    clip_adaptive(gradients, parameters, largest)
    for name, before in drawn().items():
        torch.testing.assert_close(gradients[name], by_hand(before, parameters[name], largest), rtol=1e-12, atol=0)
        for own, held in zip(units(gradients[name]), units(parameters[name]), strict=True):
            assert own.norm() <= largest * max(held.norm().item(), SMALLEST) * (1 + 1e-12)
    again = {name: value.clone() for name, value in gradients.items()}
    clip_adaptive(again, parameters, largest)
    for name, value in again.items():
        torch.testing.assert_close(value, gradients[name], rtol=1e-12, atol=0)


def test_below_the_ratio_nothing_changes_bit_for_bit_and_a_unit_without_gradient_stays_zero() -> None:
    parameters, gradients = drawn(), drawn(scale=1e-3)
    gradients["linear"][1] = 0.0
    before = {name: value.clone() for name, value in gradients.items()}
    clip_adaptive(gradients, parameters, 0.5)
    assert all(torch.equal(value, before[name]) for name, value in gradients.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_gradients_stay_narrow_and_their_norms_are_wide(dtype: torch.dtype) -> None:
    parameters, gradients = drawn(dtype), drawn(dtype, scale=100.0)
    clip_adaptive(gradients, parameters, 0.01)
    for name, value in gradients.items():
        assert value.dtype is dtype and unit_norms(value).dtype is torch.float32
        expected = by_hand(drawn(dtype, scale=100.0)[name].double(), parameters[name].double(), 0.01)
        torch.testing.assert_close(value.double(), expected, rtol=4 * torch.finfo(dtype).eps, atol=1e-6)


def test_complex_and_sparse_gradients_are_clipped_by_unit_as_well() -> None:
    turn = torch.randn(4, 3, dtype=torch.complex128)
    gradient = torch.randn(4, 3, dtype=torch.complex128)
    expected = by_hand(gradient, turn, 0.1)
    vector, of_vector = torch.randn(3, dtype=torch.complex128), torch.randn(3, dtype=torch.complex128)
    expected_vector = by_hand(vector, of_vector, 0.1)
    table = torch.randn(6, 3, dtype=torch.float64)
    dense = torch.zeros(6, 3, dtype=torch.float64)
    dense[[1, 4]] = torch.randn(2, 3, dtype=torch.float64)
    sparse = dense.to_sparse(1)
    sparse = torch.sparse_coo_tensor(sparse.indices(), sparse.values(), (6, 3), check_invariants=True).coalesce()
    line = torch.sparse_coo_tensor([[0, 2]], torch.tensor([3.0, 4.0]), (5,), check_invariants=True).coalesce()
    clip_adaptive(
        {"turn": gradient, "vector": vector, "table": sparse, "line": line},
        {"turn": turn, "vector": of_vector, "table": table, "line": torch.full((5,), 2.0)},
        0.1,
    )
    torch.testing.assert_close(gradient, expected)
    torch.testing.assert_close(vector, expected_vector)
    torch.testing.assert_close(sparse.to_dense(), by_hand(dense, table, 0.1))
    assert line.is_coalesced() and line.values().norm().item() == pytest.approx(0.1 * 20**0.5)


def test_a_gradient_sparse_in_other_dimensions_gets_a_sentence_and_one_of_nothing_none() -> None:
    sparse = torch.ones(3, 3).to_sparse().coalesce()
    with pytest.raises(GradientError, match="gradient of 'w' is sparse in other dimensions than its first"):
        clip_adaptive({"w": sparse}, {"w": torch.ones(3, 3)}, 0.1)
    clip_adaptive({"w": torch.zeros(0, 3), "v": torch.zeros(0)}, {"w": torch.zeros(0, 3), "v": torch.zeros(0)}, 0.1)
    clip_adaptive({}, {}, 0.1)


def test_parameters_need_no_copy_and_are_left_alone() -> None:
    layer = nn.Linear(3, 2)
    before = layer.weight.detach().clone()
    clip_adaptive({"weight": torch.ones(2, 3)}, {"weight": layer.weight}, 0.01)
    assert torch.equal(before, layer.weight) and layer.weight.requires_grad
