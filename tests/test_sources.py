"""Sources: every kind of data in the trainer's order, nothing lost, and from any position on."""

import collections
import random

import numpy
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from trainer.data import order, source_of, sources
from trainer.data.sources import DatasetSource, IterableSource, Split, TensorSource, place
from trainer.errors import ConfigError, DataError
from trainer.settings import DataSettings


def rows_of(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(count * 3, dtype=torch.float32).reshape(count, 3), torch.arange(count)


class Items(Dataset):
    """A map-style dataset of (three numbers, the row's number)."""

    def __init__(self, count: int) -> None:
        self.inputs, self.targets = rows_of(count)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.inputs[row], self.targets[row]


class Noisy(Items):
    """Items that draw from every generator there is."""

    def __getitem__(self, row: int) -> tuple[torch.Tensor, int]:
        return torch.rand(1) + random.random() + numpy.random.rand(), row


class Stream(IterableDataset):
    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self):
        return iter(torch.arange(self.count))


def drawn(source, seed=7, epoch=0, position=0) -> list:
    return list(source.micro_batches(seed, epoch, position))


def same(left, right) -> bool:
    return len(left) == len(right) and all(
        len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
        for a, b in zip(left, right, strict=True)
    )


@pytest.fixture
def untouched():
    """The global generators after the test are what they were before it."""
    states = torch.get_rng_state(), random.getstate(), str(numpy.random.get_state())
    yield
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert str(numpy.random.get_state()) == states[2]


# Tensors in memory.


def test_a_tuple_of_tensors_is_cut_in_the_trainers_order_with_a_ragged_end(untouched) -> None:
    inputs, targets = rows_of(10)
    source = source_of((inputs, targets), DataSettings(batch_size=4))
    assert isinstance(source, TensorSource)
    assert source.owns_order
    assert source.length() == 3
    batches = drawn(source, seed=7, epoch=2)
    assert [len(batch[1]) for batch in batches] == [4, 4, 2]
    rows = order(7, 2, 0, 10)
    assert torch.equal(torch.cat([batch[1] for batch in batches]), rows)
    assert torch.equal(torch.cat([batch[0] for batch in batches]), inputs[rows])


def test_a_single_tensor_and_a_tensor_dataset_are_tensors_too() -> None:
    inputs, targets = rows_of(10)
    settings = DataSettings(batch_size=4)
    single = drawn(source_of(inputs, settings))
    assert all(isinstance(batch, tuple) and len(batch) == 1 for batch in single)
    whole = drawn(source_of((inputs, targets), settings))
    assert same([(a,) for a, _ in whole], single)
    assert same(whole, drawn(source_of(TensorDataset(inputs, targets), settings)))


def test_a_subclass_of_tensor_dataset_keeps_its_own_items() -> None:
    class Doubled(TensorDataset):
        def __getitem__(self, row):
            return tuple(2 * tensor for tensor in super().__getitem__(row))

    source = source_of(Doubled(*rows_of(6)), DataSettings(batch_size=6, shuffle=False))
    assert isinstance(source, DatasetSource)
    assert drawn(source)[0][1].tolist() == [0, 2, 4, 6, 8, 10]


def test_drop_last_leaves_out_the_shorter_end_and_another_one_each_epoch() -> None:
    source = source_of(rows_of(10), DataSettings(batch_size=4, drop_last=True))
    assert source.length() == 2
    left_out = set()
    for epoch in range(20):
        kept = torch.cat([batch[1] for batch in drawn(source, epoch=epoch)])
        assert torch.equal(kept, order(7, epoch, 0, 10)[:8])
        left_out |= set(range(10)) - set(kept.tolist())
    assert left_out == set(range(10))


def test_without_shuffle_every_epoch_has_the_datas_order() -> None:
    source = source_of(rows_of(7), DataSettings(batch_size=3, shuffle=False))
    for epoch in range(3):
        assert [batch[1].tolist() for batch in drawn(source, epoch=epoch)] == [[0, 1, 2], [3, 4, 5], [6]]


