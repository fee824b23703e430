"""Processes that load data, watched: a death is a clear error within seconds, silence a warning and then an error.

By default torch waits for ever for a worker that hangs, and tells a death by an exception out of a signal handler,
wherever the program happens to be. Here the loader is asked for its next batch a second at a time instead.
"""

import multiprocessing
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import suppress
from types import FrameType
from typing import Any

from torch.utils.data import DataLoader

from trainer.data.worker_errors import explained, report_what_cannot_be_sent
from trainer.errors import DataError, TrainerWarning

PATIENCE = 1.0
"""Seconds after which a loader that gave nothing looks whether its workers live: its `timeout`."""
SILENCE = 10.0
"""Seconds without a batch after which a warning is given."""

_DEATH = ("DataLoader worker (pid", "Pin memory thread exited")


def deaf(worker: int) -> None:
    """What a worker does first: signals that go to a whole group of processes are its parent's to answer, and what it
    cannot send it tells."""
    del worker
    report_what_cannot_be_sent()
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def watched(loader: "DataLoader[Any]", timeout: float | None) -> Iterator[Any]:
    """The batches of a loader that was made with `timeout=PATIENCE` and `worker_init_fn=deaf`.

    Args:
        timeout: seconds without a batch after which it is given up; None: never.

    Raises DataError for a worker that died or was silent for too long. No worker outlives the iterator.
    """
    batches, workers = _begun(loader)
    try:
        while True:
            try:
                batch = _next(batches, workers, timeout)
            except StopIteration:
                return
            yield batch
    finally:
        _end(workers)


def told(loader: "DataLoader[Any]") -> Iterator[Any]:
    """The batches of a loader of the user's, as it is. Raises DataError for a worker that died."""
    batches, workers = _begun(loader)
    try:
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except (RuntimeError, OSError, EOFError, MemoryError) as error:
                if found := explained(error):
                    raise found from error
                if not _is_of_death(error, workers):
                    raise
                raise DataError(died(error)) from None
            yield batch
    finally:
        if not loader.persistent_workers:
            _end(workers)


def _begun(loader: "DataLoader[Any]") -> tuple[Iterator[Any], list[Any]]:
    others = {child.pid for child in multiprocessing.active_children()}
    batches = iter(loader)
    unhurried()
    return batches, [child for child in multiprocessing.active_children() if child.pid not in others]


def _end(workers: list[Any]) -> None:
    for worker in workers:
        if worker.is_alive():
            worker.kill()
    for worker in workers:
        worker.join(5.0)


def _next(batches: Iterator[Any], workers: list[Any], timeout: float | None) -> Any:
    began, warned = time.monotonic(), False
    while True:
        try:
            return next(batches)
        except (RuntimeError, OSError, EOFError, MemoryError) as error:
            if "DataLoader timed out" not in str(error):
                if found := explained(error):
                    raise found from error
                if not _is_of_death(error, workers):
                    raise
                raise DataError(died(error)) from None
        waited = time.monotonic() - began
        if timeout is not None and waited >= timeout:
            raise DataError(
                f"no worker gave a micro-batch for {waited:.0f} seconds (data.timeout={timeout:g}): one hangs in the "
                "dataset's code or in reading; look there with data.workers=0, or set a longer data.timeout."
            )
        if waited >= SILENCE and not warned:
            warned = True
            left = "" if timeout is None else f"; after {timeout:g} it is given up (data.timeout)"
            warnings.warn(
                f"no worker has given a micro-batch for {waited:.0f} seconds{left}.", TrainerWarning, stacklevel=3
            )


def _is_of_death(error: BaseException, workers: list[Any]) -> bool:
    """Whether a worker is gone. What it had in its hands comes as whatever reading the rest of it gives."""
    if isinstance(error, RuntimeError):
        return is_death(error)
    until = time.monotonic() + 3.0  # the system may still be at its end
    while time.monotonic() < until:
        if not all(worker.is_alive() for worker in workers):
            return True
        time.sleep(0.05)
    return False


def is_death(error: BaseException) -> bool:
    """Whether this is what torch raises for a worker that is gone."""
    return isinstance(error, RuntimeError) and str(error).startswith(_DEATH)


def died(error: BaseException) -> str:
    """The sentence for it."""
    return (
        f"a process that loads data died ({' '.join(str(error).split()) or type(error).__name__}): it was killed, "
        "often because memory ran out, or it crashed in the dataset's code; lower data.workers or data.batch_size, or "
        "look with data.workers=0."
    )


def unhurried() -> None:
    """From now on a worker's death is told when a batch is asked for.

    torch's handler of SIGCHLD would raise it at once, also in the middle of an optimizer's step.
    """
    number = getattr(signal, "SIGCHLD", None)
    if number is None or threading.current_thread() is not threading.main_thread():
        return
    handler = signal.getsignal(number)
    if getattr(handler, "__module__", "") != "torch.utils.data._utils.signal_handling":
        return

    def later(number: int, frame: FrameType | None) -> None:
        with suppress(RuntimeError):
            handler(number, frame)  # type: ignore[operator, misc]

    signal.signal(number, later)
