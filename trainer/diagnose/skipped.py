"""Skipped windows in words: how many, the last one's place and reason, which were due to fp16's loss scale."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from trainer.diagnose.instrument import Instrument, Trouble
from trainer.gradient.clocks import counted
from trainer.gradient.report import Report


class Skipped(Instrument):
    """Counts what it hears of; on a device that is only the skips among the reports that are read.

    Args:
        step: whose clocks know how many there were in all.
    """

    def __init__(self, step: Any) -> None:
        self._step = step
        self._heard = 0
        self._overflows = 0
        self._last = ""

    def skip(self, parameters: Mapping[str, Tensor], report: Report) -> None:
        self._heard += 1
        if report.overflowed:
            self._overflows += 1
            return
        self._last = f"the last after step {report.clocks.get('steps', 0):,}: {report.reason}"

    def troubles(self) -> list[Trouble]:
        total, windows = self._total()
        if not total or (self._overflows and self._overflows == self._heard):
            return []
        said = f"{total:,} of {counted(windows, 'window')} ({_share(total, windows)})"
        if self._overflows:
            said += f", {self._overflows:,} of them to find fp16's loss scale"
        return [("skipped", f"{said}, {self._last}" if self._last else said)]

    def words(self) -> list[str]:
        total, _ = self._total()
        if not total or self._overflows < self._heard or not self._overflows:
            return []
        return [f"{counted(total, 'window')} skipped to find fp16's loss scale, as is usual"]

    def state_dict(self) -> dict[str, Any]:
        return {"heard": self._heard, "overflows": self._overflows, "last": self._last}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._heard, self._overflows, self._last = state["heard"], state["overflows"], state["last"]

    def _total(self) -> tuple[int, int]:
        clocks = self._step.clocks.read()
        return clocks.windows - clocks.steps, clocks.windows


def _share(part: int, whole: int) -> str:
    share = 100 * part / whole
    return f"{share:.0f} %" if share >= 1 else f"{share:.1g} %"
