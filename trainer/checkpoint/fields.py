"""A checkpoint as a flat list of fields, read without torch: `model/0.weight`, `step/clocks/steps`, …"""

import json
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.checkpoint import manifest, strict
from trainer.checkpoint.manifest import Manifest
from trainer.errors import CheckpointError

_FORMATS = {
    "F64": "d", "F32": "f", "F16": "e", "I64": "q", "I32": "i", "I16": "h", "I8": "b",
    "U64": "Q", "U32": "I", "U16": "H", "U8": "B", "BOOL": "?",
}  # fmt: skip
# What says most about a run comes first.
_FIRST = ("step/clocks", "run", "step", "model", "optimizers")


@dataclass(frozen=True)
class Numbers:
    """A tensor's numbers as they lie in the file, row by row, in little-endian order."""

    dtype: str
    shape: tuple[int, ...]
    content: memoryview

    def __len__(self) -> int:
        return math.prod(self.shape)

    def at(self, index: int) -> int | float | bool | str:
        """The number at a flat index; of a type that Python does not know, its bytes in hex."""
        width = len(self.content) // len(self)
        raw = bytes(self.content[index * width : (index + 1) * width])
        if self.dtype == "BF16":
            return float(struct.unpack("<f", b"\0\0" + raw)[0])
        found: int | float | bool = struct.unpack(f"<{_FORMATS[self.dtype]}", raw)[0] if self.dtype in _FORMATS else 0
        return found if self.dtype in _FORMATS else f"0x{raw[::-1].hex()}"

    def first_difference(self, other: "Numbers") -> int | None:
        """The flat index of the first number whose bytes differ; of two tensors of one type and shape."""
        if self.content == other.content:
            return None
        step = 1 << 16
        for start in range(0, len(self.content), step):
            left, right = bytes(self.content[start : start + step]), bytes(other.content[start : start + step])
            if left != right:
                byte = next(place for place, pair in enumerate(zip(left, right, strict=True)) if pair[0] != pair[1])
                return (start + byte) // (len(self.content) // len(self))
        return None

    def __str__(self) -> str:
        return f"{self.dtype} {'×'.join(str(size) for size in self.shape) or 'scalar'}"


Field = Numbers | int | float | str | bool | None


def fields(path: Path, written: Manifest) -> dict[str, Field]:
    """Every field by its path, in an order in which what says most comes first.

    Raises CheckpointError naming the file that is damaged.
    """
    where = path / manifest.STATE
    tensors = {
        name.removesuffix(".safetensors"): numbers(manifest.content(path, written, name), path / name)
        for name in written.files
        if name != manifest.STATE
    }
    structure = strict.parsed(manifest.content(path, written, manifest.STATE), where, manifest.LARGEST_STATE)
    found: dict[str, Field] = {}
    try:
        for key, value in structure["mapping"]:
            if key == "ranks":
                for rank, own in enumerate(value["list"]):
                    found.update(_walked(own, f"ranks/{rank}", tensors.get(f"rank-{rank:05d}", {})))
            else:
                inside = tensors.get(key if key in ("model", "optimizers") else "rest", {})
                found.update(_walked(value, str(key), inside))
    except (TypeError, ValueError, KeyError, RecursionError) as error:
        raise CheckpointError(f"{where} does not hold what it should ({type(error).__name__}: {error}).") from None
    return dict(sorted(found.items(), key=lambda item: _place(item[0])))


def _place(name: str) -> int:
    return next((place for place, start in enumerate(_FIRST) if name.startswith(f"{start}/")), len(_FIRST))


def _walked(value: Any, name: str, tensors: dict[str, Numbers]) -> Iterator[tuple[str, Field]]:
    if not isinstance(value, dict):
        yield name, value
        return
    ((kind, content),) = value.items()
    if kind in ("tensor", "complex"):
        yield name, tensors[content]
    elif kind == "float":
        yield name, float(content)
    elif kind == "mapping":
        for key, item in content:
            yield from _walked(item, f"{name}/{key}", tensors)
    elif kind in ("list", "tuple"):
        for index, item in enumerate(content):
            yield from _walked(item, f"{name}/{index}", tensors)
    else:
        raise ValueError(f"it holds something unknown ('{kind}')")


def numbers(content: bytes, where: Path) -> dict[str, Numbers]:
    """The tensors of a safetensors file by name. Raises CheckpointError where it is none."""
    length = int.from_bytes(content[:8], "little")
    if not 8 <= 8 + length <= len(content):
        raise CheckpointError(f"{where} is no safetensors file: its header would end behind it.")
    header = strict.parsed(content[8 : 8 + length], where, manifest.LARGEST_STATE)
    body = memoryview(content)[8 + length :]
    found = {}
    try:
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            start, end = entry["data_offsets"]
            one = Numbers(str(entry["dtype"]), tuple(int(size) for size in entry["shape"]), body[start:end])
            if not 0 <= start <= end <= len(body) or (len(one) and (end - start) % len(one)):
                raise ValueError(f"'{name}' has no place in it")
            found[name] = one
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{where} does not hold what it should ({error}).") from None
    return found


def shown(value: Field) -> str:
    """A value in a few characters; of a tensor its type and shape."""
    text = str(value) if isinstance(value, Numbers) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
