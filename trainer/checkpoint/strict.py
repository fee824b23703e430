"""JSON as it was written and no other: no key twice, no number that JSON has not, no more bytes than are expected."""

import json
import math
from pathlib import Path
from typing import Any

from trainer.errors import CheckpointError


def parsed(data: bytes, where: Path | str, limit: int) -> Any:
    """What the bytes hold. Raises CheckpointError that names `where`."""
    if len(data) > limit:
        raise CheckpointError(f"{where} has {len(data)} bytes, more than the {limit} that are read: it is damaged.")
    try:
        return json.loads(
            data.decode("utf-8"), object_pairs_hook=_once_each, parse_constant=_refused, parse_float=_finite
        )
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is damaged: it is not the JSON that was written ({error}).") from None


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is there twice")
    return found


def _refused(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is too large for a float")
    return value
