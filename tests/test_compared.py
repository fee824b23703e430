"""Norms and cosines against plain arithmetic, and when a pair is said to be in conflict."""

import pytest
import torch

from trainer.diagnose.compared import AGAINST, IN_A_ROW, Compared, Conflicts, compare


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_norms_and_cosines_are_those_of_the_flat_vectors(dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    parts = {
        name: [torch.randn(3, 4, generator=generator).to(dtype), torch.randn(5, generator=generator).to(dtype)]
        for name in "abc"
    }
    factors = {"a": 2.0, "b": 0.5, "c": -1.0}
    found = compare(parts, factors)
    flat = {name: factors[name] * torch.cat([p.double().flatten() for p in parts[name]]) for name in parts}
    assert found.norms == {name: pytest.approx(float(vector.norm())) for name, vector in flat.items()}
    assert set(found.cosines) == {("a", "b"), ("a", "c"), ("b", "c")}
    for (one, other), cosine in found.cosines.items():
        assert cosine == pytest.approx(float(torch.cosine_similarity(flat[one], flat[other], dim=0)))


def test_what_a_gradient_does_not_reach_counts_as_zero() -> None:
    one, two = torch.tensor([3.0, 4.0]), torch.tensor([1.0])
    found = compare({"a": [one, None, None], "b": [None, two, None], "c": [one, two, None]}, dict.fromkeys("abc", 1.0))
    assert found.norms == {"a": 5.0, "b": 1.0, "c": pytest.approx(26**0.5)}
    assert found.cosines["a", "b"] == 0.0
    assert found.cosines["a", "c"] == pytest.approx(5 / 26**0.5)
    nothing = compare({"a": [None], "b": [one]}, dict.fromkeys("ab", 1.0))
    assert (nothing.norms, nothing.cosines) == ({"a": 0.0, "b": 5.0}, {})


def test_sparse_complex_huge_and_not_finite() -> None:
    sparse = torch.sparse_coo_tensor([[1, 1]], [3.0, 1.0], (4,), check_invariants=True)
    found = compare({"a": [sparse], "b": [torch.tensor([0.0, -1.0, 0.0, 0.0])]}, {"a": 1.0, "b": 1.0})
    assert (found.norms, found.cosines) == ({"a": 4.0, "b": 1.0}, {("a", "b"): -1.0})
    wave = torch.tensor([1 + 1j, 2j])
    assert compare({"a": [wave], "b": [wave * 1j]}, {"a": 1.0, "b": 1.0}).cosines == {("a", "b"): pytest.approx(0.0)}
    huge = compare({"a": [torch.full((2,), 1e30)], "b": [torch.full((2,), -1e-30)]}, {"a": 1.0, "b": 1.0})
    assert huge.is_finite and huge.cosines == {("a", "b"): pytest.approx(-1.0)}
    assert not compare({"a": [torch.tensor([float("inf")])]}, {"a": 1.0}).is_finite


def test_a_conflict_is_told_once_and_only_when_it_lasts() -> None:
    conflicts = Conflicts("terms", "weigh them anew")

    def look(*cosines: float) -> list[str]:
        return [said for one in cosines for said in conflicts.look(Compared({}, {("a", "b"): one, ("a", "c"): 0.9}))]

    assert look(*[-0.9] * (IN_A_ROW - 1), AGAINST + 0.01) == []  # it does not last
    (said,) = look(*[-0.9] * (IN_A_ROW - 1), -0.83)
    assert "'a' and 'b' pull against each other" in said and "now -0.83" in said and said.endswith("weigh them anew.")
    saved = conflicts.state_dict()
    assert look(*[-0.9] * 10) == []
    assert conflicts.words() == ["terms 'a' and 'b' against each other (cosine -0.90)"]
    again = Conflicts("terms", "weigh them anew")
    again.load_state_dict(saved)
    assert [again.look(Compared({}, {("a", "b"): -0.9})) for _ in range(5)] == [[]] * 5
