"""What is given to a loss: the sentence and the line for what torch raises, and for what it takes without a word."""

import inspect
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer import ObjectiveError, Step, Sum, Trainer, certify, supervised
from trainer.diagnose.losses import Losses, explained_loss
from trainer.loggers.events import Found
from trainer.optim import sgd

X = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
CLASSES = torch.arange(8) % 3


def net(outputs: int) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(4, outputs)


def cross_entropy(m: Any, b: Any) -> Tensor:
    return F.cross_entropy(m(b[0]), b[1])  # HERE


def as_a_module(m: Any, b: Any) -> Tensor:
    loss = nn.CrossEntropyLoss(ignore_index=-1)
    return loss(m(b[0]), b[1])  # HERE


def bce(m: Any, b: Any) -> Tensor:
    return F.binary_cross_entropy(m(b[0]), b[1])  # HERE


def bce_of_sigmoid(m: Any, b: Any) -> Tensor:
    return F.binary_cross_entropy(m(b[0]).sigmoid(), b[1])  # HERE


def bce_with_logits(m: Any, b: Any) -> Tensor:
    return F.binary_cross_entropy_with_logits(m(b[0]), b[1])  # HERE


def mse(m: Any, b: Any) -> Tensor:
    return F.mse_loss(m(b[0]), b[1])  # HERE


def sequence(m: Any, b: Any) -> Tensor:
    return F.cross_entropy(m(b[0]).reshape(2, 4, 3), b[1])  # HERE


def line_of(code: Any) -> str:
    lines, first = inspect.getsourcelines(code)
    return f"test_losses.py:{first + next(index for index, line in enumerate(lines) if '# HERE' in line)} "


@pytest.mark.parametrize(
    ("objective", "outputs", "targets", "words"),
    [
        (cross_entropy, 3, CLASSES.float(), r"class numbers of float32: it takes int64, targets.long\(\)"),
        (cross_entropy, 3, CLASSES.int(), r"class numbers of int32"),
        (cross_entropy, 3, CLASSES[:, None], r"targets of shape \(8, 1\).* of shape \(8,\), targets.squeeze\(1\)"),
        (cross_entropy, 3, F.one_hot(CLASSES), r"whole numbers of the outputs' own shape .*argmax\(1\)"),
        (cross_entropy, 3, torch.zeros(8, 4), r"targets of shape \(8, 4\): it takes one class number for each"),
        (cross_entropy, 3, CLASSES + 1, r"class number 3, and the outputs have 3 for each, classes 0 to 2"),
        (cross_entropy, 3, CLASSES - 1, r"class number -1, and"),
        (as_a_module, 3, CLASSES * 2 - 1, r"class number 3, and"),
        (cross_entropy, 3, CLASSES[:7], r"outputs of shape \(8, 3\) and targets of shape \(7,\)"),
        (sequence, 3, CLASSES.reshape(2, 4), r"classes must be the second dimension, outputs.movedim\(-1, 1\)"),
        (cross_entropy, 3, CLASSES.to("meta"), r"outputs on cpu and targets on meta: move the targets"),
        (bce, 3, torch.ones(8, 3), r"outputs from -.* no probabilities: use binary_cross_entropy_with_logits"),
        (bce_of_sigmoid, 3, torch.full((8, 3), 2.0), r"targets from 2 to 2: they must lie from 0 to 1"),
        (bce_of_sigmoid, 1, torch.ones(8), r"outputs.squeeze\(-1\)"),
        (bce_with_logits, 1, torch.ones(8), r"outputs of shape \(8, 1\) and .*outputs.squeeze\(-1\)"),
        (bce_with_logits, 3, torch.ones(8, 3).long(), r"targets of int64: it takes numbers from 0 to 1"),
        (mse, 3, torch.ones(5, 3), r"it compares element by element"),
        (mse, 3, torch.ones(8, 3, device="meta"), r"outputs on cpu and targets on meta"),
    ],
)
@pytest.mark.filterwarnings("ignore:Using a target size")
def test_what_a_loss_raises_is_one_sentence(objective, outputs, targets, words) -> None:
    model = net(outputs)
    with pytest.raises(ObjectiveError) as found:
        Step(model, objective, sgd(model.parameters(), lr=0.1))([(X, targets)])
    said = str(found.value)
    assert re.search(words, said) and line_of(objective) in said, said
    assert isinstance(found.value.__cause__, RuntimeError | ValueError | IndexError)


def test_of_a_loss_that_is_the_objective_no_line_of_the_callers_is_named() -> None:
    model = net(3)
    with pytest.raises(ObjectiveError, match=r"^cross_entropy\(\) is given the class number 3") as found:
        Step(model, nn.CrossEntropyLoss(), sgd(model.parameters(), lr=0.1))([(X, CLASSES + 1)])
    assert ".py" not in str(found.value)


