"""Some of a micro-batch's rows, in whatever nesting they lie."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def rows_at(value: Any, rows: Sequence[int], count: int) -> Any:
    """The same nesting with these rows only: of tensors with `count` rows, and of lists with an item for each row.

    What has another length (a table, a scalar) belongs to all rows and stays as it is.
    """

    def take(tensor: Tensor) -> Tensor:
        return tensor.index_select(0, torch.tensor(rows, device=tensor.device))

    return changed(value, count, take, lambda items: type(items)(items[row] for row in rows))


def changed(value: Any, count: int, tensors: Callable[[Tensor], Any], lists: Callable[[Any], Any]) -> Any:
    """The same nesting, each tensor with `count` rows and each list with an item for each row replaced."""
    if isinstance(value, Tensor):
        return tensors(value) if value.dim() and value.shape[0] == count else value
    if isinstance(value, Mapping):
        made = {key: changed(item, count, tensors, lists) for key, item in value.items()}
        try:
            return made if type(value) is dict else type(value)(made)  # type: ignore[call-arg]
        except TypeError:
            return made
    if isinstance(value, list | tuple):
        if len(value) == count and not any(isinstance(item, Tensor | Mapping | list | tuple) for item in value):
            return lists(value)
        items = [changed(item, count, tensors, lists) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value
