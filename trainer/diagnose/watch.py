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
from trainer.diagnose.instrument import Instrument, Trouble
from trainer.diagnose.words import listed
from trainer.gradient.report import Report

VANISHED = 1e-5
"""Root mean square of a gradient's elements, as a share of the largest among the parameters, below which it counts as
vanished: in a chain of sigmoids a layer keeps at most a quarter, so some nine layers are enough for it."""
EXPLODED = 100.0
"""How many times the median of the norms so far."""
DOWN_AGAIN = 10.0
"""An explosion is over where the norm is at most so many times what was usual before."""
IN_A_ROW = 3
_REMEMBERED = 50


class Watch(Instrument):
    """Looks at gradients now and then, and remembers what it said."""

    def __init__(self) -> None:
        self._norms: deque[float] = deque(maxlen=_REMEMBERED)
        self._low, self._high = math.inf, 0.0
        self._small: dict[str, int] = {}
        self._missing: dict[str, int] = {}
        self._had: set[str] = set()
        self._since: dict[str, int] = {}  # what was said, `vanished 0.weight`, and at which step
        self._usual = math.inf  # the median when it exploded
        self._extremes = ""  # of the vanished ones, in words
        self._looks = 0
        self._clipped = 0
        self._clips = False

    def look(self, parameters: Mapping[str, Tensor], report: Report) -> list[str]:
        if report.skipped:
            return []
        self._looks += 1
        factor = report.clip_factor
        if factor is not None:
            self._clips = True
            self._clipped += factor < 1.0
        norms = layer_norms(parameters, report)
        sizes = {name: norm / math.sqrt(max(1, parameters[name].numel())) for name, norm in norms.items()}
        step = report.clocks.get("steps", 0)
        return [
            *self._vanished(parameters, sizes, step),
            *self._stale(parameters, sizes, step),
            *self._exploded(report, norms, step),
        ]

    def state_dict(self) -> dict[str, Any]:
        return {
            "norms": list(self._norms),
            "low": self._low,
            "high": self._high,
            "small": dict(self._small),
            "missing": dict(self._missing),
            "had": sorted(self._had),
            "since": dict(self._since),
            "usual": self._usual,
            "extremes": self._extremes,
            "looks": self._looks,
            "clipped": self._clipped,
            "clips": self._clips,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._norms = deque(state["norms"], maxlen=_REMEMBERED)
        self._low, self._high = state["low"], state["high"]
        self._small, self._missing = dict(state["small"]), dict(state["missing"])
        self._had, self._since = set(state["had"]), dict(state["since"])
        self._usual, self._extremes = state["usual"], state["extremes"]
        self._looks, self._clipped, self._clips = state["looks"], state["clipped"], state["clips"]

    def troubles(self) -> list[Trouble]:
        found = []
        still, over = self._parted("vanished", self._small)
        if still:
            found.append(("vanishing", f"{listed(still)} since step {self._first('vanished', still)}{self._extremes}"))
        elif over:
            found.append(("vanished", f"{listed(over)} for a while, from step {self._first('vanished', over)} on"))
        gone, _ = self._parted("stopped", self._missing)
        if gone:
            found.append(("stopped", f"no gradient reaches {listed(gone)} since step {self._first('stopped', gone)}"))
        if "exploded" in self._since:
            at = f"step {self._since['exploded']:,}, up to {self._high:.3g} where {self._usual:.3g} was usual"
            lasts = not self._norms or self._norms[-1] > DOWN_AGAIN * self._usual
            found.append(("exploding", f"since {at}") if lasts else ("exploded", f"at {at}; it came down again"))
        if "not finite" in self._since:
            found.append(("not finite", f"the norm at step {self._since['not finite']:,}, and the step was taken"))
        return found

    def words(self) -> list[str]:
        if not self._norms:
            return []
        said = f"median norm {statistics.median(self._norms):.3g}, between {self._low:.3g} and {self._high:.3g}"
        if self._clips:
            said += f", clipped in {self._clipped:,} of the {self._looks:,} steps looked at"
            said += f" ({self._clipped / self._looks:.0%})" if self._looks > 9 else ""
        return [said]

    def _parted(self, what: str, now: Mapping[str, int]) -> tuple[list[str], list[str]]:
        """Of those that something was said of: where it is still so, and where it is over."""
        names = [name for word, _, name in (key.partition(" ") for key in self._since) if word == what]
        return [name for name in names if name in now], [name for name in names if name not in now]

    def _first(self, what: str, names: list[str]) -> str:
        return f"{min(self._since[f'{what} {name}'] for name in names):,}"

    def _vanished(self, parameters: Mapping[str, Tensor], sizes: Mapping[str, float], step: int) -> list[str]:
        largest = max((name for name in sizes if math.isfinite(sizes[name])), key=sizes.__getitem__, default=None)
        if largest is None or not sizes[largest]:
            return []
        # A vector may have none by design: the bias of an attention's keys, or one in front of a batch norm.
        matrices = [name for name in sizes if parameters[name].dim() > 1]
        small = [name for name in matrices if sizes[name] <= VANISHED * sizes[largest]]
        self._small = {name: self._small.get(name, 0) + 1 for name in small}
        if small:
            smallest = min(small, key=sizes.__getitem__)
            self._extremes = f"; {sizes[smallest]:.1e} an element in '{smallest}', {sizes[largest]:.1e} in '{largest}'"
        new = [
            name for name, count in self._small.items() if count >= IN_A_ROW and self._is_new("vanished", name, step)
        ]
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
        late = [name for name, count in self._missing.items() if count >= IN_A_ROW]
        new = [name for name in late if self._is_new("stopped", name, step)]
        return [f"no gradient reaches {listed(new)} any more, at step {step:,}; before, one did."] if new else []

    def _exploded(self, report: Report, norms: Mapping[str, float], step: int) -> list[str]:
        norm = report.grad_norm
        if norm is None:
            norm = math.hypot(*norms.values())
        if not math.isfinite(norm):
            if not self._is_new("not finite", "", step):
                return []
            # Finite numbers beyond 1e19 have squares beyond float32.
            why = "gradient.nonfinite=allow" if math.isnan(norm) else "gradient.clip_norm would have bounded it"
            return [f"the gradient's norm is {norm:g} at step {step:,}, and the step was taken ({why})."]
        usual = statistics.median(self._norms) if len(self._norms) >= IN_A_ROW else math.inf
        self._norms.append(norm)
        self._low, self._high = min(self._low, norm), max(self._high, norm)
        if norm <= EXPLODED * usual or not self._is_new("exploded", "", step):
            return []
        self._usual = usual
        return [
            f"the gradient exploded: its norm is {norm:.3g} at step {step:,}, "
            f"{norm / usual:.0f} times the usual {usual:.3g}."
        ]

    def _is_new(self, what: str, name: str, step: int) -> bool:
        key = f"{what} {name}" if name else what
        if key in self._since:
            return False
        self._since[key] = step
        return True
