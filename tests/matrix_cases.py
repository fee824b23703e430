"""The cases of the equivalence matrix, and how one is run and held against the step written by hand."""

import contextlib
import copy
import functools
import itertools
import math
from typing import Any, NamedTuple

import by_hand
import torch
from torch import Tensor, nn
from torch.nn import functional

from trainer import Step, Sum, supervised
from trainer.optim import adamw, sgd

STEPS = 3
LARGEST = {"none": 0.0, "norm": 0.2, "adaptive": 0.05}
UNIT = {"fp32": 2.0**-24, "bf16": 2.0**-9, "fp16": 2.0**-12, "fp64": 2.0**-53}
"""Unit roundoff: half the distance from 1 to the next number."""
AXES: dict[str, tuple[Any, ...]] = {
    "accumulation": (1, 2, 3, 4, 7),
    "cut": ("even", "ragged", "tokens"),
    "segments": ("none", "segments"),
    "precision": ("fp32", "bf16", "fp64"),
    "clip": ("none", "norm"),
    "optimizer": ("sgd", "momentum", "adamw"),
    "ranks": (1,),
}


class Case(NamedTuple):
    accumulation: int
    cut: str
    segments: str
    precision: str
    clip: str
    optimizer: str
    ranks: int

    def __str__(self) -> str:
        return "-".join(map(str, self))


class Found(NamedTuple):
    """A case's largest errors, and in multiples of what rounding explains (of 1e-12 in float64)."""

    gradient: float
    parameters: float
    gradient_share: float
    parameters_share: float


ALL = [Case(*values) for values in itertools.product(*AXES.values())]


@functools.cache
def _net(dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).to(dtype)


def net(dtype: torch.dtype) -> nn.Sequential:
    """The model of all cases, new and always the same."""
    return copy.deepcopy(_net(dtype))


@functools.cache
def windows(accumulation: int, cut: str, ranks: int) -> list[list[list[tuple[Tensor, Tensor]]]]:
    """By step and rank the micro-batches, float32. Of two ranks the second has other rows, and one micro-batch less in
    windows of more than one, unless the cut is even."""
    draw = torch.Generator().manual_seed(7)
    found = []
    for step in range(STEPS):
        by_rank = []
        for rank in range(ranks):
            length = accumulation - (rank and accumulation > 1 and cut != "even")
            by_rank.append([_micro_batch(cut, step + 3 * rank + 2 * index, draw) for index in range(length)])
        found.append(by_rank)
    return found


def _micro_batch(cut: str, number: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    rows = 4 if cut == "even" else (3, 1, 4, 2, 5)[number % 5]
    if cut != "tokens":
        return torch.randn(rows, 3, generator=draw), torch.randn(rows, 3, generator=draw) + 1
    length = (4, 2, 6)[number % 3]
    targets = torch.randint(0, 3, (rows, length), generator=draw)
    targets[torch.rand(rows, length, generator=draw) < 0.4] = -100
    targets[0, 0] = number % 3
    return torch.randn(rows, length, 3, generator=draw), targets


def over_tokens(model: nn.Module, micro_batch: tuple[Tensor, Tensor]) -> Sum:
    """A total with its weight, which only the forward tells."""
    inputs, targets = micro_batch
    total = functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), reduction="sum")
    return Sum(total, (targets != -100).sum())


def step_of(case: Case, model: nn.Module, ranks: Any = None) -> Step:
    make = {
        "sgd": lambda: sgd(model.parameters(), lr=0.5),
        "momentum": lambda: sgd(model.parameters(), lr=0.5, momentum=0.9),
        "adamw": lambda: adamw(model.parameters(), lr=0.05, weight_decay=0.1),
    }
    clips = {"none": {}, "norm": {"clip_norm": LARGEST["norm"]}, "adaptive": {"clip_adaptive": LARGEST["adaptive"]}}
    return Step(
        model,
        over_tokens if case.cut == "tokens" else supervised(nn.MSELoss()),
        make[case.optimizer](),
        activation_checkpointing=2 if case.segments == "segments" else None,
        precision=case.precision,  # type: ignore[arg-type]
        **({"ranks": ranks} if ranks else {}),
        **clips[case.clip],  # type: ignore[arg-type]
    )


