"""A nested state taken apart into plain numbers and tensors, copied at one instant, and put together again."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.checkpoint import manifest, numbers
from trainer.errors import CheckpointError

_TENSOR, _COMPLEX = "tensor", "complex"
# The parts of a state that have a file of their own; what differs between ranks has one for each.
_OWN_FILE = ("model", "optimizers")


@dataclass
class Snapshot:
    """A state as it was at one instant, in memory: whatever is trained meanwhile does not change it."""

    structure: Any
    tensors: dict[str, dict[str, Tensor]]
    """By the name of their file, without its ending."""

    @property
    def size(self) -> int:
        return sum(numbers.size_of(tensor) for inside in self.tensors.values() for tensor in inside.values())

    def files(self) -> dict[str, Callable[[], Any]]:
        """What makes the pieces of each file."""
        text = json.dumps(self.structure, separators=(",", ":"), allow_nan=False).encode()
        made: dict[str, Callable[[], Any]] = {manifest.STATE: lambda: [text]}
        return made | {f"{stem}.safetensors": partial(numbers.pieces, inside) for stem, inside in self.tensors.items()}


def snapshot(state: Mapping[str, Any]) -> Snapshot:
    """Copy a nested state of tensors, numbers, texts, None, lists and mappings with texts or numbers as keys.

    Raises CheckpointError that names what cannot be saved.
    """
    tensors: dict[str, dict[str, Tensor]] = {}
    items = []
    for key, value in state.items():
        if key in _OWN_FILE:
            items.append([key, _taken_apart(value, key, "", tensors.setdefault(key, {}))])
        elif key == "ranks":  # what differs between processes, a file for each
            parts = [
                _taken_apart(own, stem_of(rank), "", tensors.setdefault(stem_of(rank), {}))
                for rank, own in enumerate(value)
            ]
            items.append([key, {"list": parts}])
        else:
            items.append([key, _taken_apart(value, "rest", str(key), tensors.setdefault("rest", {}))])
    return Snapshot({"mapping": items}, {stem: inside for stem, inside in tensors.items() if inside})


def together(
    structure: Any, tensors: dict[str, dict[str, Tensor]], where: Path, rank: int | None = None
) -> dict[str, Any]:
    """The state again; takes the tensors out of their files. Raises CheckpointError for what is no state.

    With a `rank`, of what the ranks have of their own only this one's, whose file alone was read.
    """
    state: dict[str, Any] = {}
    try:
        for key, value in structure["mapping"]:
            if key == "ranks":
                state[key] = [
                    _put_together(own, tensors, stem_of(one), where) if rank in (None, one) else {}
                    for one, own in enumerate(value["list"])
                ]
            else:
                state[key] = _put_together(value, tensors, key if key in _OWN_FILE else "rest", where)
    except (TypeError, ValueError, KeyError, RuntimeError, RecursionError) as error:
        raise CheckpointError(f"{where} does not hold what it should ({type(error).__name__}: {error}).") from None
    left_over = [f"'{name}' in {stem}.safetensors" for stem, inside in tensors.items() for name in inside]
    if left_over:
        raise CheckpointError(f"{where} does not know {left_over[0]} ({len(left_over)} left over).")
    return state


def stem_of(rank: int) -> str:
    """The name, without its ending, of the file that holds what a rank has of its own."""
    return f"rank-{rank:05d}"


def plain(tensor: Tensor, where: Callable[[], str]) -> Tensor:
    """A copy in the CPU's memory, as a file can have it. Raises CheckpointError for what it cannot, naming `where`."""
    if tensor.layout is not torch.strided:
        raise CheckpointError(
            f"{where()} is a tensor of layout {str(tensor.layout).removeprefix('torch.')}: a checkpoint holds dense "
            "ones only, so keep it as its indices and values, or to_dense()."
        )
    copy = tensor.detach().to("cpu", copy=True)
    if copy.is_complex():  # the library reads complex64 only
        copy = torch.view_as_real(copy.resolve_conj())
    if copy.is_neg():
        copy = copy.resolve_neg()
    numbers.check_type(copy, where)
    return copy.contiguous()


def _taken_apart(value: Any, stem: str, path: str, tensors: dict[str, Tensor]) -> Any:
    # This runs on the step's thread: words for an error are made only where there is one.
    kind = type(value)
    if value is None or kind is str or kind is int or kind is bool:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, Tensor):
        while path in tensors:  # a key may itself hold a slash
            path += "'"
        # A copy of its own: a file holds no views, and two names may stand for one tensor.
        tensors[path] = plain(value, partial(_where, stem, path))
        return {_COMPLEX if value.is_complex() else _TENSOR: path}
    start = f"{path}/" if path else ""
    if isinstance(value, Mapping):
        if not all(isinstance(key, (str, int)) and not isinstance(key, bool) for key in value):
            raise CheckpointError(
                f"{_where(stem, path)} has keys that are neither texts nor numbers: it cannot be saved."
            )
        return {"mapping": [[key, _taken_apart(item, stem, f"{start}{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        items = [_taken_apart(item, stem, f"{start}{index}", tensors) for index, item in enumerate(value)]
        return {"tuple" if isinstance(value, tuple) else "list": items}
    if isinstance(value, (int, str)):
        return value
    raise CheckpointError(
        f"{_where(stem, path)} is {kind.__name__}: a checkpoint holds tensors, numbers and texts only."
    )


def _where(stem: str, path: str) -> str:
    return f"the state at '{path if stem == 'rest' else f'{stem}/{path}' if path else stem}'"


def _put_together(value: Any, tensors: dict[str, dict[str, Tensor]], stem: str, where: Path) -> Any:
    if not isinstance(value, dict):
        if isinstance(value, list):
            raise CheckpointError(f"{where} is damaged: it holds a list out of place.")
        return value
    if len(value) != 1:
        raise CheckpointError(f"{where} is damaged: it holds something unknown.")
    kind, content = next(iter(value.items()))
    if kind in (_TENSOR, _COMPLEX):
        if content not in tensors.get(stem, {}):
            raise CheckpointError(f"{where} is damaged: the tensor '{content}' is not in {stem}.safetensors.")
        tensor = tensors[stem].pop(content)
        return tensor if kind == _TENSOR else torch.view_as_complex(tensor)
    if kind == "float":
        return float(content)
    if kind == "mapping":
        return {key: _put_together(item, tensors, stem, where) for key, item in content}
    if kind not in ("list", "tuple"):
        raise CheckpointError(f"{where} is damaged: it holds something unknown ('{kind}').")
    items = [_put_together(item, tensors, stem, where) for item in content]
    return tuple(items) if kind == "tuple" else items
