"""How fast a run goes: clocks per second of training, with the time in evaluation left out."""

from collections.abc import Mapping


class Rate:
    """Measures between calls. `clocks` is where the run starts; its seconds start at zero."""

    def __init__(self, clocks: Mapping[str, int]) -> None:
        self._clocks: Mapping[str, int] = clocks
        self._seconds = 0.0
        self._paused = 0.0

    def pause(self, seconds: float) -> None:
        """So many of the seconds since the last call went into something other than training."""
        self._paused += seconds

    def measure(self, clocks: Mapping[str, int], seconds: float) -> tuple[float, float] | None:
        """Steps and rows per second since the last call, or None where no time went by."""
        elapsed = seconds - self._seconds - self._paused
        if elapsed <= 0:
            return None
        before = self._clocks
        steps, rows = ((clocks.get(name, 0) - before.get(name, 0)) / elapsed for name in ("steps", "rows"))
        self._clocks, self._seconds, self._paused = clocks, seconds, 0.0
        return steps, rows
