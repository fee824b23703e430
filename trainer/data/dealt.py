"""One rank's part of the data. Micro-batches have one order for all ranks, and are dealt round robin: of every
`world_size` in a row each rank gets one. So a window of k micro-batches on each of w ranks holds the rows that a window
of k·w holds in one process, and all ranks together see each row once.

Places in an epoch count the micro-batches of all ranks, so a run can go on with another number of ranks.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

from trainer import rng
from trainer.data.iterables import splits_itself
from trainer.data.order import mixed
from trainer.data.sources import Source
from trainer.data.windows import Window
from trainer.distributed.ranks import Ranks
from trainer.errors import ConfigError

NOTHING = object()
"""In the place of a micro-batch where other ranks have one and this rank has not: an epoch ends for all at once."""


_END = object()


class Dealt:
    """What of a source is this rank's. Every rank makes one, at the same place.

    A DataLoader whose sampler deals rows itself (it has `num_replicas`, as DistributedSampler) is taken as it is.

    Args:
        whole: the source as one process would have it.
        origin: what the data was before it was placed on a device.
    """

    owns_order = True
    """The order follows (seed, epoch, position), as far as the data takes it from the generators."""

    def __init__(self, whole: Source, origin: Source, ranks: Ranks) -> None:
        self.whole = whole
        self.cuts_rows = whole.cuts_rows
        self.world_size = ranks.world_size
        self.rank = ranks.rank
        self._deal = (ranks.rank, ranks.world_size)
        self.lengths: list[int] | None = None
        """Where the data is split by its own sampler: how many micro-batches each rank has."""
        if splits_itself(origin):
            lengths = ranks.gather(origin.length())
            if any(length is None for length in lengths):
                raise ConfigError(
                    "the DataLoader's own sampler splits its rows over ranks and does not tell how many there are: "
                    "give it a length, or a plain sampler, whose micro-batches are then dealt over the ranks."
                )
            self.lengths = lengths

    def length(self) -> int | None:
        """Micro-batches of all ranks in an epoch."""
        return self.whole.length() if self.lengths is None else sum(self.lengths)

    def rounds(self) -> int | None:
        """Micro-batches of the rank that has most of them."""
        if self.lengths is not None:
            return max(self.lengths)
        length = self.whole.length()
        return None if length is None else -(-length // self.world_size)

    def position_after(self, rounds: int) -> int:
        """The place in an epoch where each rank has so many micro-batches behind it, as far as it has so many."""
        if self.lengths is not None:
            return sum(min(length, rounds) for length in self.lengths)
        length = self.whole.length()
        together = rounds * self.world_size
        return together if length is None else min(together, length)

    def notes(self) -> list[str]:
        """How the data comes to the ranks, where they might take it otherwise than is meant."""
        if self.lengths is not None:
            uneven = "" if min(self.lengths) == max(self.lengths) else f", {self.lengths} micro-batches"
            return [
                f"the DataLoader's own sampler gives each rank its rows{uneven}: torch's DistributedSampler repeats "
                "some so that all ranks have equally many, and those then count twice."
            ]
        if not self.whole.owns_order:
            return [
                f"the micro-batches are dealt over the {self.world_size} ranks, of every {self.world_size} in a row "
                "one to each: every rank walks all of them, and must find the same in the same order."
            ]
        return []

    def micro_batches(self, seed: int, epoch: int, position: int) -> Iterator[Any]:
        """This rank's, or NOTHING, as often as any rank has one."""
        deal = getattr(self.whole, "dealt", None)
        length = self.whole.length()
        if self.lengths is not None:
            behind = _rounds_of(position, self.lengths)
            batches = _filled(lambda: self.whole.micro_batches(seed, epoch, behind), max(self.lengths) - behind)
        elif deal is not None and length is not None:
            own = deal(seed, epoch, position, *self._deal)
            return _filled(lambda: own, -(-(length - position) // self.world_size))
        else:
            batches = _every(lambda: self.whole.micro_batches(seed, epoch, position), *self._deal)
        # Whatever order the data draws as its walk begins must be the same on every rank.
        with rng.preserved():
            rng.seed_all(mixed(seed, epoch, 3))
            first = next(batches, _END)
        return _together(first, batches)


def dealt(whole: Source, origin: Source, ranks: Ranks) -> Source | Dealt:
    """The source itself, or this rank's part of it where there are others."""
    return whole if ranks.world_size == 1 else Dealt(whole, origin, ranks)


def whole_of(source: Source | Dealt) -> Any:
    """The data itself, whatever deals it and places it on a device."""
    whole: Any = source.whole if isinstance(source, Dealt) else source
    return getattr(whole, "placed_from", whole)


def dealt_windows(batches: Iterator[Any], accumulation_steps: int, kind: type[Window] = Window) -> Iterator[Window]:
    """This rank's windows; one is empty where only other ranks have micro-batches left."""
    while taken := list(itertools.islice(batches, accumulation_steps)):
        yield kind(batch for batch in taken if batch is not NOTHING)


def _filled(walk: Callable[[], Iterator[Any]], count: int) -> Iterator[Any]:
    """As many as `count`, with NOTHING behind the last."""
    yield from itertools.islice(itertools.chain(walk(), itertools.repeat(NOTHING)), max(count, 0))


def _every(walk: Callable[[], Iterator[Any]], rank: int, world_size: int) -> Iterator[Any]:
    """Of every `world_size` micro-batches the `rank`-th; all of them are walked."""
    batches = walk()
    while True:
        own: Any = NOTHING
        count = 0
        for batch in itertools.islice(batches, world_size):
            own = batch if count == rank else own
            count += 1
        if not count:
            return
        yield own


def _together(first: Any, batches: Iterator[Any]) -> Iterator[Any]:
    if first is not _END:
        yield first
        yield from batches


def _rounds_of(position: int, lengths: list[int]) -> int:
    """How many micro-batches each rank has behind (as far as it has so many) when together they have `position`."""
    rounds = 0
    while rounds < max(lengths) and sum(min(length, rounds) for length in lengths) < position:
        rounds += 1
    return rounds
