"""What a loader's worker reports: its own words are recognised where they lack memory, and left alone elsewhere."""

import queue
import sys

import pytest
from torch._utils import ExceptionWrapper

from trainer import DataError
from trainer.data.worker_errors import _report, explained


def from_worker(error: Exception, where: str = "in DataLoader worker process 1") -> Exception:
    """The error as torch gives it to the program that asks the worker for a batch."""
    try:
        raise error
    except Exception:
        wrapped = ExceptionWrapper(where=where)
    try:
        wrapped.reraise()
    except Exception as told:
        return told
    raise AssertionError


LACKS = [
    (MemoryError(), "ran out of memory (MemoryError, "),
    (OSError(12, "Cannot allocate memory"), "ran out of memory (OSError: [Errno 12] Cannot allocate memory, "),
    (
        RuntimeError("unable to mmap 24 bytes from file </torch_5_2_6>: Cannot allocate memory (12)"),
        "ran out of memory",
    ),
    (RuntimeError("CUDA out of memory. Tried to allocate 2.00 MiB.\nSee the manual."), "ran out of memory (RuntimeErr"),
    (
        RuntimeError("unable to write to file </torch_18_368_0>: No space left on device (28)"),
        "found no shared memory for a micro-batch (RuntimeError: unable to write to file",
    ),
    (
        RuntimeError("unable to allocate shared memory(shm) for file </torch_4_9_2>: No space left on device (28)"),
        "make it larger (/dev/shm; docker run --shm-size=8g), or lower data.workers or data.batch_size",
    ),
    (OSError(24, "Too many open files", "image.png"), "raise the limit (ulimit -n), lower data.workers"),
]


@pytest.mark.parametrize(("error", "words"), LACKS)
def test_a_lack_is_a_sentence(error, words) -> None:
    found = explained(from_worker(error))
    assert isinstance(found, DataError) and words in str(found)
    assert "Traceback" not in str(found) and "\n" not in str(found)


@pytest.mark.parametrize(
    "error",
    [
        LookupError("my own"),
        ValueError("line one\nran out of memory? no"),
        KeyError("MemoryError of mine"),
        RuntimeError("unable to open file </data/torch_1.bin>: No such file"),
        OSError(28, "No space left on device", "cache.bin"),
    ],
)
def test_a_users_own_error_is_left_alone(error) -> None:
    assert explained(from_worker(error)) is None
    assert explained(error) is None


def test_a_lack_outside_of_workers_is_left_alone() -> None:
    assert explained(MemoryError("Caught MemoryError in my code")) is None
    assert explained(MemoryError()) is None


def test_the_users_line_is_named() -> None:
    assert f"{__file__}:" in str(explained(from_worker(MemoryError("for row 3")))) and "in from_worker" in str(
        explained(from_worker(MemoryError()))
    )


def test_too_many_files_of_the_program_itself_are_told_too() -> None:
    torchs = RuntimeError("Too many open files. Communication with the workers is no longer possible.")
    assert "ulimit -n" in str(explained(torchs))


class OwnError(Exception):
    """One that cannot be made of a text."""

    def __init__(self, a: int, b: int) -> None:
        super().__init__(a, b)


def test_what_the_sending_thread_fails_at_takes_the_batchs_place() -> None:
    sent: queue.Queue = queue.Queue()
    try:
        raise OwnError(1, 2)
    except OwnError as error:
        _report(sent, error, (7, object()))
    place, told = sent.get_nowait()
    assert place == 7
    with pytest.raises(RuntimeError, match=r"(?s)Caught RuntimeError sending from .* process 0\..*Own") as caught:
        told.reraise()
    assert "could not be sent by the process that loads data" in str(explained(caught.value))


def test_an_exception_that_cannot_be_sent_comes_as_one_that_can() -> None:
    sent: queue.Queue = queue.Queue()
    try:
        raise OwnError(1, 2)
    except OwnError:
        inner = ExceptionWrapper(sys.exc_info(), where="in DataLoader worker process 3")
    _report(sent, AttributeError("cannot pickle Own"), (1, inner))
    with pytest.raises(RuntimeError, match=r"(?s)in DataLoader worker process 3.*Own"):
        sent.get_nowait()[1].reraise()
