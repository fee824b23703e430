"""When a run's windows are caught for `trainer replay`: those that were skipped as something in them is not finite, and
the one that was asked for. While all is well it costs nothing; where it fails, the run goes on and a sentence says why.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer.checkpoint import folder
from trainer.diagnose.capture import capture, captured, in_mib
from trainer.errors import CheckpointError, DivergedError
from trainer.feed import Feed
from trainer.gradient.report import Report
from trainer.gradient.skips import ZERO_WEIGHT
from trainer.settings import Settings
from trainer.step import Step


class Capturing:
    """The windows of one run.

    Args:
        config: what the run is made from, and every setting.
        run: its folder; without one nothing is caught.
        tell: what hears each sentence.

    Attributes:
        words: what to type to run the window in a folder again.
    """

    def __init__(
        self,
        step: Step,
        feed: Feed,
        settings: Settings,
        config: dict[str, Any],
        run: Path | None,
        tell: Callable[[str], None],
    ) -> None:
        self._step = step
        self._feed = feed
        self._settings = settings.diagnose
        self._config = config
        self._run = run
        self._tell = tell
        self._said: set[str] = set()
        self._last = -1
        self.words: Callable[[Path], str] = lambda path: f'trainer.replay("{path.as_posix()}", model, objective)'
        if run is None:
            return
        feed.keeps_generators = self._settings.capture != "none" or self._settings.capture_at is not None
        if self._settings.capture_at is not None:
            feed.drawn = self._drawn

    def skipped(self, report: Report) -> None:
        """A window was skipped. On a device that is known only when its report is read: it must still be the last."""
        wanted = self._settings.capture
        windows = self._step.clocks.windows
        if self._run is None or wanted == "none" or report.clocks.get("windows") != windows:
            return
        if report.overflowed:
            if wanted == "all":
                self._catch(windows, report.reason, report.loss_scale)
        elif report._diverged or (report._skipped is not True and report.reason != ZERO_WEIGHT):
            self._catch(windows, report.reason, report.loss_scale)

    def raised(self, error: BaseException) -> None:
        """The run ends by an error; with nonfinite=raise that is how a skip shows."""
        if self._run is None or self._settings.capture == "none" or not isinstance(error, DivergedError):
            return
        if self._step.settings.nonfinite == "raise" and self._feed.window is not None:
            self._catch(self._step.clocks.windows, str(error))

    def _drawn(self, window: Any) -> None:
        clocks = self._step.clocks.read()
        if clocks.steps + 1 == self._settings.capture_at and not self._step.is_open:
            self._feed.drawn = None
            self._catch(clocks.windows + 1, "it was asked for (diagnose.capture_at)")

    def _catch(self, number: int, why: str | None, loss_scale: float | None = None) -> None:
        """Catch the window that was drawn last, the run's window `number`."""
        if self._run is None or number == self._last:
            return
        self._last = number
        most, rank = self._settings.capture_most, self._step.ranks.rank
        name = f"window-{number:06d}{f'-rank-{rank}' if rank else ''}"
        try:
            there = sum(("-rank-" in one.name) == bool(rank) and _number(one) < number for one in captured(self._run))
            if there >= most:
                return
            path = self._run / folder.CAPTURED / name
            if path.exists():
                shutil.rmtree(path)  # by this run, before it was stopped and came to this window once more
            self._take(path, str(why), loss_scale)
        except (CheckpointError, OSError, RuntimeError, MemoryError) as error:
            if (what := type(error).__name__) not in self._said:
                self._said.add(what)
                self._tell(f"window {number:,} was not captured for trainer replay: {error}")
            return
        last = f" (the last of {most}: diagnose.capture_most)" if there + 1 == most > 1 else ""
        self._tell(f"window {number:,} is kept as it was{last}; what made it so is named by {self.words(path)}")

    def _take(self, path: Path, why: str, loss_scale: float | None) -> None:
        window = list(self._feed.window or ())
        generators, unknown = self._feed.before_forward()
        made = capture(
            self._step,
            window,
            why=why,
            generators=generators,
            unknown=unknown,
            loss_scale=loss_scale,
            rows=self._feed.row_numbers(len(window)),
            config=self._config,
        )
        allowed = self._settings.capture_mib
        if made.size > allowed * (1 << 20):
            raise CheckpointError(f"it takes {in_mib(made.size)}, and diagnose.capture_mib allows {allowed:g}.")
        made.save(path)


def _number(captured: Path) -> int:
    """The window's, by the folder's name."""
    number = captured.name.split("-")[1]
    return int(number) if number.isdecimal() else 0
