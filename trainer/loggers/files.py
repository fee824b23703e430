"""A file that a logger adds records to: written every 50 records or once a second, and never lost silently.

There is no thread: what waits is written by the next record that finds the second over, by `flush` or by `close`.
"""

import contextlib
import errno
import os
import shutil
import warnings
from pathlib import Path
from time import perf_counter

from trainer.errors import CheckpointError, TrainerWarning

RECORDS = 50
SECONDS = 1.0

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class RecordFile:
    """Whole records in a file, in order.

    Where writing fails (disk full, folder gone) the file is cut back to its last whole record, closed, and a
    CheckpointError says which file, how many bytes were needed and what to do; every later `write` raises it again.
    With `goes_on` it is a warning, once: these records are missing, and later ones are tried.
    Raises CheckpointError where the file cannot be opened; `new` refuses one that is there already.
    """

    def __init__(self, path: Path, *, new: bool = False, goes_on: bool = False) -> None:
        self.path = path
        self._goes_on = goes_on
        self._has_warned = False
        make_folder(path.parent)
        try:
            self._file = path.open("xb" if new else "ab", buffering=0)
        except OSError as error:
            raise CheckpointError(
                f"{path} cannot be opened for writing ({_words(error)}): {_what_to_do(error)}"
            ) from error
        self._size = os.fstat(self._file.fileno()).st_size
        self._waiting: list[bytes] = []
        self._due = perf_counter() + SECONDS
        self._failure: str | None = None

    def write(self, record: bytes) -> None:
        """Add one record. Most calls only put it in line."""
        self._waiting.append(record)
        if len(self._waiting) >= RECORDS or perf_counter() >= self._due or self._failure is not None:
            self.flush()

    def flush(self) -> None:
        """Hand everything that waits to the operating system."""
        if self._failure is not None:
            self._waiting.clear()
            if self._goes_on:
                return
            raise CheckpointError(self._failure)
        if self._waiting:
            data = b"".join(self._waiting)
            self._waiting.clear()
            try:
                self._still_there()
                self._write(data)
                self._size += len(data)
            except OSError as error:
                self._fail(error, len(data))
        self._due = perf_counter() + SECONDS

    def close(self) -> None:
        """Write what waits and close. Once closed, or after a failure that was raised, nothing happens."""
        if not self._file.closed:
            try:
                self.flush()
            finally:
                self._file.close()

    def _write(self, data: bytes) -> None:
        left = memoryview(data)
        while left:
            left = left[self._file.write(left) :]

    def _still_there(self) -> None:
        # A file whose folder was removed takes every write without an error, and they are gone.
        if not os.path.samestat(self.path.stat(), os.fstat(self._file.fileno())):
            raise FileNotFoundError(errno.ENOENT, "another file took its place")

    def _fail(self, error: OSError, needed: int) -> None:
        is_cut = False
        with contextlib.suppress(OSError):  # The first failure is the one to tell; readers drop a torn last record.
            self._file.truncate(self._size)
            is_cut = True
        room = f"{needed:,} bytes could not be written to {self.path} ({_words(error)}"
        if error.errno in _FULL:
            room += _free(self.path.parent)
        failure = f"{room}): {_what_to_do(error)}"
        if not (self._goes_on and is_cut):
            self._file.close()
            self._failure = failure
        if not self._goes_on:
            raise CheckpointError(failure) from error
        if not self._has_warned:
            self._has_warned = True
            _warn(failure)


def write_whole(path: Path, content: bytes, goes_on: bool = False) -> None:
    """A file at once, in place of one that is there. Raises TrainerError where writing fails."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        failure = f"{path} cannot be written ({_words(error)}): {_what_to_do(error)}"
        if not goes_on:
            raise CheckpointError(failure) from error
        _warn(failure)


def make_folder(folder: Path) -> None:
    """Make the folder and those above it. Raises CheckpointError where that is not possible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"the folder {folder} cannot be made ({_words(error)}): {_what_to_do(error)}") from error


def _what_to_do(error: OSError) -> str:
    first = "free some space" if error.errno in _FULL else "see that its folder is there and can be written to"
    return f"{first}, choose another folder, or switch it off (loggers.metrics, loggers.tensorboard)."


def _warn(failure: str) -> None:
    warnings.warn(f"{failure} Training goes on (checkpoint.on_error=warn).", TrainerWarning, stacklevel=4)


def _words(error: OSError) -> str:
    words = error.strerror or str(error)
    return words[:1].lower() + words[1:]


def _free(folder: Path) -> str:
    try:
        return f", {shutil.disk_usage(folder).free:,} bytes free there"
    except OSError:
        return ""
