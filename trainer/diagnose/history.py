"""The gradient norm of each layer over the whole run, in a bounded number of columns: what a heat map is drawn from."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from trainer.diagnose.instrument import Instrument
from trainer.gradient import norms
from trainer.gradient.report import Report

COLUMNS = 200
"""At so many, two neighbours become one: a long run costs no more than a short one."""
LAYERS = 48
"""Above so many, names are cut shorter until neighbours fall together."""
NOT_FINITE = math.inf
NO_GRADIENT = math.nan


class History(Instrument):
    """Columns in the order of the run, each over as many reports as the others, but for the last one.

    Args:
        clock: whose count says where a column ends.

    Attributes:
        layers: the rows' names, each with the parameters in it: the norm of a row is that of all of them.
        places: the clock at each column's end.
        rows: of each column, the largest norm of each layer in its reports, before clipping by the whole norm; `inf`
            where one was not finite, NaN where there was no gradient.
        skips: windows that were skipped in each column.
    """

    def __init__(self, clock: str = "steps", columns: int = COLUMNS) -> None:
        self.clock = clock
        self.layers: dict[str, list[str]] = {}
        self.places: list[int] = []
        self.rows: list[list[float]] = []
        self.skips: list[int] = []
        self._columns = columns
        self._stride = 1
        self._held = 1  # reports in the last column
        self._counted = 0  # skips so far

    def look(self, parameters: Mapping[str, Tensor], report: Report) -> list[str]:
        if not report.skipped:
            self._make_room(parameters, report.clocks)
            found = layer_norms(parameters, report)
            factor = report.clip_factor or 1.0
            self._add([_joined(found, names) / factor for names in self.layers.values()])
            self._held += 1
        return []

    def skip(self, parameters: Mapping[str, Tensor], report: Report) -> None:
        self._make_room(parameters, report.clocks)
        gradients = {name: one.grad for name, one in parameters.items() if one.grad is not None}
        # What is finite among them may still be multiplied by a loss scale: only what is not is worth a mark.
        wrong = {name for name, norm in norms.each(gradients).items() if not math.isfinite(norm)}
        if report.weight and not math.isfinite(report.loss):
            wrong.update(parameters)  # a finite derivative of what is not finite says nothing
        self._add([NOT_FINITE if wrong.intersection(names) else NO_GRADIENT for names in self.layers.values()])

    def _make_room(self, parameters: Mapping[str, Tensor], clocks: Mapping[str, int]) -> None:
        """The last column takes one more report, or a new one is begun."""
        if not self.layers:
            self.layers = layers_of(parameters)
        if not self.rows or self._held >= self._stride:
            if len(self.rows) >= self._columns:
                self._merge()
            self.rows.append([NO_GRADIENT] * len(self.layers))
            self.places.append(0)
            self.skips.append(0)
            self._held = 0
        self.places[-1] = clocks.get(self.clock, 0)
        # On a device a skip is heard of only where a report is read: the clocks know of the others.
        skips = clocks.get("windows", 0) - clocks.get("steps", 0)
        self.skips[-1] += skips - self._counted
        self._counted = skips

    def _add(self, norms: list[float]) -> None:
        self.rows[-1] = [_larger(*pair) for pair in zip(self.rows[-1], norms, strict=True)]

    def _merge(self) -> None:
        pairs = zip(self.rows[::2], self.rows[1::2], strict=True)
        self.rows = [[_larger(*pair) for pair in zip(*columns, strict=True)] for columns in pairs]
        self.skips = [sum(pair) for pair in zip(self.skips[::2], self.skips[1::2], strict=True)]
        self.places = self.places[1::2]
        self._stride *= 2

    def state_dict(self) -> dict[str, Any] | None:
        if not self.rows:
            return None
        return {
            "clock": self.clock,
            "layers": self.layers,
            "places": self.places,
            "rows": torch.tensor(self.rows, dtype=torch.float64),
            "skips": self.skips,
            "stride": self._stride,
            "held": self._held,
            "counted": self._counted,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._counted = state["counted"]
        if state["clock"] != self.clock:
            return  # another axis: its places mean nothing here, so the map begins anew
        self.layers = {name: list(names) for name, names in state["layers"].items()}
        self.places, self.skips = list(state["places"]), list(state["skips"])
        self.rows = state["rows"].tolist()
        self._stride, self._held = state["stride"], state["held"]


def layer_norms(parameters: Mapping[str, Tensor], report: Report) -> dict[str, float]:
    """The norm of each parameter's gradient as the optimizer left it, measured once for a report."""
    if not report.layer_norms:
        gradients = {name: one.grad for name, one in parameters.items() if one.grad is not None}
        report.layer_norms = norms.each(gradients)
    return report.layer_norms


def layers_of(names: Iterable[str], most: int = LAYERS) -> dict[str, list[str]]:
    """Parameters by their layer, in order: `hidden.*` holds `hidden.weight` and `hidden.bias`.

    Where these are more than `most`, the names are cut shorter (`blocks.3.*`); where no cut is short enough, `most`
    bundles of neighbours are made.
    """
    names = list(names)
    depth = max((name.count(".") for name in names), default=0)
    for parts in range(depth, 0, -1):
        found: dict[str, list[str]] = {}
        for name in names:
            above = name.split(".")[:-1][:parts]
            found.setdefault(".".join(above) or name, []).append(name)
        if len(found) <= most:
            return {inside[0] if len(inside) == 1 else f"{layer}.*": inside for layer, inside in found.items()}
    size = math.ceil(len(names) / most) or 1
    bundles = [names[start : start + size] for start in range(0, len(names), size)]
    return {inside[0] if len(inside) == 1 else f"{inside[0]} … {inside[-1]}": inside for inside in bundles}


def _joined(norms: Mapping[str, float], names: Iterable[str]) -> float:
    there = [norms[name] for name in names if name in norms]
    if not there:
        return NO_GRADIENT
    norm = math.hypot(*there)
    return norm if math.isfinite(norm) else NOT_FINITE


def _larger(left: float, right: float) -> float:
    if left != left:
        return right
    return left if right != right or left >= right else right