def run(case: Case, ranks: Any = None) -> Found:
    """Take the case's steps. In float64 against steps by hand that go their own way; in other precisions each step
    from the same parameters, and the optimizer's move from the same gradient.

    Raises AssertionError for a step that was not taken or weighed something else.
    """
    dtype = torch.float64 if case.precision == "fp64" else torch.float32
    model = net(dtype)
    step = step_of(case, model, ranks)
    hand = by_hand.Optimizer(case.optimizer, 0.05 if case.optimizer == "adamw" else 0.5)
    narrow = by_hand.Optimizer(hand.kind, hand.lr)
    place = ranks.rank if ranks else 0
    worst = Found(0.0, 0.0, 0.0, 0.0)
    was_clipped = False
    named = dict(model.named_parameters())
    parameters = {name: p.detach().double().clone() for name, p in named.items()}
    for by_rank in windows(case.accumulation, case.cut, case.ranks):
        inputs, targets = by_hand.joined(list(itertools.chain(*by_rank)))
        before = {name: p.detach().clone() for name, p in named.items()}
        if case.precision != "fp64":
            parameters = {name: p.double() for name, p in before.items()}
        true, weight = by_hand.window_gradient(parameters, inputs, targets)
        gradient = by_hand.flat(by_hand.clipped(true, parameters, case.clip, LARGEST[case.clip]))
        was_clipped |= not torch.equal(gradient, by_hand.flat(true))
        floor = 0.0 if case.precision == "fp64" else plain_error(case, model, inputs, targets, gradient)

        report = step([tuple(t.to(dtype) if t.is_floating_point() else t for t in one) for one in by_rank[place]])
        assert report.skipped is False, report.reason
        assert report.weight == weight and report.clocks["steps"] == hand.steps + 1
        taken, after = by_hand.flat({name: p.grad for name, p in named.items()}), by_hand.flat(named)

        if case.precision == "fp64":
            moved = hand.moved(by_hand.flat(parameters), gradient)
            parts = moved.split([p.numel() for p in named.values()])
            parameters = {name: part.view_as(p) for (name, p), part in zip(named.items(), parts, strict=True)}
            allowed = (1e-12, 1e-12)
        else:
            moved = hand.moved(by_hand.flat(parameters), taken.double())
            rounded = by_hand.apart(narrow.moved(by_hand.flat(before), taken), moved)
            allowed = (4 * max(floor, UNIT[case.precision]), 4 * max(rounded, UNIT["fp32"]))
        errors = (by_hand.apart(taken, gradient), by_hand.apart(after, moved))
        assert all(map(math.isfinite, errors))
        worst = Found(*map(max, worst, (*errors, errors[0] / allowed[0], errors[1] / allowed[1])))
    assert was_clipped == (case.clip != "none"), "a threshold that changes nothing tests nothing"
    return worst


def plain_error(case: Case, model: nn.Module, inputs: Tensor, targets: Tensor, true: Tensor) -> float:
    """What rounding alone does: the error of the whole window as one batch in this precision, without any trainer."""
    named = dict(model.named_parameters())
    low = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(case.precision)
    with torch.autocast("cpu", dtype=low) if low else contextlib.nullcontext():
        outputs = model(inputs)
        loss = (functional.cross_entropy if case.cut == "tokens" else functional.mse_loss)(outputs, targets)
    scale = 2.0**12 if case.precision == "fp16" else 1.0  # a power of two: only underflow is other than without it
    gradients = torch.autograd.grad(loss * scale, list(named.values()))
    found = {name: part.double() / scale for name, part in zip(named, gradients, strict=True)}
    return by_hand.apart(by_hand.flat(by_hand.clipped(found, named, case.clip, LARGEST[case.clip])), true)
