"""Data that is walked: micro-batches from where it is told to begin, where it can be told, and else from its start."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from trainer import rng
from trainer.data.items import collate_of, of_epoch
from trainer.data.order import mixed
from trainer.data.workers import PATIENCE, deaf, told, watched
from trainer.errors import ConfigError
from trainer.settings import DataSettings


class IterableSource:
    """Micro-batches in an order that is not the trainer's. Going on inside an epoch replays what lies behind.

    Args:
        iterable: walked anew for every epoch.
        generator: of a loader that is the trainer's own.
        timeout: `data.timeout`, where the loader is the trainer's own and has workers.
    """

    owns_order = False
    cuts_rows = False

    def __init__(
        self,
        iterable: Iterable[Any],
        generator: torch.Generator | None = None,
        timeout: float | None = None,
    ) -> None:
        if isinstance(iterable, Iterator):  # asked by its methods: iter() of a DataLoader would start its workers
            raise ConfigError(
                f"the data is {type(iterable).__name__}, which can be walked once only: give something that starts "
                "anew for every epoch (a list, a DataLoader, a class with __iter__)."
            )
        self._iterable = iterable
        self._generator = generator
        self._timeout = timeout

    def length(self) -> int | None:
        try:
            return len(self._iterable)  # type: ignore[arg-type]
        except TypeError:
            return None

    def micro_batches(self, seed: int, epoch: int, position: int) -> Iterator[Any]:
        if self._generator is not None:
            self._generator.manual_seed(mixed(seed, epoch, 1))
        sampler = getattr(self._iterable, "sampler", None)
        if callable(getattr(sampler, "set_epoch", None)):
            sampler.set_epoch(epoch)  # type: ignore[union-attr]
        iterator = self._begin()
        for _ in range(position):
            next(iterator, None)
        return iterator

    def _begin(self) -> Iterator[Any]:
        if not isinstance(self._iterable, DataLoader) or not self._iterable.num_workers:
            return iter(self._iterable)
        return told(self._iterable) if self._generator is None else watched(self._iterable, self._timeout)


def splits_itself(source: Any) -> bool:
    """Whether it is a DataLoader whose sampler gives each rank rows of its own, as torch's DistributedSampler does."""
    iterable = source._iterable if isinstance(source, IterableSource) else None
    batches = getattr(iterable, "batch_sampler", None)
    samplers = (getattr(iterable, "sampler", None), batches, getattr(batches, "sampler", None))
    return any(hasattr(sampler, "num_replicas") for sampler in samplers)


class ListSource:
    """A list of micro-batches, in its own order."""

    owns_order = True
    cuts_rows = False

    def __init__(self, batches: Sequence[Any]) -> None:
        self._batches = batches

    def length(self) -> int:
        return len(self._batches)

    def micro_batches(self, seed: int, epoch: int, position: int) -> Iterator[Any]:
        del seed, epoch
        return itertools.islice(iter(self._batches), position, None)


class PositionedSource:
    """An iterable that can begin anywhere: its method `from_item(index)` gives an iterator from that item on.

    Its method `for_epoch(seed, epoch)` is used where it has one. Its items are micro-batches.
    """

    owns_order = True
    cuts_rows = False

    def __init__(self, iterable: Any) -> None:
        self._iterable = iterable

    def length(self) -> int | None:
        try:
            return len(self._iterable)
        except TypeError:
            return None

    def micro_batches(self, seed: int, epoch: int, position: int) -> Iterator[Any]:
        return iter(of_epoch(self._iterable, seed, epoch).from_item(position))


class _Cut(IterableDataset[Any]):
    """Micro-batches of the rows of an iterable dataset from one of them on; of several workers each has its share."""

    def __init__(self, dataset: Any, position: int, batch_size: int, drop_last: bool, seed: int) -> None:
        self._dataset = dataset
        self._position = position
        self._batch_size = batch_size
        self._drop_last = drop_last
        self._seed = seed

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        share, of = (0, 1) if worker is None else (worker.id, worker.num_workers)
        collate = collate_of(self._dataset)
        rows = iter(self._dataset.from_item(self._position * self._batch_size))
        for index in itertools.count():
            if worker is not None:  # what is drawn follows from the place, whatever process it comes to
                rng.seed_all(mixed(self._seed, self._position + index))
            batch = list(itertools.islice(rows, self._batch_size))
            if not batch or (self._drop_last and len(batch) < self._batch_size):
                return
            if index % of == share:
                yield collate(batch)


class RowsSource:
    """An IterableDataset of rows that can begin anywhere (`from_item`), in the trainer's micro-batches."""

    owns_order = True
    cuts_rows = True

    def __init__(self, dataset: Any, settings: DataSettings, batch_size: int, drop_last: bool) -> None:
        self._dataset = dataset
        self._settings = settings
        self._batch_size = batch_size
        self._drop_last = drop_last

    def length(self) -> int | None:
        try:
            rows = len(self._dataset)
        except TypeError:
            return None
        return rows // self._batch_size if self._drop_last else -(-rows // self._batch_size)

    def micro_batches(self, seed: int, epoch: int, position: int) -> Iterator[Any]:
        dataset = of_epoch(self._dataset, seed, epoch)
        cut = _Cut(dataset, position, self._batch_size, self._drop_last, mixed(seed, epoch, 2))
        workers = self._settings.workers
        if not workers:
            return iter(cut)
        generator = torch.Generator()
        generator.manual_seed(mixed(seed, epoch, 1))
        loader: DataLoader[Any] = DataLoader(
            cut,
            batch_size=None,
            num_workers=workers,
            generator=generator,
            timeout=PATIENCE,
            worker_init_fn=deaf,
        )
        return watched(loader, self._settings.timeout)


def iterable_source(
    data: IterableDataset[Any], settings: DataSettings, batch_size: int, drop_last: bool
) -> RowsSource | IterableSource:
    """The source of an IterableDataset of torch's, whose items are rows."""
    if callable(getattr(data, "from_item", None)):
        return RowsSource(data, settings, batch_size, drop_last)
    own = torch.Generator()  # with it the loader does not draw from the global one
    watch: dict[str, Any] = {"timeout": PATIENCE, "worker_init_fn": deaf} if settings.workers else {}
    loader: DataLoader[Any] = DataLoader(
        data, batch_size=batch_size, drop_last=drop_last, num_workers=settings.workers, generator=own, **watch
    )
    return IterableSource(loader, own, settings.timeout)
