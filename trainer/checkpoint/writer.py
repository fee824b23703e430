"""Saves off the step's path: one thread, one save at a time, and no error is lost."""

import threading
from collections.abc import Callable


class Writer:
    """Runs one job at a time on a thread of its own.

    The thread keeps the process alive until its job is done. An error comes up at the next `check`, `start` or `wait`.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, job: Callable[[], None]) -> None:
        """Begin a job; waits for the one before it."""
        self.wait()
        self._thread = threading.Thread(target=self._run, args=(job,), name="checkpoint", daemon=False)
        self._thread.start()

    def wait(self) -> None:
        """Until nothing is being written. Raises the error of what was."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def check(self) -> None:
        """Raises the error of a job that has ended, once."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _run(self, job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as error:
            self._error = error
