"""When a run ends: the limits, looked at after every window."""

import time
from collections.abc import Callable

from trainer.checkpoint.run_state import RunState
from trainer.errors import ConfigError
from trainer.gradient.clocks import Clocks, counted
from trainer.settings import LimitSettings


class Limits:
    """The first of the limits that is reached ends the run.

    Seconds are of a clock that cannot jump: setting the machine's time neither ends a run nor keeps it alive.
    """

    def __init__(self, clocks: Clocks) -> None:
        self._settings = LimitSettings()
        self._clocks = clocks
        self._state: RunState | None = None
        self._counted: list[tuple[str, int]] = []
        self._began = 0.0
        self.wait_for_others = False
        """Whether the time is over only when other ranks know it too, which is when `is_over` says so."""
        self.is_over = False

    def start(self, settings: LimitSettings, state: RunState) -> None:
        """The run begins or goes on. Raises ConfigError where no limit would ever end it."""
        self._settings, self._state = settings, state
        if settings.epochs is settings.steps is settings.rows is settings.time is None:
            raise ConfigError("no limit is set, so the run would never end: set limits.epochs, steps, rows or time.")
        limits = {"steps": settings.steps, "rows": settings.rows, "epochs": settings.epochs}
        self._counted = [(clock, limit) for clock, limit in limits.items() if limit is not None]
        self._began = time.monotonic()
        self.is_over = False

    @property
    def seconds(self) -> float:
        """Since the run began or went on."""
        return time.monotonic() - self._began

    def time_is_over(self) -> bool:
        """Whether it is by this process's clock."""
        return self._settings.time is not None and self.seconds >= self._settings.time

    def ends(self, is_at_end: Callable[[], bool]) -> bool:
        """Whether the window that was drawn is the run's last, as far as the clocks tell. `is_at_end`: of the epoch."""
        for clock, limit in self._counted:
            by_epochs = clock == "epochs"
            if self._clocks.has_reached(clock, limit - by_epochs) and (not by_epochs or is_at_end()):
                return True
        return False

    def reached(self) -> str | None:
        """Which limit is reached, in words."""
        settings = self._settings
        for clock, limit in self._counted:
            if self._clocks.has_reached(clock, limit):
                return f"{counted(limit, clock.removesuffix('s'))} done"
        if self.is_over or (not self.wait_for_others and self.time_is_over()):
            return f"{settings.time:g} seconds are over"
        if settings.patience is not None and self._state and self._state.evaluations_without_best >= settings.patience:
            return f"no new best in {settings.patience} evaluations"
        return None
