"""Where micro-batches come from. A source owns its order or says that it does not.

Tensors in memory are permuted once an epoch and split: no item is ever collated. A dataset's items go through torch's
DataLoader, in the trainer's order. A DataLoader or another iterable is iterated as it is.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from trainer import rng
from trainer.data.items import collate_of, of_epoch
from trainer.data.iterables import IterableSource, ListSource, PositionedSource, iterable_source
from trainer.data.order import cut_rows, mixed, order
from trainer.data.workers import PATIENCE, deaf, watched
from trainer.errors import ConfigError, DataError
from trainer.settings import DataSettings

# Rows are gathered by pieces of about this many bytes, so that a large data set is not copied whole.
_PIECE = 64 << 20


class Split(NamedTuple):
    """What a recipe's data source returns: training data and, where there is some, held-out data.

    Each is a tuple of tensors with equal first dimensions, a dataset, a DataLoader or another iterable of
    micro-batches.
    """

    train: Any
    evaluation: Any = None


class Source(Protocol):
    """Micro-batches by epoch and position."""

    owns_order: bool
    """Whether (seed, epoch, position) alone tells the micro-batches."""
    cuts_rows: bool
    """Whether it cuts rows into micro-batches itself, as the settings say."""

    def length(self) -> int | None:
        """Micro-batches in an epoch, where that is known."""

    def micro_batches(self, seed: int, epoch: int, position: int) -> Iterator[Any]:
        """The epoch's micro-batches from `position` (in micro-batches) on."""