def test_what_is_no_losss_fault_stays_what_it_is() -> None:
    def own(m: Any, b: Any) -> Tensor:
        raise ValueError("mine")

    model = net(3)
    with pytest.raises(ValueError, match="^mine$") as found:
        Step(model, own, sgd(model.parameters(), lr=0.1))([(X, CLASSES)])
    assert explained_loss(found.value) is None
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        Step(model, cross_entropy, sgd(model.parameters(), lr=0.1))([(X[:, :2], CLASSES)])
    with pytest.raises(ValueError, match="not a valid value for reduction") as other:
        F.cross_entropy(X, CLASSES, reduction="all")
    assert explained_loss(other.value) is None


# What torch takes without an error.


def by_hand(m: Any, b: Any) -> Tensor:
    return (m(b[0]) - b[1]).square().mean()  # HERE


def softmax_first(m: Any, b: Any) -> Tensor:
    return F.cross_entropy(m(b[0]).softmax(1), b[1])  # HERE


def sigmoid_first(m: Any, b: Any) -> Tensor:
    out = m(b[0]).sigmoid().flatten()
    return F.binary_cross_entropy_with_logits(out, torch.ones(24))  # HERE


def without_logarithm(m: Any, b: Any) -> Tensor:
    return F.nll_loss(m(b[0]).softmax(1), b[1])  # HERE


def too_large(m: Any, b: Any) -> Tensor:
    return F.binary_cross_entropy_with_logits(m(b[0]), torch.full((8, 3), 2.0))  # HERE


def summed(m: Any, b: Any) -> Tensor:
    return F.mse_loss(m(b[0]), X[:, :3], reduction="sum")  # HERE


def said(objective: Any, outputs: int, targets: Tensor, closely: bool = True) -> list[str]:
    losses = Losses((X, targets), closely)
    model = net(outputs)
    losses.returned([losses.within(lambda: objective(model, (X, targets)))])
    return losses.said


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize(
    ("objective", "outputs", "targets", "words", "at_once"),
    [
        (mse, 1, torch.ones(8), r"^mse_loss\(\) in .*shapes \(8, 1\) and \(8,\) .* every target, \(8, 8\)", True),
        (by_hand, 1, torch.ones(8), r"^sub\(\) in .*shapes \(8, 1\) and \(8,\)", True),
        (softmax_first, 3, CLASSES, r"softmax\(\)'s probabilities", False),
        (sigmoid_first, 3, CLASSES, r"sigmoid\(\)'s probabilities", False),
        (without_logarithm, 3, CLASSES, r"no logarithms of probabilities", False),
        (too_large, 3, CLASSES, r"targets from 2 to 2", False),
    ],
)
def test_what_is_quietly_wrong(objective, outputs, targets, words, at_once) -> None:
    (found,) = said(objective, outputs, targets)
    assert re.search(words, found) and line_of(objective) in found, found
    assert bool(said(objective, outputs, targets, closely=False)) is at_once


def test_a_sum_returned_as_a_mean() -> None:
    (found,) = said(summed, 3, CLASSES)
    assert "the objective returns what mse_loss() in" in found and line_of(summed) in found
    model = net(3)
    assert "return Sum(total, weight)" in certify(model, summed, None, [(X, CLASSES)]).audit[0]
    weighed = lambda m, b: Sum(summed(m, b), 8.0)  # noqa: E731
    assert certify(model, weighed, None, [(X, CLASSES)]).audit == []


@pytest.mark.parametrize(
    ("objective", "outputs", "targets"),
    [
        (cross_entropy, 3, CLASSES),
        (cross_entropy, 3, torch.full((8, 3), 1 / 3)),
        (mse, 1, torch.ones(8, 1)),
        (lambda m, b: F.cross_entropy(m(b[0]).log_softmax(1), b[1]), 3, CLASSES),
        (lambda m, b: F.nll_loss(m(b[0]).log_softmax(1), b[1]), 3, CLASSES),
        (lambda m, b: F.binary_cross_entropy_with_logits(m(b[0]), b[1]), 3, torch.rand(8, 3)),
        (lambda m, b: (m(b[0])[:, None] - m(b[0])[None]).square().mean(), 3, CLASSES),  # all pairs, as is meant
        (lambda m, b: (m(b[0]) - m(b[0]).squeeze(1)).abs().mean(), 1, CLASSES),
        (lambda m, b: F.mse_loss(m(b[0]), b[1]) + 0 * (b[1][:, None] - b[1]).sum(), 1, torch.ones(8, 1)),
    ],
)
def test_of_what_is_meant_nothing_is_said(objective, outputs, targets) -> None:
    assert said(objective, outputs, targets) == []


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize("objective", [mse, by_hand, supervised(nn.MSELoss())])
def test_the_first_step_of_a_run_says_it(objective) -> None:
    heard: list[str] = []

    class Hearing:
        def found(self, event: Found) -> None:
            heard.append(event.text)

    model = net(1)
    trainer = Trainer(
        model,
        objective,
        sgd(model.parameters(), lr=0.01),
        data=(X, torch.ones(8)),
        steps=2,
        console=False,
        loggers=[Hearing()],
        batch_size=8,
    )
    given = trainer.step.objective
    trainer.fit()
    assert trainer.step.objective is given
    (found,) = heard
    assert "takes every output with every target" in found
    assert (line_of(objective) in found) if inspect.isfunction(objective) else ".py" not in found, found
