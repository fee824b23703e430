"""A checkpoint's manifest: which files it has, their bytes and SHA-256, and where the run stood. No torch here.

The manifest ends with the SHA-256 of all of its bytes before that, so that it is checked before it is parsed; every
other file is checked against it before it is parsed.
"""

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.checkpoint import strict
from trainer.errors import CheckpointError

FORMAT = 2
NAME = "manifest.json"
STATE = "state.json"
# The only names that a checkpoint's files can have, so that none leads out of its folder.
FILES = re.compile(r"state\.json|(model|optimizers|rest|rank-\d{5})\.safetensors")
LARGEST_STATE = 1 << 27
_LARGEST = 1 << 22
_BEFORE, _AFTER = b',\n "sha256": "', b'"\n}\n'
_END = len(_BEFORE) + 64 + len(_AFTER)
_NO_LINKS = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


@dataclass(frozen=True)
class Entry:
    """One file: its length in bytes and its SHA-256 as 64 hex digits."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What is known of a checkpoint before its files are read.

    Attributes:
        number: counts the saves of a run; the newest has the largest.
        clocks: where the run stood.
        best: the metric's name and value where this was the best evaluation so far.
        files: by name.
        world: the number of processes that trained.
        version: of the package that wrote it.
        time: when, in UTC, for people: nothing depends on it.
    """

    number: int
    clocks: Mapping[str, int]
    best: tuple[str, float] | None
    files: Mapping[str, Entry]
    world: int = 1
    version: str = ""
    time: str = ""

    @property
    def size(self) -> int:
        return sum(entry.bytes for entry in self.files.values())

    def encoded(self) -> bytes:
        """As the file has it."""
        document = {
            "format": FORMAT,
            "version": self.version,
            "time": self.time,
            "number": self.number,
            "world": self.world,
            "clocks": dict(self.clocks),
            "best": None if self.best is None else {"metric": self.best[0], "value": self.best[1]},
            "files": {name: {"bytes": one.bytes, "sha256": one.sha256} for name, one in self.files.items()},
        }
        body = json.dumps(document, indent=1, allow_nan=False).encode()[: -len(b"\n}")]
        return body + _BEFORE + hashlib.sha256(body).hexdigest().encode() + _AFTER


def read(folder: Path) -> Manifest:
    """A checkpoint's manifest, checked. Raises CheckpointError that names the file and what is wrong with it."""
    path = folder / NAME
    with opened(path) as handle:
        size = os.fstat(handle.fileno()).st_size
        if size > _LARGEST:
            raise CheckpointError(f"{path} has {size} bytes, more than any manifest: it is damaged.")
        data = handle.read(_LARGEST + 1)
    body, end = data[:-_END], data[-_END:]
    digest = hashlib.sha256(body).hexdigest().encode()
    if not _is_right(end, _BEFORE + digest + _AFTER):
        raise CheckpointError(f"{path} is damaged: its bytes are not those that were written (SHA-256).")
    document = strict.parsed(data, path, _LARGEST)
    if isinstance(document, dict) and document.get("format") != FORMAT:
        raise CheckpointError(f"{path} has format {document.get('format')!r}; this version reads format {FORMAT}.")
    try:
        return _manifest(document)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is no manifest that this version writes ({error}).") from None


def _manifest(document: Any) -> Manifest:
    files = {}
    for name, entry in _typed(document["files"], dict).items():
        if not FILES.fullmatch(name):
            raise ValueError(f"it names a file {name!r}, which no checkpoint has")
        length, sha256 = _typed(entry["bytes"], int), _typed(entry["sha256"], str)
        if length < 0 or not re.fullmatch(r"[0-9a-f]{64}", sha256):
            raise ValueError(f"what it says of {name} cannot be")
        files[name] = Entry(length, sha256)
    if STATE not in files:
        raise ValueError(f"it names no {STATE}")
    clocks = {name: _typed(count, int) for name, count in _typed(document["clocks"], dict).items()}
    best = document["best"]
    return Manifest(
        number=_typed(document["number"], int),
        clocks=clocks,
        best=None if best is None else (_typed(best["metric"], str), float(_typed(best["value"], int | float))),
        files=files,
        world=_typed(document["world"], int),
        version=_typed(document["version"], str),
        time=_typed(document["time"], str),
    )


def _typed(value: Any, kind: Any) -> Any:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(f"{value!r} is out of place")
    return value


def content(folder: Path, manifest: Manifest, name: str) -> bytes:
    """The bytes of one file, checked. Raises CheckpointError that names it."""
    found = list(pieces(folder, manifest, name, manifest.files[name].bytes + 1))
    return found[0] if len(found) == 1 else b"".join(found)


def check(folder: Path, manifest: Manifest) -> None:
    """Compare every file with the manifest. Raises CheckpointError that names the first that differs."""
    for name in manifest.files:
        for _ in pieces(folder, manifest, name):
            pass


def pieces(folder: Path, manifest: Manifest, name: str, at_once: int = 1 << 22) -> Iterator[bytes]:
    """One file, piece by piece; only after the last one is it known whether they are right, and it raises."""
    path, entry = folder / name, manifest.files[name]
    with opened(path) as handle:
        size = os.fstat(handle.fileno()).st_size
        if not _is_right(size, entry.bytes):
            raise CheckpointError(f"{path} is damaged: it has {size} bytes where {entry.bytes} were written.")
        digest = hashlib.sha256()
        while piece := handle.read(at_once):
            digest.update(piece)
            yield piece
    if not _is_right(digest.hexdigest(), entry.sha256):
        raise CheckpointError(f"{path} is damaged: its bytes are not those that were written (SHA-256).")


def _is_right(found: object, written: object) -> bool:
    return found == written


def opened(path: Path) -> Any:
    """A plain file, to read; never a link, a pipe or a folder. Raises CheckpointError that names it."""
    try:
        if not stat.S_ISREG(os.lstat(path).st_mode):
            raise CheckpointError(f"{path} is not a plain file: a checkpoint has no links, pipes or folders in it.")
        return _Read(os.open(path, os.O_RDONLY | _NO_LINKS), path)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: the checkpoint is not whole.") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror or error}).") from None


class _Read:
    """A file that is read; what the system says against it becomes a CheckpointError."""

    def __init__(self, handle: int, path: Path) -> None:
        self._file = open(handle, "rb", buffering=0)  # noqa: SIM115 (closed in __exit__)
        self._path = path

    def __enter__(self) -> "_Read":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def fileno(self) -> int:
        return self._file.fileno()

    def read(self, count: int) -> bytes:
        try:
            return self._file.read(count) or b""
        except OSError as error:
            raise CheckpointError(f"{self._path} cannot be read ({error.strerror or error}).") from None
