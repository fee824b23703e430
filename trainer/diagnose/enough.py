"""The fewest rows of a micro-batch with which the same still goes wrong."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from trainer.diagnose.trace import tensors_in

_TRIALS = 200
"""At most so many runs to find the rows."""
_STAND_INS = 8
"""At most so many rows are tried as the one that takes the place of others."""


def enough(micro_batch: Any, is_enough: Callable[[Any], bool], draws: bool) -> list[int] | None:
    """Row numbers, by halving; None where the micro-batch cannot be cut.

    Where the forward draws random numbers a row that is cut off would change what the others draw: the rest then keep
    their places, and one row that does no harm stands in place of those that are left out.

    Args:
        is_enough: whether the same still goes wrong with this micro-batch in place of the whole.
        draws: whether the forward draws.
    """
    first = next(iter(tensors_in(micro_batch)), None)
    if first is None or not first.dim():
        return None
    count = first.shape[0]
    trials = 0

    def tried(changed: Any) -> bool:
        nonlocal trials
        trials += 1
        return trials <= _TRIALS and is_enough(changed)

    try:
        if not draws and tried(_at(micro_batch, range(count), count)):
            return fewest(list(range(count)), lambda rows: tried(_at(micro_batch, rows, count)))
    except Exception:  # of the user's own model, which wants whole micro-batches
        pass
    try:
        stand_ins = range(min(count, _STAND_INS))
        harmless = next((row for row in stand_ins if not tried(_at(micro_batch, [row] * count, count))), None)
        if harmless is None:
            return None
        return fewest(list(range(count)), lambda rows: tried(_filled(micro_batch, rows, count, harmless)))
    except Exception:
        return None


def _filled(micro_batch: Any, rows: list[int], count: int, stand_in: int) -> Any:
    kept = set(rows)
    return _at(micro_batch, [row if row in kept else stand_in for row in range(count)], count)


def fewest(rows: list[int], is_enough: Callable[[list[int]], bool]) -> list[int]:
    """Zeller and Hildebrandt's delta debugging (2002): a set from which no part can be left out any more."""
    parts = 2
    while len(rows) > 1:
        size = -(-len(rows) // parts)
        chunks = [rows[start : start + size] for start in range(0, len(rows), size)]
        smaller = next((chunk for chunk in chunks if is_enough(chunk)), None)
        if smaller is not None:
            rows, parts = smaller, 2
            continue
        rest = next((left for left in (_without(rows, chunk) for chunk in chunks) if left and is_enough(left)), None)
        if rest is not None:
            rows, parts = rest, max(2, parts - 1)
        elif parts >= len(rows):
            break
        else:
            parts = min(len(rows), 2 * parts)
    return rows


def _without(rows: list[int], chunk: list[int]) -> list[int]:
    gone = set(chunk)
    return [row for row in rows if row not in gone]


def _at(value: Any, rows: Any, count: int) -> Any:
    """The micro-batch with these rows; tensors of another length stay whole."""
    if isinstance(value, Tensor):
        return value[list(rows)] if value.dim() and value.shape[0] == count else value
    if isinstance(value, Mapping):
        return {key: _at(item, rows, count) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [_at(item, rows, count) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value
