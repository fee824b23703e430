"""A stream to write lines to, whatever it is: a terminal, a pipe, a file, a notebook."""

import errno
import os
import sys
from time import perf_counter
from typing import TextIO

from trainer.errors import TrainerError

_COLOURS = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33"}
# The sign of multiplication, an ellipsis and an arrow, for an encoding that lacks them.
_PLAIN = str.maketrans({"\u00d7": "x", "\u2026": "...", "\u2192": "->"})
# What a write gives when nobody reads any more: a closed pipe, a terminal that hung up.
_NOBODY = {errno.EPIPE, errno.EIO, errno.ENXIO, errno.EBADF, errno.EINVAL, errno.ESHUTDOWN}


class Screen:
    """Text goes out at once; where nobody reads any more (closed pipe, terminal gone) it is dropped.

    `terminal` says whether lines can be drawn over: on a terminal, and in the output of a notebook's cell
    (`notebook`). Colours are there only on a terminal, and never with NO_COLOR set.
    Characters that the stream's encoding lacks are replaced. Raises TrainerError where a disk refuses the text.
    It has of a text file what a tqdm bar needs, so that a bar can be drawn on it.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.encoding: str = getattr(stream, "encoding", None) or "utf-8"
        self.gone = False
        # A kernel's stdout is no terminal, but whoever shows a cell's output knows what \r means.
        self.notebook = type(stream).__module__.startswith("ipykernel.")
        is_terminal = self.isatty() and os.environ.get("TERM") != "dumb" and not self.notebook
        self.terminal = is_terminal or self.notebook
        capable = os.name != "nt" or "WT_SESSION" in os.environ
        self.colours = is_terminal and capable and "NO_COLOR" not in os.environ

    def paint(self, text: str, colour: str) -> str:
        """The text in a colour, or as it is where there are none."""
        return f"\033[{_COLOURS[colour]}m{text}\033[0m" if self.colours else text

    def line(self, text: str) -> None:
        """Write one line."""
        self.write(text + "\n")

    def write(self, text: str) -> int:
        """Write and flush. Returns the number of characters, as a file does."""
        if not self.gone:
            try:
                self._stream.write(self._encodable(text))
                self._stream.flush()
            except (OSError, ValueError) as error:
                self._failed(error)
        return len(text)

    def flush(self) -> None:
        """Nothing: `write` flushes."""

    def isatty(self) -> bool:
        try:
            return bool(self._stream.isatty())
        except (AttributeError, ValueError):
            return False

    def fileno(self) -> int:
        return self._stream.fileno()

    def columns(self) -> int:
        """How wide the terminal is, or 0 where it does not say."""
        if self.notebook:  # it would tell of the terminal that the notebook's server was started from
            return 0
        try:
            return os.get_terminal_size(self.fileno()).columns
        except (OSError, ValueError, AttributeError):
            return 0

    def _encodable(self, text: str) -> str:
        try:
            text.encode(self.encoding)
        except UnicodeEncodeError:
            return text.translate(_PLAIN).encode(self.encoding, "replace").decode(self.encoding)
        return text

    def _failed(self, error: OSError | ValueError) -> None:
        self.gone = True
        closed = isinstance(error, ValueError)
        if closed or (isinstance(error, OSError) and error.errno in _NOBODY):
            if not closed and self._stream in (sys.stdout, sys.stderr):
                # What is left in its buffer would fail once more when Python ends, and change the exit code.
                silence = os.open(os.devnull, os.O_WRONLY)
                os.dup2(silence, self._stream.fileno())
                os.close(silence)
            return
        name = getattr(self._stream, "name", "the output")
        raise TrainerError(
            f"the run's messages cannot be written to {name} ({error}): "
            "free some space, send the output elsewhere, or switch the console off (loggers.console=false)."
        ) from error


class Pace:
    """When something may be said again: after `first` seconds, and then with pauses that grow up to `longest`."""

    def __init__(self, first: float, growth: float, longest: float, *, at_once: bool) -> None:
        self._pause, self._growth, self._longest = first, growth, longest
        self._next = perf_counter()
        if not at_once:
            self._next += first

    def due(self) -> bool:
        """Whether it is time. Where it is, the next pause begins."""
        now = perf_counter()
        if now < self._next:
            return False
        self._next = now + self._pause
        self._pause = min(self._pause * self._growth, self._longest)
        return True


class Allowance:
    """How many lines may be said: `burst` at once, and one more each second."""

    def __init__(self, burst: int) -> None:
        self._burst = float(burst)
        self._left = self._burst
        self._last = perf_counter()

    def take(self) -> bool:
        """Whether one more line may be said."""
        now = perf_counter()
        self._left = min(self._burst, self._left + now - self._last)
        self._last = now
        if self._left < 1:
            return False
        self._left -= 1
        return True
