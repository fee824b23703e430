"""Every rank's part is a function of seed, epoch, rank and world size, and the parts are the whole."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import Dataset

from trainer.data.dealt import NOTHING, Dealt, dealt, dealt_windows
from trainer.data.sources import source_of
from trainer.data.windows import windows
from trainer.device import Placed
from trainer.distributed import OneProcess
from trainer.settings import DataSettings


class Rank:
    """One of several ranks that all hold the same."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size

    def gather(self, value: Any) -> list[Any]:
        return [value] * self.world_size

    def sum_later(self, numbers: Any) -> Any:
        raise AssertionError("dealing sums nothing")


class Rows(Dataset[Any]):
    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, row: int) -> torch.Tensor:
        return torch.tensor([row])


class Endless:
    """Micro-batches without a length."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


def whole_of(kind: str, rows: int, batch_size: int, shuffle: bool, drop_last: bool) -> Any:
    asked = DataSettings(batch_size=batch_size, shuffle=shuffle, drop_last=drop_last)
    numbers = torch.arange(rows).reshape(-1, 1)
    data: Any = {"tensors": (numbers,), "dataset": Rows(rows), "list": list(numbers.split(batch_size))}.get(kind)
    return source_of(Endless(list(numbers.split(batch_size))) if data is None else data, asked)


def numbers_of(batch: Any) -> list[int]:
    return (batch[0] if isinstance(batch, tuple) else batch).flatten().tolist()


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(["tensors", "dataset", "list", "endless"]),
    rows=st.integers(1, 40),
    batch_size=st.integers(1, 7),
    world=st.integers(2, 5),
    count=st.integers(1, 3),
    shuffle=st.booleans(),
    epoch=st.integers(0, 2),
)
def test_windows_of_all_ranks_are_those_of_one_process(kind, rows, batch_size, world, count, shuffle, epoch) -> None:
    """Window by window, as sets of micro-batches; and from any window on, as after a restart."""
    source = whole_of(kind, rows, batch_size, shuffle, drop_last=False)
    whole = [
        sorted(numbers_of(batch) for batch in window)
        for window in windows(source.micro_batches(3, epoch, 0), count * world)
    ]
    for behind in {0, len(whole) // 2}:
        parts = []
        for rank in range(world):
            mine = dealt(source, source, Rank(rank, world))
            batches = mine.micro_batches(3, epoch, behind * count * world)
            parts.append([[numbers_of(b) for b in window] for window in dealt_windows(batches, count)])
        assert len({len(part) for part in parts}) == 1
        assert [sorted(itertools.chain.from_iterable(same)) for same in zip(*parts, strict=True)] == whole[behind:]


def test_a_share_is_placed_like_the_whole_and_still_drawn_alone() -> None:
    source = source_of(Rows(9), DataSettings(batch_size=2))
    mine = Dealt(Placed(source, torch.device("cpu"), torch.float64), source, Rank(1, 2))
    found = [batch for batch in mine.micro_batches(0, 0, 0) if batch is not NOTHING]
    whole = list(source.micro_batches(0, 0, 0))
    assert [batch.tolist() for batch in found] == [batch.tolist() for batch in whole[1::2]]
    assert (mine.length(), mine.rounds(), mine.notes()) == (5, 3, [])


def test_one_process_has_the_source_itself() -> None:
    source = source_of((torch.ones(4),), DataSettings())
    assert dealt(source, source, OneProcess()) is source


def test_what_is_said_of_data_that_every_rank_walks() -> None:
    source = whole_of("endless", 6, 2, False, False)
    mine = Dealt(source, source, Rank(0, 2))
    assert mine.length() is None and mine.rounds() is None
    assert "of every 2 in a row one to each" in mine.notes()[0]


@pytest.mark.parametrize("batch_size", [2, 3])
def test_a_rank_gathers_only_its_own_rows(batch_size) -> None:
    source = source_of((torch.arange(12),), DataSettings(batch_size=batch_size, shuffle=False))
    batches = list(Dealt(source, source, Rank(0, 4)).micro_batches(0, 0, 0))
    assert next(batch[0].untyped_storage().nbytes() for batch in batches if batch is not NOTHING) < 12 * 8
