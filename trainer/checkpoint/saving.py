"""When the state of a run is saved and which checkpoints stay: on a thread while training goes on, one at a time."""

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from trainer.checkpoint import folder, store
from trainer.checkpoint.lock import Lock
from trainer.checkpoint.nested import Snapshot, snapshot
from trainer.checkpoint.store import Label
from trainer.checkpoint.writer import Writer
from trainer.errors import CheckpointError, TrainerWarning
from trainer.settings import CheckpointSettings


class Saving:
    """The checkpoints of one run, written.

    Between `begin` and `end` the run's folder is locked. What is saved is a copy in memory, so training goes on while
    it is written; an error of that comes up at the next `look`, `save` or `wait`.
    """

    def __init__(self, run: Path, settings: CheckpointSettings) -> None:
        self.run = run
        self._settings = settings
        self._writer = Writer()
        self._lock = Lock(run)

    def begin(self) -> None:
        """Lock the folder, and remove what a save that was cut off has left there.

        Raises CheckpointError, also for what is in the way of a save that comes much later.
        """
        locks = self._lock.take()
        try:
            folder.check_way(self.run)
        except CheckpointError:
            self._lock.release()
            raise
        if locks:
            folder.sweep(self.run)

    def end(self) -> None:
        """Let the folder go, once nothing is being written. Raises the error of what was."""
        try:
            self._writer.wait()
        finally:
            self._lock.release()

    def save(
        self,
        state: Mapping[str, Any],
        clocks: Mapping[str, int],
        best: tuple[str, float] | None = None,
        check: Callable[[Snapshot], None] | None = None,
        world: int = 1,
    ) -> None:
        """Save a state. `best` is its metric and value where no evaluation was better; `check` may refuse the copy.

        Raises CheckpointError for what cannot be saved, or for an earlier save that failed.
        """
        taken = snapshot(state)

        def job() -> None:
            if check is not None:
                check(taken)
            self._write(taken, clocks, best, world)

        if self._settings.background:
            self._quietly(self._writer.wait)
            self._writer.start(job)
        else:
            self._quietly(job)

    def put_aside(self) -> bool:
        """Give the folder's checkpoints another name, for a run that begins anew. Whether there were any."""
        try:
            return folder.put_aside(self.run)
        except OSError as error:
            raise CheckpointError(
                f"{self.run}: an earlier run's checkpoints could not be put aside ({error}): choose another folder."
            ) from None

    def look(self) -> None:
        """Called after every window: raises the error of a save that failed meanwhile."""
        self._quietly(self._writer.check)

    def wait(self) -> None:
        """Until all is on the disk. Raises the error of a save that failed, whatever `on_error` says."""
        self._writer.wait()

    def _quietly(self, act: Callable[[], None]) -> None:
        try:
            act()
        except CheckpointError as error:
            if self._settings.on_error == "stop":
                raise
            warnings.warn(f"{error} Training goes on (checkpoint.on_error=warn).", TrainerWarning, stacklevel=4)

    def _write(self, taken: Snapshot, clocks: Mapping[str, int], best: tuple[str, float] | None, world: int) -> None:
        there = folder.listed(self.run)
        newest = there[-1].manifest if there else None
        # At the end of a run, or when an evaluation was the best, the very state may be there already.
        same = newest is not None and newest.clocks == clocks and (best is None or newest.best is not None)
        if not (same and newest is not None and store.is_same(taken, newest)):
            label = Label(newest.number + 1 if newest is not None else 1, clocks, best, world)
            store.write(folder.unused(self.run, clocks["steps"]), taken, label)
        keep = self._settings
        try:
            there = folder.listed(self.run)
            folder.prune(self.run, folder.kept(there, keep.keep_last, keep.keep_best, keep.keep_every, keep.clock))
        except OSError as error:
            raise CheckpointError(
                f"{self.run}: the checkpoints that need not stay could not be removed ({error})."
            ) from None
