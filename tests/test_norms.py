"""Norms, the finite check and clipping."""

import math

import pytest
import torch
from reference import mlp, rows
from torch import Tensor, nn

from trainer import Step, supervised
from trainer.gradient import norms
from trainer.optim import Manual

MIXED = [
    torch.tensor([3.0, 4.0]),
    torch.tensor([12.0], dtype=torch.float64),
    torch.tensor([84.0], dtype=torch.bfloat16),
    torch.tensor([0.0 + 132.0j]),
    torch.sparse_coo_tensor([[0, 0, 3]], [200.0, 276.0, 0.0], (5,), check_invariants=True),
]
TRUE = math.sqrt(25 + 144 + 84**2 + 132**2 + 476**2)


def test_the_norm_of_mixed_gradients() -> None:
    assert norms.norm(MIXED) == pytest.approx(TRUE, rel=1e-7)
    assert norms.norm([]) == 0.0


def test_norms_of_every_kind_of_tensor_by_its_name() -> None:
    tensors = {
        "double": torch.tensor([3.0, 4.0], dtype=torch.float64),
        "single": torch.tensor([[1.0, 2.0], [2.0, 0.0]]),
        "half": torch.full((4,), 300.0, dtype=torch.float16),
        "brain": torch.full((4,), 0.5, dtype=torch.bfloat16),
        "complex": torch.tensor([3 + 4j]),
        "sparse": torch.tensor([0.0, 3.0, 0.0, -4.0]).to_sparse(),
        "scalar": torch.tensor(-2.0, requires_grad=True),
        "empty": torch.zeros(0),
    }
    found = norms.each(tensors)
    expected = {"double": 5, "single": 3, "half": 600, "brain": 1, "complex": 5, "sparse": 5, "scalar": 2, "empty": 0}
    assert found == pytest.approx(expected)
    assert list(found) == list(tensors)
    assert norms.each({}) == {}


@pytest.mark.parametrize("count", [1, 16, 17, 60])
def test_the_norm_is_one_norm_however_many_tensors(count: int) -> None:
    tensors = list(torch.randn(count, 7, generator=torch.Generator().manual_seed(count), dtype=torch.float64))
    assert norms.norm(tensors) == pytest.approx(torch.cat(tensors).norm().item(), rel=1e-14)


def test_where_no_read_is_free_the_norm_stays_a_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norms, "FREE_READS", set())
    found = norms.norm(MIXED)
    assert isinstance(found, Tensor)
    assert float(found) == pytest.approx(TRUE, rel=1e-7)
    assert float(norms.clip_factor(found, TRUE / 4)) == pytest.approx(0.25)
    assert float(norms.clip_factor(found, TRUE * 4)) == 1.0
    tensor = torch.tensor([4.0])
    norms.scale([tensor], torch.tensor(0.5, dtype=torch.float64))
    assert tensor.item() == 2.0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", range(5))
def test_one_number_that_is_not_finite_is_found_in_any_kind(value: float, place: int) -> None:
    tensors = [tensor.clone() for tensor in MIXED]
    one = torch.ones(())
    found = torch.zeros(())
    norms.nonfinite(tensors, found, one)
    assert found == 0
    kept = [tensor.clone() for tensor in tensors]
    if place == 4:
        tensors[4] = torch.sparse_coo_tensor([[1]], [value], (5,), check_invariants=True)
    else:
        tensors[place][-1] = complex(0, value) if place == 3 else value
    norms.nonfinite(tensors, found, one)
    assert found == 1.0
    names = [str(index) for index in range(5)]
    assert norms.nonfinite_names(dict(zip(names, tensors, strict=True))) == [str(place)]
    assert all(
        torch.equal(a.to_dense(), b.to_dense())
        for i, (a, b) in enumerate(zip(tensors, kept, strict=True))
        if i != place
    )


def test_scale_and_clip_value_change_every_kind_in_place() -> None:
    tensors = [tensor.clone().coalesce() if tensor.is_sparse else tensor.clone() for tensor in MIXED]
    norms.scale(tensors, 0.5)
    for tensor, before in zip(tensors, MIXED, strict=True):
        torch.testing.assert_close(tensor.to_dense(), before.to_dense() * 0.5)
    norms.clip_value(tensors, 5.0)
    assert [tensor.to_dense().flatten().tolist() for tensor in tensors] == [
        [1.5, 2.0],
        [5.0],
        [5.0],
        [5j],
        [5.0, 0, 0, 0, 0],
    ]


def test_clipping_by_norm_has_the_properties_of_a_projection() -> None:
    """The norm after clipping is the threshold, a second clip changes nothing, below the threshold nothing happens."""
    torch.manual_seed(0)
    gradients = [torch.randn(4, 3, dtype=torch.float64), torch.randn(5, dtype=torch.float64)]
    norm = norms.norm(gradients)
    for threshold in torch.logspace(-6, 3, 40, dtype=torch.float64).tolist():
        factor = norms.clip_factor(norm, threshold)
        once = [factor * gradient for gradient in gradients]
        assert norms.norm(once) == pytest.approx(min(norm, threshold), rel=1e-12)
        assert norms.clip_factor(norms.norm(once), threshold) == pytest.approx(1.0, rel=1e-12)
        assert (factor == 1.0) == (threshold >= norm)


@pytest.mark.parametrize("make", [torch.optim.SGD, Manual, lambda p, lr: torch.optim.SGD(p, lr=lr, fused=True)])
@pytest.mark.parametrize("threshold", [1e-4, 0.03, 1.0, 1e6])
def test_the_step_is_as_long_as_the_threshold(make: object, threshold: float) -> None:
    model, start = mlp(), mlp()
    report = Step(model, supervised(nn.MSELoss()), make(model.parameters(), lr=1.0), clip_norm=threshold)([rows(6)])
    moved = norms.norm([b.detach() - a.detach() for a, b in zip(start.parameters(), model.parameters(), strict=True)])
    assert moved == pytest.approx(min(report.grad_norm, threshold), rel=1e-9)
    assert report.clip_factor == pytest.approx(min(1.0, threshold / report.grad_norm), rel=1e-12)


def test_the_norm_is_in_the_report_only_when_somebody_wants_it() -> None:
    model = mlp()
    step = Step(model, supervised(nn.MSELoss()), torch.optim.SGD(model.parameters(), lr=0.0))
    quiet = step([rows(6)])
    assert (quiet.grad_norm, quiet.clip_factor) == (None, None)
    asked = step([rows(6)], norms=True)
    true = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters()))
    assert asked.grad_norm == pytest.approx(true, rel=1e-12)
    assert asked.clip_factor is None


def test_below_the_threshold_nothing_changes_bit_for_bit() -> None:
    finals = []
    for toggles in ({}, {"clip_norm": 1e6}, {"clip_value": 1e6}):
        model = mlp(torch.float32)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
        step = Step(model, supervised(nn.MSELoss()), optimizer, **toggles)
        for seed in range(3):
            step([rows(4, torch.float32, seed), rows(4, torch.float32, seed + 9)])
        finals.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(finals[0], finals[1])
    assert torch.equal(finals[0], finals[2])