def test_evaluation_keeps_the_order_loses_no_row_and_has_a_batch_size_of_its_own() -> None:
    settings = DataSettings(batch_size=4, drop_last=True)
    assert [b[1].tolist() for b in drawn(source_of(rows_of(6), settings, True))] == [[0, 1, 2, 3], [4, 5]]
    settings = DataSettings(batch_size=4, drop_last=True, evaluation_batch_size=5)
    for data in (rows_of(6), Items(6)):
        assert [b[1].tolist() for b in drawn(source_of(data, settings, True))] == [[0, 1, 2, 3, 4], [5]]
    assert [len(b[1]) for b in drawn(source_of(rows_of(12), settings))] == [4, 4, 4]


def test_large_data_is_gathered_by_pieces_and_comes_out_the_same(monkeypatch) -> None:
    whole = drawn(source_of(rows_of(23), DataSettings(batch_size=4)))
    monkeypatch.setattr(sources, "_PIECE", 8 * (12 + 8))  # two micro-batches
    source = source_of(rows_of(23), DataSettings(batch_size=4))
    assert source._piece == 8
    assert same(whole, drawn(source))
    for position in range(7):
        assert same(whole[position:], drawn(source, position=position))


KINDS = {
    "tensors": lambda: rows_of(11),
    "dataset": lambda: Items(11),
    "loader": lambda: DataLoader(Items(11), batch_size=3),
    "list": lambda: drawn(source_of(rows_of(11), DataSettings(batch_size=3))),
    "stream": lambda: Stream(11),
}


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("kind", list(KINDS))
def test_from_any_position_on_the_epoch_is_its_own_tail_and_nothing_behind_its_end(
    kind, drop_last, shuffle, untouched
) -> None:
    settings = DataSettings(batch_size=3, shuffle=shuffle, drop_last=drop_last)
    state = torch.get_rng_state()
    source = source_of(KINDS[kind](), settings)
    whole = drawn(source, epoch=3)
    assert len(whole) == (3 if drop_last and kind not in ("loader", "list") else 4)
    assert source.length() == (None if kind == "stream" else len(whole))
    for position in range(len(whole) + 1):
        tail = drawn(source, epoch=3, position=position)
        assert len(tail) == len(whole) - position
        if kind == "stream":
            assert all(torch.equal(a, b) for a, b in zip(whole[position:], tail, strict=True))
        else:
            assert same(whole[position:], tail)
    if kind == "loader":
        torch.set_rng_state(state)  # a loader of the user's own draws from the global generator, as it always does


# Datasets.


@pytest.mark.parametrize("workers", [0, 2])
def test_a_datasets_micro_batches_equal_those_of_tensors(workers, untouched) -> None:
    settings = DataSettings(batch_size=4, workers=workers)
    source = source_of(Items(10), settings)
    assert isinstance(source, DatasetSource)
    assert source.owns_order
    expected = drawn(source_of(rows_of(10), settings), epoch=1)
    found = [tuple(batch) for batch in drawn(source, epoch=1)]
    assert same(expected, found)


def test_a_dataset_may_be_anything_with_items_and_a_length() -> None:
    class Squares:
        def __len__(self):
            return 5

        def __getitem__(self, row):
            return {"x": torch.tensor(float(row * row))}

    batches = drawn(source_of(Squares(), DataSettings(batch_size=2, shuffle=False)))
    assert [batch["x"].tolist() for batch in batches] == [[0, 1], [4, 9], [16]]
    subset = source_of(Subset(Items(9), [8, 2, 5]), DataSettings(batch_size=2, shuffle=False))
    assert [batch[1].tolist() for batch in drawn(subset)] == [[8, 2], [5]]


