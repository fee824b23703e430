"""Some of a micro-batch's rows, in whatever nesting they lie."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def rows_at(value: Any, rows: Sequence[int], count: int) -> Any:
    """The same nesting with these rows only: of tensors with `count` rows, and of lists with an item for each row.

    What has another length (a table, a scalar) belongs to all rows and stays as it is.
    """
    if isinstance(value, Tensor):
        if not value.dim() or value.shape[0] != count:
            return value
        return value.index_select(0, torch.tensor(rows, device=value.device))
    if isinstance(value, Mapping):
        made = {key: rows_at(item, rows, count) for key, item in value.items()}
        try:
            return made if type(value) is dict else type(value)(made)  # type: ignore[call-arg]
        except TypeError:
            return made
    if isinstance(value, list | tuple):
        if len(value) == count and not any(isinstance(item, Tensor | Mapping | list | tuple) for item in value):
            return type(value)(value[row] for row in rows)
        items = [rows_at(item, rows, count) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value
