"""What gradients do over time: layers whose gradient vanished, exploded or stopped coming, each said once.

It looks when reports are logged, not at every step: one norm for each parameter then.
"""

import math
import statistics
from collections import deque
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from trainer.diagnose.history import layer_norms
from trainer.diagnose.instrument import Instrument
from trainer.diagnose.words import listed
from trainer.gradient.report import Report

VANISHED = 1e-5
"""Root mean square of a gradient's elements, as a share of the largest among the parameters, below which it counts as
vanished: in a chain of sigmoids a layer keeps at most a quarter, so some nine layers are enough for it."""
EXPLODED = 100.0
"""How many times the median of the norms so far."""
IN_A_ROW = 3
_REMEMBERED = 50


class Watch(Instrument):
    """Looks at gradients now and then, and remembers what it said."""

    def __init__(self) -> None:
        self._norms: deque[float] = deque(maxlen=_REMEMBERED)
        self._small: dict[str, int] = {}
        self._missing: dict[str, int] = {}
        self._had: set[str] = set()
        self._said: set[str] = set()
        self._looks = 0
        self._skips = 0

    def look(self, parameters: Mapping[str, Tensor], report: Report) -> list[str]:
        if report.skipped:
            self._skips += 1
            return []
        self._looks += 1
        norms = layer_norms(parameters, report)
        sizes = {name: norm / math.sqrt(max(1, parameters[name].numel())) for name, norm in norms.items()}
        step = report.clocks.get("steps", 0)
        return [
            *self._vanished(parameters, sizes, step),
            *self._stale(parameters, sizes, step),
            *self._exploded(report, norms),
        ]

    def state_dict(self) -> dict[str, Any]:
        return {
            "norms": list(self._norms),
            "small": dict(self._small),
            "missing": dict(self._missing),
            "had": sorted(self._had),
            "said": sorted(self._said),
            "looks": self._looks,
            "skips": self._skips,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._norms = deque(state["norms"], maxlen=_REMEMBERED)
        self._small, self._missing = dict(state["small"]), dict(state["missing"])
        self._had, self._said = set(state["had"]), set(state["said"])
        self._looks, self._skips = state["looks"], state["skips"]

    def words(self) -> list[str]:
        if not self._looks:
            return []
        said = []
        if self._norms:
            low, high = min(self._norms), max(self._norms)
            said.append(f"median norm {statistics.median(self._norms):.3g}, between {low:.3g} and {high:.3g}")
        for word in ("vanished", "exploded", "stopped"):
            names = [name for what, _, name in (key.partition(" ") for key in sorted(self._said)) if what == word]
            if names:
                said.append(f"{word}: {listed(names)}" if word != "exploded" else "it exploded at least once")
        return said

    def _vanished(self, parameters: Mapping[str, Tensor], sizes: Mapping[str, float], step: int) -> list[str]:
        largest = max((name for name in sizes if math.isfinite(sizes[name])), key=sizes.__getitem__, default=None)
        if largest is None or not sizes[largest]:
            return []
        # A vector may have none by design: the bias of an attention's keys, or one in front of a batch norm.
        matrices = [name for name in sizes if parameters[name].dim() > 1]
        small = [name for name in matrices if sizes[name] <= VANISHED * sizes[largest]]
        self._small = {name: self._small.get(name, 0) + 1 for name in small}
        new = [name for name, count in self._small.items() if count >= IN_A_ROW and self._is_new(f"vanished {name}")]
        if not new:
            return []
        zero = [name for name in new if not sizes[name]]
        if len(zero) == len(new):
            return [f"the gradient of {listed(new)} is zero at step {step:,} and was so in the last {IN_A_ROW} looks."]
        smallest = min(new, key=sizes.__getitem__)
        return [
            f"the gradient of {listed(new)} has vanished: {sizes[smallest]:.1e} an element in '{smallest}' at step "
            f"{step:,}, against {sizes[largest]:.1e} in '{largest}'."
        ]

    def _stale(self, parameters: Mapping[str, Tensor], sizes: Mapping[str, float], step: int) -> list[str]:
        self._had.update(sizes)
        missing = [name for name in parameters if name not in sizes and name in self._had]
        self._missing = {name: self._missing.get(name, 0) + 1 for name in missing}
        new = [name for name, count in self._missing.items() if count >= IN_A_ROW and self._is_new(f"stopped {name}")]
        return [f"no gradient reaches {listed(new)} any more, at step {step:,}; before, one did."] if new else []

    def _exploded(self, report: Report, norms: Mapping[str, float]) -> list[str]:
        norm = report.grad_norm
        if norm is None:
            norm = math.hypot(*norms.values())
        usual = statistics.median(self._norms) if len(self._norms) >= IN_A_ROW else math.inf
        self._norms.append(norm)
        if norm <= EXPLODED * usual or not self._is_new("exploded"):
            return []
        return [
            f"the gradient exploded: its norm is {norm:.3g} at step {report.clocks.get('steps', 0):,}, "
            f"{norm / usual:.0f} times the usual {usual:.3g}."
        ]

    def _is_new(self, what: str) -> bool:
        if what in self._said:
            return False
        self._said.add(what)
        return True
