"""One run in a folder: a lock of the operating system, which ends with the process that holds it. No torch here."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from trainer.errors import CheckpointError

NAME = "run.lock"
_BYTE = 1 << 30  # Windows locks bytes against reading, so one far behind the text

# What this process holds. By process: a child that is forked inherits the table, but no lock. The files are kept here,
# as a lock ends when its file is closed, and a Lock that nobody refers to any more would close it.
_held: dict[tuple[int, str], IO[str]] = {}


class Lock:
    """Held from `take` to `release`.

    Other processes are kept out by a POSIX record lock (on Windows by a lock on a byte), another Trainer of this one
    by a table. A file system without locks keeps nobody out.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / NAME
        self._key: tuple[int, str] | None = None

    def take(self) -> bool:
        """Make the folder ours. Whether the file system could lock it.

        Raises CheckpointError with the process that has it, or where the folder cannot be written to.
        """
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            key = (os.getpid(), str(self._path.parent.resolve()))
            if key in _held:
                raise _taken(self._path.parent, "another Trainer of this process")
            while True:
                file = open(self._path, "a+", encoding="ascii", errors="replace")  # noqa: SIM115 (held until release)
                locks = _lock(file, self._path.parent)
                if _is_still(file, self._path):
                    break
                file.close()  # its last holder removed it between our open and our lock
            file.truncate(0)
            file.write(f"{os.getpid()}\n")
            file.flush()
        except OSError as error:
            raise CheckpointError(
                f"{self._path.parent} cannot be written to ({error.strerror or error}): give the run another folder."
            ) from None
        self._key = key
        _held[key] = file
        return locks

    def release(self) -> None:
        """Let others have the folder; in a forked child nothing happens."""
        if self._key is None or self._key[0] != os.getpid():
            return
        file = _held.pop(self._key)
        self._key = None
        try:
            if os.name == "nt":  # it removes nothing that is open
                file.close()
            self._path.unlink(missing_ok=True)
        except OSError:
            pass  # the folder has gone, or another one has it already
        finally:
            file.close()


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """The folder is ours meanwhile. Raises CheckpointError with the process that has it."""
    lock = Lock(folder)
    lock.take()
    try:
        yield
    finally:
        lock.release()


def _lock(file: IO[str], folder: Path) -> bool:
    try:
        if sys.platform == "win32":
            import msvcrt

            file.seek(_BYTE)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        number = file.readline().strip()
        file.close()
        raise _taken(folder, f"process {number}" if number.isdigit() else "another process") from None
    except OSError:
        return False  # no locks here (some network file systems)
    return True


def _is_still(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def _taken(folder: Path, who: str) -> CheckpointError:
    return CheckpointError(f"{folder} is in use by {who}: wait for it, or give this run another folder (run=NAME).")
