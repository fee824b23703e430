"""Skipped windows in words, on the CPU and where a device keeps the verdict."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from trainer import Step
from trainer.diagnose.skipped import Skipped
from trainer.optim import sgd


def ran(factors: list[float], **toggles: Any) -> tuple[Step, Skipped]:
    model = nn.Linear(2, 1)
    step = Step(model, lambda m, pair: pair[1] * m(pair[0]).mean(), sgd(model.parameters(), lr=0.0), **toggles)
    skipped = Skipped(step)
    for factor in factors:
        report = step([(torch.ones(2, 2), factor)])
        if report.skipped:
            skipped.skip(step.parameters.by_name, report)
    return step, skipped


def test_without_a_skip_there_is_nothing_to_say() -> None:
    _, skipped = ran([1.0] * 5)
    assert (skipped.troubles(), skipped.words()) == ([], [])


def test_how_many_of_how_many_and_the_last_one() -> None:
    _, skipped = ran([1.0, float("nan"), 1.0, float("inf"), 1.0, 1.0])
    why = "the loss of micro-batch 1 of 1 is"
    ((word, said),) = skipped.troubles()
    assert word == "skipped"
    assert said.startswith(f"2 of 6 windows (33 %), the last after step 2: {why} ")
    assert said.endswith(" inf") or said.endswith(" -inf")
    assert skipped.words() == []


@pytest.mark.parametrize("change", [lambda step: None, lambda step: setattr(step.clocks, "windows", 1000)])
def test_what_was_not_heard_of_counts_too(change: Callable[[Step], None]) -> None:
    step, skipped = ran([1.0, 1.0])
    step.clocks.windows = 500
    change(step)
    windows = step.clocks.windows
    assert skipped.troubles() == [("skipped", f"{windows - 2:,} of {windows:,} windows (100 %)")]
    step.clocks.windows, step.clocks.steps = 10_000, 9_998
    assert skipped.troubles() == [("skipped", "2 of 10,000 windows (0.02 %)")]


def test_skips_that_find_the_loss_scale_are_no_trouble() -> None:
    class Overflowed:
        overflowed, reason, clocks = True, "the gradient overflowed in float16", {"steps": 1}

    step, skipped = ran([1.0] * 3)
    step.clocks.windows += 2
    for _ in range(2):
        skipped.skip({}, Overflowed())  # type: ignore[arg-type]
    assert skipped.troubles() == []
    assert skipped.words() == ["2 windows skipped to find fp16's loss scale, as is usual"]
    _, went_on = ran([])
    went_on._step = step
    went_on.load_state_dict(skipped.state_dict())
    assert went_on.words() == skipped.words()
    step([(torch.ones(2, 2), float("nan"))])
    Overflowed.overflowed = False
    skipped.skip({}, Overflowed())  # type: ignore[arg-type]
    ((_, said),) = skipped.troubles()
    assert said.startswith("3 of 6 windows (50 %), 2 of them to find fp16's loss scale, the last after step 1: ")