def test_what_items_draw_at_random_in_workers_depends_on_their_rows_alone() -> None:
    two = source_of(Noisy(12), DataSettings(batch_size=3, workers=2))
    whole = [batch[0] for batch in drawn(two, epoch=1)]
    one = [batch[0] for batch in drawn(source_of(Noisy(12), DataSettings(batch_size=3, workers=1)), epoch=1)]
    tail = [batch[0] for batch in drawn(two, epoch=1, position=2)]
    other = [batch[0] for batch in drawn(two, epoch=2)]
    assert all(torch.equal(a, b) for a, b in zip(whole, one, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(whole[2:], tail, strict=True))
    assert len({round(float(x), 6) for x in torch.cat([*whole, *other]).flatten()}) == 24


class Augmented(Dataset):
    """Items that tell the seed and the epoch that they were made for."""

    def __init__(self, count: int, seed: int = -1, epoch: int = -1) -> None:
        self.count, self.seed, self.epoch = count, seed, epoch

    def for_epoch(self, seed: int, epoch: int) -> "Augmented":
        return Augmented(self.count, seed, epoch)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, row: int) -> tuple[int, int, int]:
        return self.seed, self.epoch, row


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "wrapped", [lambda d: d, lambda d: Subset(d, range(10)), lambda d: Subset(Subset(d, range(10)), range(10))]
)
def test_a_dataset_is_asked_for_its_epoch(workers, wrapped, untouched) -> None:
    data = Augmented(10)
    source = source_of(wrapped(data), DataSettings(batch_size=4, workers=workers))
    for epoch, position in ((0, 0), (3, 0), (3, 1), (0, 2)):
        batches = drawn(source, seed=7, epoch=epoch, position=position)
        assert torch.equal(torch.cat([batch[2] for batch in batches]), order(7, epoch, 4 * position, 10))
        assert {(s, e) for batch in batches for s, e in zip(*(part.tolist() for part in batch[:2]), strict=True)} == {
            (7, epoch)
        }
    assert (data.seed, data.epoch) == (-1, -1)  # nothing changed in the one that was given


def test_two_epochs_at_once_do_not_meet() -> None:
    source = source_of(Augmented(6), DataSettings(batch_size=3))
    first, other = source.micro_batches(7, 1, 0), source.micro_batches(0, 0, 0)
    found = [tuple(part[0].item() for part in next(side)[:2]) for side in (first, other, first, other)]
    assert found == [(7, 1), (0, 0), (7, 1), (0, 0)]


def test_an_epoch_of_another_length_is_refused() -> None:
    class Growing(Augmented):
        def for_epoch(self, seed: int, epoch: int) -> Augmented:
            return Augmented(self.count + epoch, seed, epoch)

    source = source_of(Growing(5), DataSettings(batch_size=5))
    assert len(drawn(source, epoch=0)) == 1
    with pytest.raises(DataError, match=r"Growing.for_epoch\(7, 2\) gave 7 rows, where the dataset has 5"):
        drawn(source, epoch=2)


# Iterables.


def test_a_stream_is_cut_by_batch_size_and_leaves_the_generators_alone(untouched) -> None:
    source = source_of(Stream(7), DataSettings(batch_size=3))
    assert isinstance(source, IterableSource)
    assert not source.owns_order
    assert source.length() is None
    assert [batch.tolist() for batch in drawn(source)] == [[0, 1, 2], [3, 4, 5], [6]]
    assert [batch.tolist() for batch in drawn(source)] == [[0, 1, 2], [3, 4, 5], [6]]


class Numbered(IterableDataset):
    """A stream that can begin anywhere, in an order of each epoch, with noise from the generators."""

    def __init__(self, count: int, seed: int = 0, epoch: int = 0) -> None:
        self.count, self.seed, self.epoch = count, seed, epoch
        self.read: list[int] = []

    def for_epoch(self, seed: int, epoch: int) -> "Numbered":
        return Numbered(self.count, seed, epoch)

    def from_item(self, index: int):
        for row in order(self.seed, self.epoch, index, self.count).tolist():
            self.read.append(row)
            generator = torch.Generator().manual_seed(row)
            yield torch.rand(2, generator=generator), row

    def __len__(self) -> int:
        return self.count

    __iter__ = None


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("drop_last", [False, True])
def test_a_stream_that_can_begin_anywhere_does_with_any_number_of_workers(drop_last, untouched) -> None:
    def source(workers: int):
        return source_of(Numbered(23), DataSettings(batch_size=3, workers=workers, drop_last=drop_last))

    whole = drawn(source(0), epoch=2)
    assert source(0).owns_order and source(0).cuts_rows
    assert source(0).length() == len(whole) == (7 if drop_last else 8)
    assert torch.equal(torch.cat([batch[1] for batch in whole]), order(7, 2, 0, 23)[: 21 if drop_last else 23])
    for workers, position in ((0, 5), (1, 0), (2, 3), (4, 0), (4, 6), (0, 8)):
        assert same(whole[position:], drawn(source(workers), epoch=2, position=position)), (workers, position)


