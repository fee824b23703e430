"""The counts of a window, and that a broken one is named."""

from typing import Any

import pytest
import torch
from reference import cut, mlp, rows
from torch import Tensor, nn

from trainer import GradientError, Step, Sum, supervised
from trainer.gradient.invariants import check, check_writes, writes
from trainer.gradient.report import Trace
from trainer.optim import sgd

MSE = supervised(nn.MSELoss())


def two_terms(model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Any]:
    """Weights that are not known before: the second term is held apart."""
    error = (model(batch[0]) - batch[1]).square()
    return {"a": Sum(error.sum(), error.numel()), "b": Sum(error.sum(), float(batch[0].abs().sum()))}


@pytest.mark.parametrize(("sizes", "reduction", "divisor"), [([3, 4], "mean", 14.0), ([1, 2, 4], "micro_batches", 3.0)])
def test_the_report_says_what_was_done(sizes: list[int], reduction: str, divisor: float) -> None:
    model = mlp()
    report = Step(model, MSE, sgd(model.parameters()), reduction=reduction)(cut(rows(7), sizes))
    assert (report.micro_batches, report.rows, report.divisor) == (len(sizes), 7, divisor)
    assert (report.backward_calls, report.reductions) == (len(sizes), 0)


def test_a_micro_batch_that_weighs_nothing_has_no_backward_and_a_term_apart_has_its_own() -> None:
    model = mlp()
    ignored = (torch.ones(2, 3).double(), torch.full((2,), -100))
    good = (torch.ones(2, 3).double(), torch.zeros(2, dtype=torch.long))
    step = Step(model, supervised(nn.CrossEntropyLoss()), sgd(model.parameters()))
    assert step([good, ignored, good]).backward_calls == 2
    step = Step(model, two_terms, sgd(model.parameters()))
    window = cut(rows(7), [3, 4])
    assert step(window).backward_calls == 4


def test_an_open_window_that_is_saved_keeps_its_counts() -> None:
    window = cut(rows(7), [3, 2, 2])
    model = mlp()
    step = Step(model, MSE, sgd(model.parameters()))
    step.accumulate(window[0], window)
    state = step.state_dict()
    other = mlp()
    again = Step(other, MSE, sgd(other.parameters()))
    again.load_state_dict(state)
    assert again(window).backward_calls == 3


def test_a_window_that_was_tampered_with_is_refused() -> None:
    model = mlp()
    step = Step(model, MSE, sgd(model.parameters()))
    window = cut(rows(7), [3, 4])
    for micro_batch in window:
        step.accumulate(micro_batch, window)
    step._open.terms["loss"].values.pop()
    before = model[0].weight.detach().clone()
    with pytest.raises(GradientError, match="1 losses were weighed in this window, and 2 went through backward"):
        step.finish()
    assert torch.equal(before, model[0].weight)


def test_the_reductions_are_one_a_window_and_one_for_each_extra() -> None:
    model = mlp()
    step = Step(model, MSE, sgd(model.parameters()))
    step.accumulate(rows(3))
    for trace, world, good in (
        (Trace(1, 1), 1, True),
        (Trace(1, 1, 1), 1, False),
        (Trace(1, 1, 0), 2, False),
        (Trace(1, 1, 1), 2, True),
        (Trace(1, 1, 2), 2, False),
        (Trace(1, 1, 3, 2), 2, True),
    ):
        if good:
            check(trace, step._open, world)
        else:
            with pytest.raises(GradientError, match="was summed over ranks"):
                check(trace, step._open, world)


def test_writes_are_counted_for_each_parameter() -> None:
    model = mlp()
    step = Step(model, MSE, sgd(model.parameters()))
    window = cut(rows(7), [3, 2, 2])
    with writes(step.parameters.by_name) as counts:
        for micro_batch in window:
            step.accumulate(micro_batch, window)
    step.cancel()
    assert counts == dict.fromkeys(step.parameters.by_name, 3)
    check_writes(counts, 3)
    step(window)
    assert set(counts.values()) == {3}  # the hooks are gone


@pytest.mark.parametrize("zero_grad", ["set_to_none", "zeros", "never"])
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("late", [True, False])
def test_an_objective_that_calls_backward_itself_is_refused_in_the_first_window(
    zero_grad: str, keep: bool, late: bool
) -> None:
    def twice(m: nn.Module, b: tuple[Tensor, Tensor]) -> Tensor:
        loss = (m(b[0]) - b[1]).square().mean()
        if not late or len(b[0]) == 4:
            loss.backward(retain_graph=keep)
        return loss

    model = mlp()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    step = Step(model, twice, sgd(model.parameters()), zero_grad=zero_grad)
    with pytest.raises(GradientError, match="the objective calls .*backward.* itself: return the total"):
        step(cut(rows(7), [3, 4]))
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_a_write_too_many_or_too_few_is_named() -> None:
    model = mlp()
    again = [True]

    def hooked(value: Tensor) -> None:
        """Adds to a gradient while backward runs."""
        if again[0]:
            again[0] = False
            with torch.enable_grad():
                model[0].weight.sum().backward()
            again[0] = True

    def more(m: nn.Module, b: tuple[Tensor, Tensor]) -> Tensor:
        out = m(b[0])
        out.register_hook(hooked)
        return out.square().mean()

    def seldom(m: nn.Module, b: tuple[Tensor, Tensor]) -> Tensor:
        return (m(b[0]) if len(b[0]) == 3 else m[:4](b[0])).square().mean()

    for objective, sentence in (
        (more, "'0.weight' was written 4 times in a window of 2 micro-batches: something runs backward a second time"),
        (seldom, "'4.weight' was written once in a window of 2 micro-batches: some of them do not use it"),
    ):
        step = Step(model, objective, sgd(model.parameters()))
        window = cut(rows(7), [3, 4])
        with writes(step.parameters.by_name) as counts:
            for micro_batch in window:
                step.accumulate(micro_batch, window)
        step.cancel()
        with pytest.raises(GradientError, match=sentence):
            check_writes(counts, 2)
    check_writes({"unused": 0, "used": 2}, 2)
