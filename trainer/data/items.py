"""What a dataset may say of its items: how they are in an epoch, and how they become a micro-batch."""

from collections.abc import Callable
from typing import Any

from torch.utils.data import Subset, default_collate

from trainer.errors import DataError

Collate = Callable[[list[Any]], Any]


def of_epoch(dataset: Any, seed: int, epoch: int) -> Any:
    """The dataset as it is in an epoch: what its method `for_epoch(seed, epoch)` returns, where it has one.

    So augmentation can be a pure function of (seed, epoch, row), which neither workers nor a resume can change. The
    method returns a dataset and changes nothing in its own. Also asked for behind a Subset, that is a random_split.
    """
    for_epoch = getattr(dataset, "for_epoch", None)
    if callable(for_epoch):
        return for_epoch(seed, epoch)
    if type(dataset) is Subset:
        return Subset(of_epoch(dataset.dataset, seed, epoch), dataset.indices)
    return dataset


def collate_of(dataset: Any) -> Collate:
    """What makes a micro-batch of a list of items: the dataset's method `collate_fn(items)`, where it has one.

    The name is that of DataLoader's argument. It is for items that differ in size, which it pads or packs. Also asked
    for behind a Subset. Without one torch stacks them, in whatever nesting.
    """
    collate = getattr(dataset, "collate_fn", None)
    if callable(collate):
        found: Collate = collate
        return found
    return collate_of(dataset.dataset) if type(dataset) is Subset else _stacked


def _stacked(items: list[Any]) -> Any:
    try:
        return default_collate(items)
    except RuntimeError as error:
        if "equal size" not in str(error):
            raise
        raise DataError(
            "the dataset's items differ in size, so they cannot be stacked into a micro-batch: give the dataset a "
            f"method collate_fn(items) that pads or packs them ({error})."
        ) from None
