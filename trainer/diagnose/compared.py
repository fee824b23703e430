"""Gradients side by side: the norm of each, the cosine of each pair, and pairs that pull against each other."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from trainer.diagnose.instrument import Instrument
from trainer.gradient.report import Report

AGAINST = -0.5
"""A cosine below this is a conflict."""
IN_A_ROW = 3
"""So many measurements in a row must show it before anything is said."""

Parts = Sequence[Tensor | None]
"""One gradient, parameter by parameter; None where it does not reach one."""
Pair = tuple[str, str]


@dataclass(frozen=True)
class Compared:
    """The norm of each gradient by name, and the cosine of each pair; none where a norm is zero."""

    norms: dict[str, float]
    cosines: dict[Pair, float]

    @property
    def is_finite(self) -> bool:
        return all(math.isfinite(norm) for norm in self.norms.values())

    def scalars(self, group: str) -> dict[str, float]:
        """By TensorBoard's tag: `terms/energy/norm`, `terms/energy·force/cosine`."""
        found = {f"{group}/{name}/norm": norm for name, norm in self.norms.items()}
        return found | {f"{group}/{one}·{other}/cosine": cosine for (one, other), cosine in self.cosines.items()}


def compare(gradients: Mapping[str, Parts], factors: Mapping[str, float]) -> Compared:
    """Norms and cosines of gradients over the same parameters, summed in float64.

    Args:
        factors: what each gradient still has to be multiplied with.
    """
    names = sorted(gradients)  # a pair has one name, whatever came first
    gram: Tensor | None = None
    for parts in zip(*(gradients[name] for name in names), strict=True):
        there = next((part for part in parts if part is not None), None)
        if there is None:
            continue
        rows = torch.stack([_flat(there).new_zeros(there.numel()) if one is None else _flat(one) for one in parts])
        own = rows @ rows.mH
        own = (own.real if own.is_complex() else own).cpu()
        gram = own if gram is None else gram + own
    products = [[0.0] * len(names) for _ in names] if gram is None else gram.tolist()
    lengths = [math.sqrt(products[index][index]) for index in range(len(names))]
    norms = {name: lengths[index] * abs(factors[name]) for index, name in enumerate(names)}
    cosines = {}
    for (i, one), (j, other) in combinations(enumerate(names), 2):
        if lengths[i] * lengths[j] > 0.0:
            sign = math.copysign(1.0, factors[one]) * math.copysign(1.0, factors[other])
            cosines[one, other] = sign * max(-1.0, min(1.0, products[i][j] / (lengths[i] * lengths[j])))
    return Compared(norms, cosines)


def _flat(gradient: Tensor) -> Tensor:
    dense = gradient.to_dense() if gradient.layout is not torch.strided else gradient
    if dense.device.type == "mps":  # it has no float64
        return dense.reshape(-1).float()
    return dense.reshape(-1).to(torch.complex128 if dense.is_complex() else torch.float64)


@dataclass
class Conflicts:
    """Which pairs pull against each other, each told once."""

    what: str
    """In words: `terms`, `sources`."""
    advice: str
    in_a_row: dict[Pair, int] = field(default_factory=dict)
    said: set[Pair] = field(default_factory=set)
    latest: dict[Pair, float] = field(default_factory=dict)

    def look(self, found: Compared) -> list[str]:
        """The sentences for pairs that have been in conflict long enough now."""
        sentences = []
        for pair, cosine in found.cosines.items():
            self.latest[pair] = cosine
            self.in_a_row[pair] = self.in_a_row.get(pair, 0) + 1 if cosine < AGAINST else 0
            if self.in_a_row[pair] >= IN_A_ROW and pair not in self.said:
                self.said.add(pair)
                sentences.append(
                    f"the {self.what} '{pair[0]}' and '{pair[1]}' pull against each other: the cosine of their "
                    f"gradients was below {AGAINST:g} in {IN_A_ROW} measurements in a row (now {cosine:.2f}); "
                    f"{self.advice}."
                )
        return sentences

    def words(self) -> list[str]:
        """For the run's end: the pairs that were told, as they are now."""
        return [
            f"{self.what} '{one}' and '{other}' against each other (cosine {self.latest[one, other]:.2f})"
            for one, other in sorted(self.said)
            if (one, other) in self.latest
        ]

    def state_dict(self) -> dict[str, Any]:
        return {
            "in_a_row": [[*pair, count] for pair, count in self.in_a_row.items()],
            "said": [list(pair) for pair in sorted(self.said)],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.in_a_row = {(one, other): count for one, other, count in state["in_a_row"]}
        self.said = {(one, other) for one, other in state["said"]}


class Comparing(Instrument):
    """What the instruments share that compare the gradients of a window's parts, every so many windows.

    Args:
        step: whose windows are looked at.
        every: one of so many windows is measured, and the first.
        what: is compared, in words and for the tags: `terms`, `sources`.
        setting: which asks for it.
        advice: for two that pull against each other.

    Attributes:
        latest: what was measured last.
    """

    def __init__(self, step: Any, every: int, what: str, setting: str, advice: str) -> None:
        self.latest: Compared | None = None
        self._step = step
        self._every = every
        self._what = what
        self._setting = setting
        self._shown: Compared | None = None
        self._sentences: list[str] = []
        self._conflicts = Conflicts(what, advice)

    def notes(self) -> list[str]:
        if self._step.ranks.world_size == 1:
            return []
        return [f"{self._setting} looks at each rank's own rows: what is shown is of rank 0's."]

    def look(self, parameters: Mapping[str, Tensor], report: Report) -> list[str]:
        if self.latest is not None and self.latest is not self._shown:
            self._shown = self.latest
            report.measured.update(self.latest.scalars(self._what))
        said, self._sentences = self._sentences, []
        return said

    def words(self) -> list[str]:
        return self._conflicts.words()

    def state_dict(self) -> dict[str, Any]:
        return self._conflicts.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._conflicts.load_state_dict(state)
