"""What a run asks of its other ranks. With one process there is nothing to ask."""

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

Arrived = Callable[[], None]
"""Waits until what was sent has arrived."""


class Ranks(Protocol):
    """One process or many. What is called here is called by every rank, in the same order."""

    rank: int
    world_size: int

    def sum_later(self, numbers: Tensor) -> Arrived:
        """Start Σ over ranks, in place; the call of what it returns ends it."""

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value (plain Python or tensors on the CPU), in the order of ranks."""

    def to_first(self, value: Any) -> list[Any]:
        """The same on the first rank alone; nothing on the others."""


class OneProcess:
    """The identity: no other rank."""

    rank = 0
    world_size = 1

    def sum_later(self, numbers: Tensor) -> Arrived:
        del numbers
        return lambda: None

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def to_first(self, value: Any) -> list[Any]:
        return [value]
