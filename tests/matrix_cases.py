"""The cases of the equivalence matrix, and how one is run and held against the step written by hand."""

import contextlib
import copy
import functools
import hashlib
import itertools
import math
from typing import Any, NamedTuple

import by_hand
import torch
from torch import Tensor, nn
from torch.nn import functional

from trainer import Report, Step, Sum, supervised
from trainer.optim import adamw, sgd

STEPS = 3
LARGEST = {"none": 0.0, "norm": 0.2, "adaptive": 0.05}
UNIT = {"fp32": 2.0**-24, "bf16": 2.0**-9, "fp16": 2.0**-12, "fp64": 2.0**-53}
"""Unit roundoff: half the distance from 1 to the next number."""
AXES: dict[str, tuple[Any, ...]] = {
    "accumulation": (1, 2, 3, 4, 7),
    "cut": ("even", "ragged", "tokens"),
    "segments": ("none", "segments"),
    "precision": ("fp32", "bf16", "fp16", "fp64"),
    "clip": ("none", "norm", "adaptive"),
    "optimizer": ("sgd", "momentum", "adamw"),
    "ranks": (1, 2),
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
    wrong: str = ""
    """What else was not as it should be, in words."""
    bits: str = ""
    """A digest of the parameters at the end."""


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
    from the same parameters, and the optimizer's move from the same gradient. Of two ranks only the first judges.
    """
    dtype = torch.float64 if case.precision == "fp64" else torch.float32
    model = net(dtype)
    step = step_of(case, model, ranks)
    place = ranks.rank if ranks else 0
    judge = Judge(case, model) if place == 0 else None
    steps = STEPS if case.optimizer != "sgd" else STEPS - 1  # it keeps nothing that a third could show
    for by_rank in windows(case.accumulation, case.cut, case.ranks)[:steps]:
        window = [tuple(t.to(dtype) if t.is_floating_point() else t for t in one) for one in by_rank[place]]
        if judge:
            judge.before(list(itertools.chain(*by_rank)))
        report = step(window)
        if case.precision == "fp16" and report.skipped and "overflowed" in str(report.reason):
            if judge:
                judge.after_a_skip()
            report = step(window)  # the loss scale is the half of what it was
        if judge:
            judge.after(report)
    bits = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()
    return Found(0.0, 0.0, 0.0, 0.0, bits=bits) if judge is None else judge.found()._replace(bits=bits)


def run_on_rank(rank: int, world: int, cases: list[Case]) -> list[Found]:
    """What `ranks.over_ranks` calls on each rank."""
    from trainer.distributed import ManyProcesses

    del rank, world
    ranks = ManyProcesses()
    return [run(case, ranks) for case in cases]


class Judge:
    """One case held against the hand. It raises nothing, so that no rank is left alone."""

    def __init__(self, case: Case, model: nn.Module) -> None:
        self.case, self.model = case, model
        self.named = dict(model.named_parameters())
        self.hand = by_hand.Optimizer(case.optimizer, 0.05 if case.optimizer == "adamw" else 0.5)
        self.narrow = by_hand.Optimizer(self.hand.kind, self.hand.lr)
        self.parameters = self._now()
        self.worst = (0.0, 0.0, 0.0, 0.0)
        self.was_clipped = False
        self.wrong: list[str] = []

    def _now(self) -> by_hand.Named:
        return {name: p.detach().double().clone() for name, p in self.named.items()}

    def before(self, micro_batches: list[tuple[Tensor, Tensor]]) -> None:
        """What this window's gradient is: all of its rows, of all ranks, as one batch."""
        inputs, targets = by_hand.joined(micro_batches)
        self.start = by_hand.flat(self.named).clone()
        if self.case.precision != "fp64":
            self.parameters = self._now()
        true, self.weight = by_hand.window_gradient(self.parameters, inputs, targets)
        self.gradient = by_hand.flat(by_hand.clipped(true, self.parameters, self.case.clip, LARGEST[self.case.clip]))
        self.was_clipped |= not torch.equal(self.gradient, by_hand.flat(true))
        self.floor = 0.0
        if self.case.precision != "fp64":
            self.floor = plain_error(self.case, self.model, inputs, targets, self.gradient)

    def after_a_skip(self) -> None:
        if not torch.equal(by_hand.flat(self.named), self.start):
            self.wrong.append("a step that was not taken has changed the parameters")

    def after(self, report: Report) -> None:
        if report.skipped or report.weight != self.weight or report.clocks["steps"] != self.hand.steps + 1:
            self.wrong.append(f"skipped: {report.reason}, weight {report.weight} for {self.weight}, {report.clocks}")
        taken, now = by_hand.flat({name: p.grad for name, p in self.named.items()}), by_hand.flat(self.named)
        if self.case.precision == "fp64":
            moved = self.hand.moved(by_hand.flat(self.parameters), self.gradient)
            parts = moved.split([p.numel() for p in self.named.values()])
            self.parameters = {
                name: part.view_as(self.named[name]) for name, part in zip(self.named, parts, strict=True)
            }
            allowed = (1e-12, 1e-12)
        else:
            moved = self.hand.moved(by_hand.flat(self.parameters), taken.double())
            rounded = by_hand.apart(self.narrow.moved(self.start, taken), moved)
            allowed = (4 * max(self.floor, UNIT[self.case.precision]), 4 * max(rounded, UNIT["fp32"]))
        errors = (by_hand.apart(taken, self.gradient), by_hand.apart(now, moved))
        if not all(map(math.isfinite, errors)):
            self.wrong.append("not finite")
        new = (*errors, errors[0] / allowed[0], errors[1] / allowed[1])
        self.worst = tuple(map(max, self.worst, new))  # type: ignore[assignment]

    def found(self) -> Found:
        if self.was_clipped != (self.case.clip != "none"):
            self.wrong.append("the threshold changes nothing, so it tests nothing")
        return Found(*self.worst, wrong="; ".join(self.wrong))


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
