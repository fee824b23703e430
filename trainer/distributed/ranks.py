"""What a step asks of the other ranks. With one process every answer is its own."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from trainer.gradient.report import Number


class Ranks(Protocol):
    """One process or many."""

    world_size: int
    """By how much a seed is multiplied where gradients are averaged over ranks: 1 where they are summed."""

    def sum_weight(self, weight: Number) -> Number:
        """Σ of a weight over ranks."""

    def sum_gradients(self, gradients: Sequence[Tensor]) -> None:
        """Σ of each gradient over ranks, in place."""

    def any_flag(self, flag: bool) -> bool:
        """Whether any rank raised its flag: one verdict for all."""


class OneProcess:
    """The identity: no other rank."""

    world_size = 1

    def sum_weight(self, weight: Number) -> Number:
        return weight

    def sum_gradients(self, gradients: Sequence[Tensor]) -> None:
        del gradients

    def any_flag(self, flag: bool) -> bool:
        return flag
