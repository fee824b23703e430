"""What a window weighs over all ranks: summed while its first forward runs, so that backward starts from the true
divisor; where the data does not tell, a guess that every rank makes alike."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from trainer.distributed.ranks import Arrived, Ranks
from trainer.errors import GradientError
from trainer.gradient.report import FREE_READS, Number
from trainer.gradient.weigher import Weigher
from trainer.gradient.weights import not_zero, power_of_two

# Small enough for a float64 to hold its square times the number of ranks.
_LARGEST_MARK = 1 << 20


@dataclass(slots=True)
class Summed:
    """What the ranks' windows came to when they were summed.

    - `size`: micro-batches, rows, tokens.
    - `leftover`: what the gradient must still be divided by, on every rank.
    - `is_bad`, `has_bad_loss`: on a device, 1 where any rank's loss or gradient is not finite, and where a loss is.
    """

    size: tuple[int, int, int]
    leftover: Number = 1.0
    is_bad: Tensor | None = None
    has_bad_loss: Tensor | None = None


class Opening:
    """One window of this rank, as it is begun.

    Args:
        drawn: the window; None where micro-batches come one by one, so that nothing is known of it.
        expected: the last window's denominators by term, over all ranks.
        reduction: of the settings.
        layout: what the ranks must agree on before they sum gradients: any text.
        device: of the parameters.
    """

    def __init__(
        self,
        ranks: Ranks,
        weigher: Weigher,
        drawn: Sequence[Any] | None,
        expected: Mapping[str, float],
        reduction: str,
        layout: str,
        device: torch.device,
    ) -> None:
        self._ranks = ranks
        self._weigher = weigher
        self._expected = expected
        self._reduction = reduction
        self._here: list[list[Number]] = []
        self._names = sorted(expected)
        self._coming: list[Arrived] = []
        self._told: Tensor | None = None
        self._weights: Tensor | None = None
        self._kept: list[Number] | None = None
        if drawn is None:
            return
        sums: list[Number] = [0.0] * (1 + len(self._names))
        if reduction == "mean":
            full = getattr(drawn, "is_full", False)
            self._here = [weigher.weights(micro_batch, self._names, full) for micro_batch in drawn]
            sums = [sum(column[1:], column[0]) for column in zip(*self._here, strict=True)] or sums
        mark = crc32(layout.encode()) % _LARGEST_MARK
        counts: list[Number] = [float(len(drawn)), float(mark), float(mark * mark)]
        if device.type in FREE_READS:
            counts += sums
        else:
            self._weights = torch.stack([torch.as_tensor(one, dtype=torch.float64, device=device) for one in sums])
        self._mark = mark
        self._told = torch.tensor([float(one) for one in counts], dtype=torch.float64)
        self._coming = [ranks.sum_later(one) for one in (self._told, self._weights) if one is not None]

    def here(self, name: str) -> list[Number] | None:
        """What a mean named so counts in each micro-batch of this rank's window, where that was looked up."""
        if not self._here:
            return None
        if not self._weigher.names_weights:
            return [weights[0] for weights in self._here]
        place = self._place(name)
        return None if place is None else [weights[place] for weights in self._here]

    def divisor(self, name: str, weight: Number, means: bool) -> tuple[Number, bool]:
        """(a term's divisor over all ranks, True), or (a guess, False).

        Args:
            weight: what the term counts in the micro-batch at hand.
            means: whether the data tells what the term counts.
        """
        is_told = self._told is not None or self._kept is not None
        if is_told and self._reduction == "micro_batches":
            return self._sums()[0], True
        if is_told and means and (place := self._place(name)) is not None:
            return not_zero(self._sums()[1 + place]), True
        # The next window's guess is made of sums over ranks, so it is everybody's; the first one is this rank's own.
        if name in self._expected:
            return power_of_two(self._expected[name]), False
        return power_of_two(weight if self._reduction == "mean" else 1.0), False

    def common(self, name: str) -> float:
        """The guess that all ranks share."""
        return float(power_of_two(self._expected[name])) if name in self._expected else 1.0

    def arrive(self) -> None:
        """Wait for the other ranks' weights. Raises GradientError, on every rank, where they train other parameters."""
        if not self._coming or self._told is None:
            return
        coming, self._coming = self._coming, []
        for arrived in coming:
            arrived()
        _, marks, squares = self._told[:3].tolist()
        if self._ranks.world_size * squares != marks * marks:
            raise GradientError(
                f"the ranks do not train the same parameters (rank {self._ranks.rank} has mark {self._mark}): freeze, "
                "thaw and make parameters alike on all of them."
            )

    def state_dict(self) -> dict[str, Any]:
        """What is known of the window over all ranks, so that one that was saved open is gone on with as it began."""
        known = [] if self._told is None and self._kept is None else self._sums()
        return {"names": list(self._names), "sums": [float(one) for one in known]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._names = list(state["names"])
        self._kept = list(state["sums"]) or None

    def _sums(self) -> list[Number]:
        if self._kept is not None:
            return self._kept
        self.arrive()
        told = [] if self._told is None else self._told.tolist()
        return [told[0], *(told[3:] if self._weights is None else self._weights.unbind())]

    def _place(self, name: str) -> int | None:
        """Where a mean's weight lies among those that were looked up."""
        if not self._weigher.names_weights:
            return 0
        return 1 + self._names.index(name) if name in self._names else None
