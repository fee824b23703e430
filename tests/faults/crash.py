"""A disk that can crash: it records what is asked of it, and builds the states that a crash may leave.

What POSIX promises and no more. The bytes of a file are sure after its fsync; until then each page may be there, be
zero, hold noise or be missing. The entries of a folder (files made, renamed, removed in it) are sure after the folder's
fsync; until then each change may have reached the disk or not, whatever happened to the others.
"""

import errno
import os
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PAGE = 512  # smaller than a real one: the files of a trial are small


class Crash(BaseException):
    """The process is gone: from here on nothing it does reaches the disk."""


class Recorder:
    """Stands for the module `os` inside trainer.checkpoint.disk: passes all on, keeps a log, and can fail.

    Args:
        fails_at: the number of the call that fails; None for none.
        how: `exit` (the process is gone), `ENOSPC` or `EIO`; those two for this one call, or for all from here on.
        without: fsyncs that are left out: "file", "pending" (the folder being written) or "parent".
    """

    def __init__(
        self, fails_at: int | None = None, how: str = "exit", lasting: bool = False, without: str | None = None
    ) -> None:
        self.log: list[tuple[Any, ...]] = []
        self.calls = 0
        self._fails_at, self._how, self._lasting, self._without = fails_at, how, lasting, without
        self._open: dict[int, Path] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)  # constants, path, name

    def _enter(self) -> None:
        number, self.calls = self.calls, self.calls + 1
        if self._fails_at is None or number < self._fails_at:
            return
        if self._how == "exit":
            raise Crash
        if number == self._fails_at or self._lasting:
            raise OSError(getattr(errno, self._how), os.strerror(getattr(errno, self._how)))

    def open(self, path: Any, flags: int, mode: int = 0o777) -> int:
        self._enter()
        handle = os.open(path, flags, mode)
        self._open[handle] = Path(path)
        if flags & os.O_CREAT:
            self.log.append(("create", Path(path)))
        return handle

    def write(self, handle: int, data: Any) -> int:
        try:
            self._enter()
        except (OSError, Crash):
            part = bytes(data[: len(data) // 2])  # half of it had gone out
            os.write(handle, part)
            self.log.append(("write", self._open[handle], part))
            raise
        written = os.write(handle, data)
        self.log.append(("write", self._open[handle], bytes(data[:written])))
        return written

    def fsync(self, handle: int) -> None:
        self._enter()
        path = self._open[handle]
        kind = "file" if not path.is_dir() else "pending" if path.name.startswith(".") else "parent"
        if kind != self._without:
            self.log.append(("sync", path))

    def close(self, handle: int) -> None:
        self._enter()
        self._open.pop(handle)
        os.close(handle)

    def mkdir(self, path: Any) -> None:
        self._enter()
        os.mkdir(path)
        self.log.append(("mkdir", Path(path)))

    def rename(self, source: Any, target: Any) -> None:
        self._enter()
        os.rename(source, target)
        self.log.append(("rename", Path(source), Path(target)))

    def replace(self, source: Any, target: Any) -> None:
        self._enter()
        os.replace(source, target)
        self.log.append(("rename", Path(source), Path(target)))

    def unlink(self, path: Any) -> None:
        self._enter()
        os.unlink(path)
        self.log.append(("remove", Path(path)))

    def rmdir(self, path: Any) -> None:
        self._enter()
        os.rmdir(path)
        self.log.append(("remove", Path(path)))

    def end(self) -> None:
        """The process is gone, and with it what it had open."""
        for handle in self._open:
            os.close(handle)
        self._open.clear()


@dataclass
class Node:
    """A file or a folder: what is on the disk for sure, and what was asked of it since."""

    is_folder: bool
    sure: Any = None  # bytes, or {name: Node}
    now: Any = None
    pending: list[tuple[Any, ...]] = field(default_factory=list)


def node_of(path: Path) -> Node:
    """What lies there now, all of it on the disk."""
    if path.is_dir():
        entries = {inside.name: node_of(inside) for inside in path.iterdir()}
        return Node(True, dict(entries), dict(entries))
    return Node(False, path.read_bytes(), path.read_bytes())


class Disk:
    """The tree under a folder as it was before a save, and the log of that save played on it."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._top = node_of(root)

    def play(self, entry: tuple[Any, ...]) -> None:
        what, path, *more = entry
        if what == "sync":
            node = self._at(path)
            if node.is_folder:
                node.sure, node.pending = dict(node.now), []
            else:
                node.sure = node.now
            return
        if what == "write":
            node = self._at(path)
            node.now += more[0]
            return
        folder = self._at(path.parent)
        if what in ("create", "mkdir"):
            made = Node(True, {}, {}) if what == "mkdir" else Node(False, None, b"")
            change: tuple[Any, ...] = ("put", path.name, made)
        elif what == "rename":
            assert more[0].parent == path.parent, "a rename into another folder is not modelled"
            change = ("rename", path.name, more[0].name)
        else:
            change = ("remove", path.name)
        folder.pending.append(change)
        _change(folder.now, change)

    def _at(self, path: Path) -> Node:
        node = self._top
        for part in path.relative_to(self._root).parts:
            node = node.now[part]
        return node

    def crash(self, into: Path, rng: random.Random) -> None:
        """Write one of the states that a crash may leave now."""
        _leave(self._top, into, rng, rng.choice([0.0, 0.5, 0.5, 1.0]))


def _change(entries: dict[str, Node], change: tuple[Any, ...]) -> None:
    what, name, *more = change
    if what == "put":
        entries[name] = more[0]
    elif what == "rename" and name in entries:
        entries[more[0]] = entries.pop(name)
    elif what == "remove":
        entries.pop(name, None)


def _leave(node: Node, into: Path, rng: random.Random, likely: float) -> None:
    if node.is_folder:
        into.mkdir()
        entries = dict(node.sure)
        for change in node.pending:
            if rng.random() < likely:
                _change(entries, change)
        for name, inside in entries.items():
            _leave(inside, into / name, rng, likely)
        return
    if node.sure == node.now:
        into.write_bytes(node.now)
        return
    length = rng.choice([0, len(node.now), rng.randint(0, len(node.now))])
    pages = [node.now[start : start + PAGE] for start in range(0, length, PAGE)]
    kept = [page if rng.random() < likely else _lost(page, rng) for page in pages]
    into.write_bytes(b"".join(kept)[:length])


def _lost(page: bytes, rng: random.Random) -> bytes:
    return rng.choice([bytes(len(page)), rng.randbytes(len(page))])
