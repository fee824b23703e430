"""Windows: the micro-batches of one optimizer step, drawn whole before the first forward."""

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from trainer.errors import ConfigError


class Window(tuple[Any, ...]):
    """The micro-batches of one step, in order."""

    __slots__ = ()
    is_full = False
    """Whether every target in it is known to count, so that its weight needs no look at it."""


class FullWindow(Window):
    """A window of data in which, as a whole, every target counts."""

    __slots__ = ()
    is_full = True


def windows(micro_batches: Iterable[Any], accumulation_steps: int = 1, kind: type[Window] = Window) -> Iterator[Window]:
    """Cut micro-batches into windows of `accumulation_steps`; an epoch's last window may be shorter.

    When the data ends with an error inside a window, no part of that window is handed out.
    """
    if accumulation_steps < 1:
        raise ConfigError(f"accumulation_steps={accumulation_steps} is not possible: a window holds at least 1.")
    iterator = iter(micro_batches)
    while window := kind(itertools.islice(iterator, accumulation_steps)):
        yield window
