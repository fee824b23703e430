"""Micro-batches as data: put together along their rows, taken apart, cast; and parts held against a whole."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

CountRows = Callable[[Any], int]


def first_tensor(value: Any) -> Tensor | None:
    """The first tensor in a nested value."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            found = first_tensor(item)
            if found is not None:
                return found
    return None


def rows_of(micro_batch: Any, count_rows: CountRows | None = None) -> int | None:
    """How many rows a micro-batch has; None where it holds no tensor to tell by."""
    if count_rows is not None:
        return int(count_rows(micro_batch))
    tensor = first_tensor(micro_batch)
    return None if tensor is None else (tensor.shape[0] if tensor.dim() else 1)


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same nested value with each tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        made = {key: mapped(item, change) for key, item in value.items()}
        try:
            return made if type(value) is dict else type(value)(made)  # type: ignore[call-arg]
        except TypeError:
            return made
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(mapped(item, change) for item in value))
    if isinstance(value, list | tuple):
        return type(value)(mapped(item, change) for item in value)
    return value


def cast(value: Any, dtype: torch.dtype) -> Any:
    """Floating-point tensors in the dtype, as leaves of their own; copies, so that nobody changes the data."""

    def change(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():
            return tensor.detach().to(dtype, copy=True).requires_grad_(tensor.requires_grad)
        if tensor.is_complex():
            wide = torch.complex128 if dtype is torch.float64 else torch.complex64
            return tensor.detach().to(wide, copy=True).requires_grad_(tensor.requires_grad)
        return tensor.clone()

    return mapped(value, change)


def copied(value: Any) -> Any:
    """The same with tensors of their own."""
    return mapped(value, lambda tensor: tensor.detach().clone().requires_grad_(tensor.requires_grad))


class NotJoinableError(Exception):
    """The micro-batches cannot be put together along their rows; the sentence says why."""


def joined(micro_batches: Sequence[Any], count_rows: CountRows | None = None) -> Any:
    """One micro-batch of all rows. Raises NotJoinableError."""
    counts = [rows_of(one, count_rows) for one in micro_batches]
    if any(count is None for count in counts):
        raise NotJoinableError("they hold no tensor to tell rows by")
    if len(micro_batches) == 1:
        return micro_batches[0]
    return _joined(list(micro_batches), [count or 0 for count in counts])


def _joined(values: list[Any], counts: list[int]) -> Any:
    first = values[0]
    if any(type(value) is not type(first) for value in values):
        raise NotJoinableError("they are of different types")
    if isinstance(first, Tensor):
        return _joined_tensors(values, counts)
    if isinstance(first, Mapping):
        if any(value.keys() != first.keys() for value in values):
            raise NotJoinableError("they have different keys")
        made = {key: _joined([value[key] for value in values], counts) for key in first}
        try:
            return made if type(first) is dict else type(first)(made)  # type: ignore[call-arg]
        except TypeError:
            return made
    if isinstance(first, list | tuple):
        if all(len(value) == count for value, count in zip(values, counts, strict=True)) and not any(
            first_tensor(value) is not None for value in values
        ):
            return type(first)(item for value in values for item in value)  # a list with an item for each row
        if any(len(value) != len(first) for value in values):
            raise NotJoinableError("they are of different lengths")
        items = [_joined([value[index] for value in values], counts) for index in range(len(first))]
        return type(first)(*items) if hasattr(first, "_fields") else type(first)(items)
    try:
        equal = all(bool(value == first) for value in values)
    except (RuntimeError, ValueError, TypeError):
        equal = False
    if not equal:
        raise NotJoinableError(f"they hold {type(first).__name__} that differ")
    return first


def _joined_tensors(values: list[Tensor], counts: list[int]) -> Tensor:
    first = values[0]
    same = all(value.shape == first.shape and torch.equal(value, first) for value in values)
    if all(value.dim() and value.shape[0] == count for value, count in zip(values, counts, strict=True)):
        if any(value.shape[1:] != first.shape[1:] for value in values):
            raise NotJoinableError("their rows differ in shape")
        return torch.cat([value.detach() for value in values]).requires_grad_(first.requires_grad)
    if same:
        return first
    raise NotJoinableError("they hold tensors whose first dimension is not their rows")


def halves(micro_batches: Sequence[Any], count_rows: CountRows | None = None) -> list[Any] | None:
    """Each micro-batch in two, by rows; None where not one of them can be cut so."""
    found: list[Any] = []
    for one in micro_batches:
        count = rows_of(one, count_rows)
        if count is None or count < 2:
            found.append(one)
            continue
        parts = [_rows(one, count, slice(None, count // 2)), _rows(one, count, slice(count // 2, None))]
        try:
            whole = joined(parts, count_rows)
        except NotJoinableError:
            return None
        if not _equal(whole, one):
            return None
        found.extend(parts)
    return found if len(found) > len(micro_batches) else None


def _rows(value: Any, count: int, which: slice) -> Any:
    if isinstance(value, list | tuple) and len(value) == count and first_tensor(value) is None:
        return value[which]
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return type(value)(_rows(item, count, which) for item in value)
    if isinstance(value, tuple):
        return type(value)(*(_rows(item, count, which) for item in value))
    if isinstance(value, Mapping):
        return {key: _rows(item, count, which) for key, item in value.items()}
    if isinstance(value, Tensor) and value.dim() and value.shape[0] == count:
        return value[which]
    return value


def _equal(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor):
        return isinstance(right, Tensor) and left.shape == right.shape and torch.equal(left, right)
    if isinstance(left, Mapping):
        return all(_equal(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return all(_equal(one, other) for one, other in zip(left, right, strict=True))
    return bool(left == right)


def against_whole(parts: Sequence[Tensor], whole: Tensor) -> Tensor | None:
    """The parts in the shape of the whole: put together along the one dimension that adds up.

    None where no dimension does, so that they cannot be compared row for row.
    """
    if not parts or any(part.dim() != whole.dim() for part in parts):
        return None
    if len(parts) == 1:
        return parts[0] if parts[0].shape == whole.shape else None
    for dim in range(whole.dim()):
        others = [part.shape[:dim] + part.shape[dim + 1 :] for part in parts]
        if any(other != whole.shape[:dim] + whole.shape[dim + 1 :] for other in others):
            continue
        if sum(part.shape[dim] for part in parts) == whole.shape[dim]:
            return torch.cat(list(parts), dim)
    return None
