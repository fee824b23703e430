"""Items: a dataset's own way to make a micro-batch of them, found wherever the dataset lies."""

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, Subset

from trainer.data import order, source_of
from trainer.data.items import collate_of
from trainer.errors import DataError
from trainer.settings import DataSettings


class Ragged(Dataset):
    """Item n holds n + 1 times the number n."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, row: int) -> torch.Tensor:
        return torch.full((row + 1,), row)


class Padded(Ragged):
    def collate_fn(self, items: list[torch.Tensor]) -> torch.Tensor:
        return pad_sequence(items, True, -1)


class Growing(Padded):
    """Pads with the epoch's number, below zero."""

    epoch = 0

    def for_epoch(self, seed: int, epoch: int) -> "Growing":
        made = Growing(self.count)
        made.epoch = epoch
        return made

    def collate_fn(self, items: list[torch.Tensor]) -> torch.Tensor:
        return pad_sequence(items, True, -1 - self.epoch)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    "wrapped", [lambda d: d, lambda d: Subset(d, range(7)), lambda d: Subset(Subset(d, range(7)), range(7))]
)
def test_a_datasets_own_collate_fn_makes_its_micro_batches(workers, wrapped) -> None:
    source = source_of(wrapped(Padded(7)), DataSettings(batch_size=3, workers=workers))
    rows = order(7, 1, 0, 7).split(3)
    for position in (0, 1):
        batches = list(source.micro_batches(7, 1, position))
        assert len(batches) == 3 - position
        for found, wanted in zip(batches, rows[position:], strict=True):
            assert found.shape == (len(wanted), wanted.max() + 1)
            assert torch.equal((found >= 0).sum(1), wanted + 1) and torch.equal(found[:, 0], wanted)


def test_the_epochs_own_dataset_collates() -> None:
    source = source_of(Growing(4), DataSettings(batch_size=4, shuffle=False))
    assert [next(iter(source.micro_batches(0, epoch, 0)))[0, -1].item() for epoch in (0, 2)] == [-1, -3]


def test_a_static_method_and_an_attribute_serve_as_well() -> None:
    class Static(Ragged):
        collate_fn = staticmethod(len)

    data = Ragged(3)
    data.collate_fn = sum
    assert collate_of(Static(3))([1, 2]) == 2 and collate_of(Subset(data, [0]))([1, 2]) == 3


@pytest.mark.parametrize("workers", [0, 1])
def test_items_that_differ_in_size_are_named_where_there_is_none(workers) -> None:
    source = source_of(Ragged(3), DataSettings(batch_size=3, workers=workers))
    with pytest.raises(DataError, match=r"items differ in size.* a method collate_fn\(items\) that pads or packs them"):
        list(source.micro_batches(0, 0, 0))


def test_another_error_of_the_stacking_stays_what_it_is() -> None:
    class Odd(Ragged):
        def __getitem__(self, row: int) -> object:
            return object()

    with pytest.raises(TypeError, match="object"):
        list(source_of(Odd(2), DataSettings(batch_size=2)).micro_batches(0, 0, 0))
