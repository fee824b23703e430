"""How far a step moves each parameter for its size: the norm of the change over the norm before it."""

import math
import statistics
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from trainer.diagnose.instrument import Instrument
from trainer.gradient import norms
from trainer.gradient.open_window import OpenWindow
from trainer.gradient.report import Report

WHOLE, EACH = "optimizer/update_ratio", "update_ratio/"


class UpdateRatio(Instrument):
    """Measures every so many windows; hangs itself into the step.

    It costs, in a window that is measured, a copy of the parameters between the last backward and the step, when the
    activations are gone already, three passes over it, and one read of the device. Whatever the optimizer does to
    them counts: learning rate, momentum, decay, rounding.

    Args:
        step: whose parameters are looked at.
        every: one of so many windows is measured, and the first.

    Attributes:
        latest: what was measured last, by TensorBoard's tag; a parameter that was zero has no ratio. None before, and
            where a step moved nothing, as a skipped one does.
    """

    tags = (WHOLE, EACH)

    def __init__(self, step: Any, every: int) -> None:
        self.latest: dict[str, float] | None = None
        self._step = step
        self._every = every
        self._before: dict[str, Tensor] = {}
        self._shown: dict[str, float] | None = None
        self._wholes: list[float] = []
        step.after_backward.append(self._after)

    def look(self, parameters: Mapping[str, Tensor], report: Report) -> list[str]:
        self._measure()
        if self.latest is not None and self.latest is not self._shown:
            self._shown = self.latest
            report.measured.update(self.latest)
        return []

    def words(self) -> list[str]:
        if self.latest is None or not self._wholes:
            return []
        each = {name: ratio for name, ratio in self.latest.items() if name.startswith(EACH) and ratio}
        said = f"a step moves the parameters by {statistics.median(self._wholes):.1e} of their norm (median)"
        if len(each) > 1:
            least, most = min(each, key=each.__getitem__), max(each, key=each.__getitem__)
            ends = (f"{each[name]:.1e} in '{name.removeprefix(EACH)}'" for name in (least, most))
            said += f"; at last by {' to '.join(ends)}"
        return [said]

    def state_dict(self) -> dict[str, Any]:
        return {"wholes": list(self._wholes)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._wholes = list(state["wholes"])

    def _after(self, window: OpenWindow, roots: list[Tensor]) -> None:
        """A micro-batch is done; after a window's last one comes the step."""
        self._measure()  # of a step whose report nobody read
        count = self._step.clocks.windows
        is_due = not count or not (count + 1) % self._every
        if is_due and window.drawn is not None and window.micro_batches == len(window.drawn):
            self._before = {name: one.detach().clone() for name, one in self._step.parameters.by_name.items()}

    def _measure(self) -> None:
        """Compare with the copy, if there is one: between two steps the parameters stay as the first has left them."""
        before, self._before = self._before, {}
        if not before:
            return
        sizes = norms.each(before)
        now = self._step.parameters.by_name
        torch._foreach_sub_(list(before.values()), [now[name].detach() for name in before])
        changes = norms.each(before)
        whole, change = math.hypot(*sizes.values()), math.hypot(*changes.values())
        if not whole or not change:
            return
        self.latest = {WHOLE: change / whole}
        self.latest |= {f"{EACH}{name}": changes[name] / size for name, size in sizes.items() if size}
        self._wholes = [*self._wholes[-_REMEMBERED + 1 :], change / whole]


_REMEMBERED = 200
