"""Graphs that are kept alive: caught after a few steps with the holder's name; what is dropped raises no alarm."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trainer import Step
from trainer.diagnose.retention import Retention
from trainer.optim import sgd

ROWS = torch.ones(4, 2)


def run(model: nn.Module, objective: Any, steps: int = 12, after: Any = None) -> list[str]:
    said: list[str] = []
    step = Step(model, objective, sgd(model.parameters(), lr=0.01))
    step.after_backward.append(Retention(step, said.append))
    for _ in range(steps):
        report = step([ROWS])
        if after is not None:
            after(report)
    return said


def mean(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def test_a_sound_run_says_nothing() -> None:
    kept = []
    assert run(nn.Linear(2, 1), mean, steps=200, after=kept.append) == []  # reports may be kept


def test_a_list_of_losses_in_a_closure() -> None:
    losses = []

    def objective(model: nn.Module, x: Tensor) -> Tensor:
        loss = mean(model, x)
        losses.append(loss)
        return loss

    (said,) = run(nn.Linear(2, 1), objective)
    assert "'losses[0]' holds them" in said
    assert "keep loss.item()" in said


def test_a_running_total() -> None:
    class Model(nn.Linear):
        total: Any = 0.0

    def objective(model: Model, x: Tensor) -> Tensor:
        loss = mean(model, x)
        model.total = model.total + loss
        return loss

    (said,) = run(Model(2, 1), objective)
    assert "'model.total' holds them" in said


class Metric:
    def __init__(self) -> None:
        self.seen: dict[str, list[Tensor]] = {"outputs": []}


def test_a_metric_that_keeps_outputs() -> None:
    class Objective:
        def __init__(self) -> None:
            self.metric = Metric()

        def __call__(self, model: nn.Module, x: Tensor) -> Tensor:
            loss = mean(model, x)
            self.metric.seen["outputs"].append(loss * 2)
            return loss

    (said,) = run(nn.Linear(2, 1), Objective())
    assert "'objective.metric.seen['outputs'][0]' holds them" in said


EVERYWHERE: list[Tensor] = []


def test_a_global_list() -> None:
    def objective(model: nn.Module, x: Tensor) -> Tensor:
        loss = mean(model, x)
        EVERYWHERE.append(loss)
        return loss

    try:
        (said,) = run(nn.Linear(2, 1), objective)
        assert "'EVERYWHERE[0]' holds them" in said
    finally:
        EVERYWHERE.clear()


def test_a_variable_of_a_running_function() -> None:
    mine: list[Tensor] = []
    sink = mine.append

    class Objective:
        __slots__ = ("sink",)

        def __call__(self, model: nn.Module, x: Tensor) -> Tensor:
            loss = mean(model, x)
            sink(loss)
            return loss

    (said,) = run(nn.Linear(2, 1), Objective())
    assert "'mine[0]' holds them" in said


@pytest.mark.parametrize("ring", [True, False])
def test_graphs_that_only_wait_to_be_collected_are_no_leak(ring: bool) -> None:
    class Node:
        def __init__(self, loss: Tensor) -> None:
            self.loss = loss
            self.me = self if ring else None

    def objective(model: nn.Module, x: Tensor) -> Tensor:
        return Node(mean(model, x)).loss

    assert run(nn.Linear(2, 1), objective, steps=40) == []


def test_it_is_said_once() -> None:
    losses = []

    def objective(model: nn.Module, x: Tensor) -> Tensor:
        losses.append(mean(model, x))
        return losses[-1]

    assert len(run(nn.Linear(2, 1), objective, steps=300)) == 1