def test_a_stream_that_can_begin_anywhere_reads_nothing_that_lies_behind() -> None:
    class Same(Numbered):
        def for_epoch(self, seed, epoch):
            self.seed, self.epoch = seed, epoch
            return self

    data = Same(12)
    assert len(drawn(source_of(data, DataSettings(batch_size=3)), position=3)) == 1
    assert data.read == order(7, 0, 9, 12).tolist()


def test_an_iterable_of_micro_batches_that_can_begin_anywhere() -> None:
    class Batches:
        def from_item(self, index: int):
            return iter(range(index, 5))

        def __iter__(self):
            raise AssertionError("it is asked to begin, not walked")

    source = source_of(Batches(), DataSettings())
    assert source.owns_order and source.length() is None
    assert drawn(source, position=3) == [3, 4]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_a_dataset_of_its_epoch_gives_the_same_with_any_number_of_workers_from_anywhere(workers) -> None:
    class Pure(Augmented):
        def for_epoch(self, seed, epoch):
            return Pure(self.count, seed, epoch)

        def __getitem__(self, row):
            generator = torch.Generator().manual_seed(hash((self.seed, self.epoch, row)) % 2**31)
            return torch.rand(2, generator=generator), row

    whole = drawn(source_of(Pure(11), DataSettings(batch_size=2)), epoch=3)
    for position in (0, 2, 5):
        found = drawn(source_of(Pure(11), DataSettings(batch_size=2, workers=workers)), epoch=3, position=position)
        assert same(whole[position:], found)


def test_a_data_loader_is_iterated_as_it_is_and_not_before(untouched) -> None:
    loader = DataLoader(Items(7), batch_size=3)
    source = source_of(loader, DataSettings(batch_size=2))
    assert source.length() == 3
    state = torch.get_rng_state()
    batches = drawn(source)
    assert [batch[1].tolist() for batch in batches] == [[0, 1, 2], [3, 4, 5], [6]]
    torch.set_rng_state(state)


def test_a_sampler_is_told_the_epoch() -> None:
    class Sampler(torch.utils.data.SequentialSampler):
        epochs: list = []

        def set_epoch(self, epoch):
            self.epochs.append(epoch)

    data = Items(4)
    source = source_of(DataLoader(data, batch_size=2, sampler=Sampler(data)), DataSettings())
    for epoch in range(3):
        drawn(source, epoch=epoch)
    assert Sampler.epochs == [0, 1, 2]


def test_a_list_of_micro_batches_is_walked_anew_every_epoch() -> None:
    batches = [rows_of(3), rows_of(2)]
    source = source_of(batches, DataSettings(batch_size=1))
    assert source.length() == 2
    for epoch in range(2):
        assert all(a is b for a, b in zip(drawn(source, epoch=epoch), batches, strict=True))


def test_a_class_with_iter_needs_no_length() -> None:
    class Endless:
        def __iter__(self):
            return iter([1, 2])

    source = source_of(Endless(), DataSettings())
    assert source.length() is None
    assert drawn(source) == drawn(source, position=0) == [1, 2]


@pytest.mark.parametrize("data", [(x for x in [1]), iter([1, 2]), map(abs, [1])], ids=["generator", "iterator", "map"])
def test_what_can_be_walked_once_only_is_refused(data) -> None:
    with pytest.raises(ConfigError, match=f"the data is {type(data).__name__}, which can be walked once only"):
        source_of(data, DataSettings())


