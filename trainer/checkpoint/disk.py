"""What a save asks of the file system: the few calls, in the order in which a crash leaves the old or the new."""

import hashlib
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

_PIECE = 1 << 24  # bytes in one call, so that a thread that writes lets the others in
_SMALL = 1 << 20
_BINARY = getattr(os, "O_BINARY", 0)


def write(path: Path, pieces: Iterable[bytes | bytearray | memoryview]) -> tuple[int, str]:
    """Make a new file and bring it to the disk. Returns its length in bytes and its SHA-256.

    The hash is of what is in memory, so that whatever happens on the way to the disk is found when it is read.
    """
    digest, length = hashlib.sha256(), 0
    handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | _BINARY, 0o666)
    try:
        for piece in _together(pieces):
            length += len(piece)
            for start in range(0, len(piece), _PIECE):
                part = piece[start : start + _PIECE]
                digest.update(part)
                while len(part):
                    part = part[os.write(handle, part) :]
        os.fsync(handle)
    finally:
        os.close(handle)
    return length, digest.hexdigest()


def digest(pieces: Iterable[bytes | bytearray | memoryview]) -> tuple[int, str]:
    """What `write` would return, without writing."""
    found, length = hashlib.sha256(), 0
    for piece in pieces:
        found.update(piece)
        length += len(piece)
    return length, found.hexdigest()


def _together(pieces: Iterable[bytes | bytearray | memoryview]) -> Iterable[memoryview]:
    """Small pieces joined, so that a thousand small tensors are not a thousand calls."""
    held = bytearray()
    for piece in pieces:
        if len(piece) < _SMALL:
            held += piece
        if held and (len(held) >= _SMALL or len(piece) >= _SMALL):
            yield memoryview(held)
            held = bytearray()
        if len(piece) >= _SMALL:
            yield memoryview(piece)
    if held:
        yield memoryview(held)


def sync_folder(folder: Path) -> None:
    """Bring a folder's entries (files made, renamed, removed in it) to the disk."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except PermissionError:
        if os.name == "nt":
            return  # Windows opens no folder, and needs no sync of it
        raise
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, each known to the disk before something is put into it."""
    missing = []
    while not os.path.isdir(folder):
        missing.append(folder)
        folder = folder.parent
    for one in reversed(missing):
        try:
            os.mkdir(one)
        except FileExistsError:
            if not os.path.isdir(one):
                raise
        sync_folder(one.parent)


def begin(folder: Path) -> None:
    """Make the folder that a save is written into."""
    os.mkdir(folder)


def move(source: Path, target: Path) -> None:
    """Give a folder its name, or a file its place; the name is on the disk afterwards."""
    os.replace(source, target)
    sync_folder(target.parent)


def remove(folder: Path, gone: Path) -> None:
    """Take a folder away, first out of sight under the name `gone`: half of it is never found under its own."""
    if folder != gone:
        os.rename(folder, gone)
    for name in os.listdir(gone):
        os.unlink(gone / name)
    os.rmdir(gone)


def discard(file: Path) -> None:
    """Take one file away."""
    os.unlink(file)


def free(folder: Path) -> str:
    """Bytes that are free where the folder is or would be, in words."""
    while not os.path.isdir(folder) and folder != folder.parent:
        folder = folder.parent
    try:
        return str(shutil.disk_usage(folder).free)
    except OSError:
        return "an unknown number"
