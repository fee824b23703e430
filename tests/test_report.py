"""The report reads like numbers, wherever the numbers lie."""

import math

import torch

from trainer.gradient.report import Report, Trace


def report(weights: dict[str, object], coefficients: dict[str, float] | None = None) -> tuple[Report, list[int]]:
    reads = []

    def terms() -> dict[str, float]:
        reads.append(1)
        return {"a": 2.0, "b": math.nan if not float(weights["b"]) else 5.0}

    return Report(terms, weights, coefficients or {}, (2, 8, 0)), reads


def test_the_loss_is_the_sum_of_terms_by_coefficient_and_is_read_once() -> None:
    found, reads = report({"a": 4.0, "b": torch.tensor(8.0)}, {"b": 0.5})
    assert reads == []
    assert found.loss == 2.0 + 0.5 * 5.0
    assert found.terms == {"a": 2.0, "b": 5.0}
    assert reads == [1]
    assert (found.weight, found.weights) == (4.0, {"a": 4.0, "b": 8.0})
    assert (found.micro_batches, found.rows, found.tokens) == (2, 8, 0)


def test_a_term_that_weighs_nothing_leaves_the_loss_to_the_others() -> None:
    assert report({"a": 4.0, "b": torch.tensor(0.0)})[0].loss == 2.0
    assert math.isnan(report({"a": 0.0, "b": 0.0})[0].loss)


def test_tensors_become_numbers_and_a_reason_is_there_only_for_a_skip() -> None:
    found, _ = report({"a": 1.0, "b": 1.0})
    assert (found.grad_norm, found.clip_factor, found.skipped, found.reason) == (None, None, False, None)
    found._grad_norm, found._clip_factor, found._lr = torch.tensor(3.0), torch.tensor(0.5), torch.tensor(0.25)
    found._skipped, found._reason = torch.tensor(0.0), lambda: "because"
    assert (found.grad_norm, found.clip_factor, found.lr, found.skipped, found.reason) == (3.0, 0.5, 0.25, False, None)
    found._skipped = torch.tensor(1.0)
    assert found.reason == "because"
    assert repr(found) == "Report(loss=7, weight=1, grad_norm=3, skipped: because)"


def test_the_norm_after_is_that_of_what_was_left_times_the_clip_factor() -> None:
    found, _ = report({"a": 1.0, "b": 1.0})
    assert found.grad_norm_after is None
    found._grad_norm = torch.tensor(3.0)
    assert found.grad_norm_after == 3.0
    found._clip_factor = torch.tensor(0.5)
    assert found.grad_norm_after == 1.5
    found._norm_after = torch.tensor(2.0)  # a transform has changed it before
    assert found.grad_norm_after == 1.0
    found._skipped = torch.tensor(1.0)
    assert found.grad_norm_after is None


def test_the_divisor_goes_by_the_reduction_and_counts_come_from_the_trace() -> None:
    for reduction, divisor in (("mean", 4.0), ("sum", 1.0), ("micro_batches", 2.0)):
        found = Report(dict, {"a": torch.tensor(4.0)}, {}, (2, 8, 0), None, reduction, Trace(3, 3, 2, 1))
        assert (found.divisor, found.backward_calls, found.reductions) == (divisor, 3, 2)
    assert (report({"a": 1.0, "b": 1.0})[0].backward_calls, report({"a": 1.0, "b": 1.0})[0].reductions) == (0, 0)