def test_a_source_is_taken_as_it_is() -> None:
    source = source_of(rows_of(4), DataSettings())
    assert source_of(source, DataSettings(batch_size=1)) is source


# Refused.


@pytest.mark.parametrize(
    "data", [3, None, object(), "digits", b"digits", {"inputs": torch.zeros(3)}], ids=lambda data: type(data).__name__
)
def test_what_is_no_data_is_named(data) -> None:
    with pytest.raises(ConfigError, match=f"the data is {type(data).__name__}: give a tuple of tensors"):
        source_of(data, DataSettings())


def test_data_without_rows_is_refused() -> None:
    with pytest.raises(DataError, match="the data has no row"):
        source_of((torch.zeros(0, 3), torch.zeros(0)), DataSettings())
    with pytest.raises(DataError, match="the data has no row"):
        source_of(Items(0), DataSettings())
    with pytest.raises(DataError, match="the data has 3 rows, fewer than batch_size=4, and drop_last leaves none"):
        source_of(rows_of(3), DataSettings(batch_size=4, drop_last=True))
    with pytest.raises(DataError, match="3 rows, fewer than batch_size=4"):
        source_of(Items(3), DataSettings(batch_size=4, drop_last=True))


def test_tensors_of_unequal_length_or_without_rows_are_refused() -> None:
    with pytest.raises(DataError, match="have 3, 4 rows: they must have equally many"):
        source_of((torch.zeros(3), torch.zeros(4)), DataSettings())
    with pytest.raises(DataError, match="has no dimension"):
        source_of((torch.zeros(3), torch.tensor(1.0)), DataSettings())


def test_a_dataset_without_a_length_is_refused() -> None:
    class Lengthless(Dataset):
        def __getitem__(self, row):
            return row

    with pytest.raises(ConfigError, match="the dataset Lengthless has no length"):
        source_of(Lengthless(), DataSettings())


# Placing.

Pair = collections.namedtuple("Pair", ["inputs", "targets"])


def test_place_keeps_every_nesting_and_widens_floating_point_numbers_only() -> None:
    batch = {
        "pair": Pair(torch.ones(2), torch.ones(2, dtype=torch.int64)),
        "list": [torch.ones(2, dtype=torch.bfloat16), "a text", None, 3],
        "tuple": (torch.tensor([True]), torch.ones(1, dtype=torch.complex64)),
    }
    found = place(batch, torch.device("cpu"), torch.float64)
    assert type(found["pair"]) is Pair
    assert found["pair"].inputs.dtype is torch.float64
    assert found["pair"].targets.dtype is torch.int64
    assert type(found["list"]) is list
    assert found["list"][0].dtype is torch.float64
    assert found["list"][1:] == ["a text", None, 3]
    assert [tensor.dtype for tensor in found["tuple"]] == [torch.bool, torch.complex64]
    kept = place(batch, torch.device("cpu"), None)
    assert kept["pair"].inputs is batch["pair"].inputs


def test_tensors_are_placed_at_once_and_come_in_the_same_order() -> None:
    source = source_of(rows_of(9), DataSettings(batch_size=4))
    wide = source.placed(torch.device("cpu"), torch.float64)
    assert wide.tensors[0].dtype is torch.float64
    assert source.tensors[0].dtype is torch.float32
    assert same([(a.float(), b) for a, b in drawn(wide)], drawn(source))


def test_a_split_without_held_out_data() -> None:
    assert Split(1) == (1, None)
    assert Split(train=1, evaluation=2).evaluation == 2


def test_a_mapping_that_is_no_dict_is_placed_as_well():
    batch = collections.UserDict(ids=torch.arange(3), scores=torch.ones(3), name="x")
    found = place(batch, torch.device("cpu"), torch.float64)
    assert found["scores"].dtype == torch.float64 and found["ids"].dtype == torch.int64 and found["name"] == "x"