class TensorSource:
    """Tensors in memory, row by row; a micro-batch is a tuple of their rows."""

    owns_order = True
    cuts_rows = True

    def __init__(self, tensors: Sequence[Tensor], batch_size: int, shuffle: bool, drop_last: bool) -> None:
        self.tensors = tuple(tensors)
        if not all(tensor.dim() for tensor in self.tensors):
            raise DataError(
                "one of the data's tensors has no dimension, so it has no rows: give tensors of shape (rows, …)."
            )
        self.rows = len(self.tensors[0])
        if any(len(tensor) != self.rows for tensor in self.tensors):
            lengths = ", ".join(str(len(tensor)) for tensor in self.tensors)
            raise DataError(f"the data's tensors have {lengths} rows: they must have equally many.")
        self._batch_size = batch_size
        self._shuffle = shuffle
        self._rows = self.rows - self.rows % batch_size if drop_last else self.rows
        if not self._rows:
            raise DataError(_empty(self.rows, batch_size, drop_last))
        per_row = sum(tensor[:1].numel() * tensor.element_size() for tensor in self.tensors)
        self._piece = max(1, _PIECE // max(1, per_row * batch_size)) * batch_size

    def length(self) -> int:
        return -(-self._rows // self._batch_size)

    def micro_batches(self, seed: int, epoch: int, position: int) -> Iterator[tuple[Tensor, ...]]:
        start = position * self._batch_size
        if start >= self._rows:
            return iter(())
        if not self._shuffle:
            return self._split(tensor[start : self._rows] for tensor in self.tensors)
        rows = order(seed, epoch, start, self.rows)
        if self._rows != self.rows:
            rows = rows[: self._rows - start]
        if self._rows - start <= self._piece:
            return self._split(_rows_of(tensor, rows) for tensor in self.tensors)
        return self._piecewise(rows)

    def dealt(self, seed: int, epoch: int, position: int, rank: int, world_size: int) -> Iterator[tuple[Tensor, ...]]:
        """The same, of every `world_size` micro-batches in a row the `rank`-th."""
        own = self.row_numbers(seed, epoch, position)[rank::world_size]
        return self._piecewise(torch.cat(own)) if own else iter(())

    def row_numbers(self, seed: int, epoch: int, position: int) -> tuple[Tensor, ...]:
        """Which rows of the data the epoch's micro-batches from `position` on hold."""
        return cut_rows(self.rows, self._rows, self._batch_size, self._shuffle, seed, epoch, position)

    def _piecewise(self, rows: Tensor) -> Iterator[tuple[Tensor, ...]]:
        for piece in rows.split(self._piece):
            yield from self._split(_rows_of(tensor, piece) for tensor in self.tensors)

    def _split(self, tensors: Iterable[Tensor]) -> Iterator[tuple[Tensor, ...]]:
        if self._rows <= self._batch_size:
            return iter((tuple(tensors),))  # one micro-batch an epoch: split would cost more than the rest
        return zip(*(tensor.split(self._batch_size) for tensor in tensors), strict=True)

    def placed(self, device: torch.device, dtype: torch.dtype | None) -> "TensorSource":
        """The same rows on a device, floating-point ones in a dtype: moved once instead of batch by batch."""
        placed = object.__new__(TensorSource)
        placed.__dict__.update(self.__dict__)
        placed.tensors = tuple(place(tensor, device, dtype) for tensor in self.tensors)
        return placed


def _rows_of(tensor: Tensor, rows: Tensor) -> Tensor:
    return tensor.index_select(0, rows if tensor.is_cpu else rows.to(tensor.device))


class DatasetSource:
    """A map-style dataset, its items collated by torch's DataLoader in the trainer's order.

    Its methods `for_epoch(seed, epoch)` and `collate_fn(items)` are used where it has them (`trainer.data.items`).
    """

    owns_order = True
    cuts_rows = True

    def __init__(
        self, dataset: Dataset[Any], settings: DataSettings, batch_size: int, shuffle: bool, drop_last: bool
    ) -> None:
        self._dataset = dataset
        self._settings = settings
        self._batch_size = batch_size
        self._shuffle = shuffle
        try:
            self._total = len(dataset)  # type: ignore[arg-type]
        except TypeError:
            raise ConfigError(
                f"the dataset {type(dataset).__name__} has no length, so no order of its rows can be drawn: give it "
                "__len__, or make it an IterableDataset."
            ) from None
        self._rows = self._total - self._total % batch_size if drop_last else self._total
        if not self._rows:
            raise DataError(_empty(self._total, batch_size, drop_last))

    def length(self) -> int:
        return -(-self._rows // self._batch_size)

    def micro_batches(self, seed: int, epoch: int, position: int) -> Iterator[Any]:
        return self.dealt(seed, epoch, position, 0, 1)

    def dealt(self, seed: int, epoch: int, position: int, rank: int, world_size: int) -> Iterator[Any]:
        """The same, of every `world_size` micro-batches in a row the `rank`-th."""
        own = self.row_numbers(seed, epoch, position)[rank::world_size]
        if not own:
            return iter(())
        # The loader draws its workers' seeds from a generator: given one, it leaves the global RNG alone.
        generator = torch.Generator()
        generator.manual_seed(mixed(seed, epoch, 1))
        batches = [batch.tolist() for batch in own]
        workers = self._settings.workers
        dataset = of_epoch(self._dataset, seed, epoch)
        if len(dataset) != self._total:
            raise DataError(
                f"{type(self._dataset).__name__}.for_epoch({seed}, {epoch}) gave {len(dataset)} rows, where the "
                f"dataset has {self._total}: every epoch has the same rows."
            )
        collate = collate_of(dataset)
        dataset = _Seeded(dataset, mixed(seed, epoch, 2)) if workers else dataset
        if not workers:
            return iter(DataLoader(dataset, batch_sampler=batches, generator=generator, collate_fn=collate))
        loader = DataLoader(
            dataset,
            batch_sampler=batches,
            num_workers=workers,
            generator=generator,
            collate_fn=collate,
            timeout=PATIENCE,
            worker_init_fn=deaf,
        )
        return watched(loader, self._settings.timeout)

    def row_numbers(self, seed: int, epoch: int, position: int) -> tuple[Tensor, ...]:
        """Which items the epoch's micro-batches from `position` on hold."""
        return cut_rows(self._total, self._rows, self._batch_size, self._shuffle, seed, epoch, position)


class _Seeded(Dataset[Any]):
    """In worker processes: what items draw at random follows from their rows, whatever process they come to and when.

    Without workers they draw from the run's own generators, which a checkpoint holds.
    """

    def __init__(self, dataset: Dataset[Any], seed: int) -> None:
        self._dataset = dataset
        self._seed = seed

    def __getitems__(self, rows: list[int]) -> list[Any]:
        rng.seed_all(mixed(self._seed, *rows))
        together = getattr(self._dataset, "__getitems__", None)
        return list(together(rows)) if together else [self._dataset[row] for row in rows]


def source_of(data: Any, settings: DataSettings, evaluation: bool = False) -> Source:
    """The source of whatever data it is. Evaluation data keeps its own order and loses no row.

    Raises ConfigError for data of a kind that cannot be iterated, DataError for data without a row.
    """
    batch_size = (settings.evaluation_batch_size or settings.batch_size) if evaluation else settings.batch_size
    shuffle = settings.shuffle and not evaluation
    drop_last = settings.drop_last and not evaluation
    if isinstance(data, _SOURCES):
        return data
    if type(data) is TensorDataset:
        data = data.tensors
    if isinstance(data, tuple) and any(_is_array(item) for item in data):
        raise DataError("the data holds numpy arrays: give tensors of them (torch.from_numpy(array)).")
    if isinstance(data, Tensor):
        data = (data,)
    if isinstance(data, tuple) and data and all(isinstance(item, Tensor) for item in data):
        return TensorSource(data, batch_size, shuffle, drop_last)
    if isinstance(data, Mapping | str | bytes):
        raise ConfigError(
            f"the data is {type(data).__name__}: give a tuple of tensors, or a dataset whose items are mappings."
        )
    if isinstance(data, IterableDataset):
        return iterable_source(data, settings, batch_size, drop_last)
    if isinstance(data, DataLoader):
        return IterableSource(data)
    if isinstance(data, Dataset) or (
        hasattr(data, "__getitem__") and hasattr(data, "__len__") and not _is_batches(data)
    ):
        return DatasetSource(data, settings, batch_size, shuffle, drop_last)
    if _is_batches(data):
        return ListSource(data)
    if callable(getattr(data, "from_item", None)):
        return PositionedSource(data)
    if hasattr(data, "__iter__"):
        return IterableSource(data)
    raise ConfigError(
        f"the data is {type(data).__name__}: give a tuple of tensors, a dataset, a DataLoader or an iterable of "
        "micro-batches."
    )


_SOURCES = (TensorSource, DatasetSource, IterableSource, ListSource, PositionedSource)


def _is_batches(data: Any) -> bool:
    """A list of micro-batches, rather than a dataset of rows, is iterated as it is."""
    return isinstance(data, list | tuple)


def _is_array(value: Any) -> bool:
    return type(value).__module__ == "numpy" and hasattr(value, "shape")


def _empty(rows: int, batch_size: int, drop_last: bool) -> str:
    if rows and drop_last:
        return f"the data has {rows} rows, fewer than batch_size={batch_size}, and drop_last leaves none of them."
    return "the data has no row."


def place(value: Any, device: torch.device, dtype: torch.dtype | None) -> Any:
    """A micro-batch on a device, its floating-point tensors in a dtype (None: as they are), whatever its nesting."""
    if isinstance(value, Tensor):
        floating = dtype is not None and value.is_floating_point()
        return value.to(device, dtype if floating else None, non_blocking=True)
    if isinstance(value, Mapping):  # of transformers' tokenizers, for one, which is no dict
        return {key: place(item, device, dtype) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(place(item, device, dtype) for item in value))
    if isinstance(value, list | tuple):
        return type(value)(place(item, device, dtype) for item in value)
    return value
