"""Signals: TERM and INT ask a run to stop, USR1 to save. A handler notes it, the run looks between micro-batches.

Where a micro-batch takes longer than the grace time, it is given up; a second TERM or INT ends the process at once, by
the signal itself (a shell shows 143 or 130), whatever hangs.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from trainer.errors import Paused

STOP = ("SIGTERM", "SIGINT")
SAVE = ("SIGUSR1",)
# A launcher of ranks (torchrun) passes on a Ctrl-C that its ranks had from the terminal already: within so many seconds
# the same signal is no second one.
_ECHO = 1.0
_WORDS = {"SIGTERM": "SIGTERM", "SIGINT": "Ctrl-C", "SIGUSR1": "SIGUSR1"}


class Signals:
    """What was asked for while the run is inside `with signals:`.

    Attributes:
        asked: the name of the signal that waits for its answer, or None: one attribute to look at.
        wait_for_others: whether a signal is only `noted`, as other ranks have to know of it before it is answered.
        waiting: whether the run waits for data, where a signal to stop may raise Paused at once.

    Handlers are installed only in the main thread of a program that is not typed at (a notebook, a prompt: there Ctrl-C
    gives control back), and only where nobody else has put one.
    """

    def __init__(self, grace: float) -> None:
        self.asked: str | None = None
        self.waiting = False
        self.wait_for_others = False
        self.noted: str | None = None
        self._grace = grace
        self._ended = False
        self._timed = False
        self._since = 0.0
        self._process = 0
        self._former: dict[int, Any] = {}

    @property
    def to_stop(self) -> bool:
        return self.asked in STOP

    @property
    def reason(self) -> str:
        """`stopped by SIGTERM`, for the end's summary."""
        return f"stopped by {_WORDS[self.asked or 'SIGTERM']}"

    def __enter__(self) -> "Signals":
        self.asked, self.waiting, self._ended, self._process = None, False, False, os.getpid()
        self.noted = None
        if threading.current_thread() is not threading.main_thread() or _is_typed_at():
            return self
        for name, handler in [*((name, self._stop) for name in STOP), *((name, self._save) for name in SAVE)]:
            self._install(name, handler)
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
        for number, former in self._former.items():
            signal.signal(number, former)
        self._former = {}

    def end(self) -> None:
        """What is left to do is saving: no signal cuts it off but a second one."""
        self._ended, self.waiting = True, False
        if self._timed:
            self._timed = False
            signal.setitimer(signal.ITIMER_REAL, 0.0)

    def _install(self, name: str, handler: Callable[[int, FrameType | None], None]) -> None:
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            self._former[number] = signal.signal(number, handler)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        del frame
        if os.getpid() != self._process:
            self._in_child(number)
            return
        self._note(signal.Signals(number).name)
        self._since = time.monotonic()
        for other in STOP:
            if getattr(signal, other) in self._former:
                again = self._again if "TORCHELASTIC_RUN_ID" in os.environ else signal.SIG_DFL
                signal.signal(getattr(signal, other), again)
        if self._ended or self.wait_for_others:
            return
        if hasattr(signal, "setitimer") and signal.getsignal(signal.SIGALRM) is signal.SIG_DFL:
            self._former[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._over)
            self._timed = True
            signal.setitimer(signal.ITIMER_REAL, self._grace)
        if self.waiting:
            raise Paused

    def _note(self, name: str) -> None:
        if self.wait_for_others:
            self.noted = name
        else:
            self.asked = name

    def _in_child(self, number: int) -> None:
        """A process that was forked from the run inherits the handler: it leaves Ctrl-C to its parent."""
        if number != signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def _again(self, number: int, frame: FrameType | None) -> None:
        del frame
        if time.monotonic() - self._since >= _ECHO:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def _save(self, number: int, frame: FrameType | None) -> None:
        del frame
        if not self.to_stop and self.noted not in STOP:
            self._note(signal.Signals(number).name)

    def _over(self, number: int, frame: FrameType | None) -> None:
        """The grace time is over, and no boundary was reached."""
        del number, frame
        if self._timed:
            self._timed = False
            raise Paused


def _is_typed_at() -> bool:
    return hasattr(sys, "ps1") or "ipykernel" in sys.modules
