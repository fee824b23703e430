"""What a process that loads data reports of itself before it is too late: no memory left, a micro-batch that cannot be
sent. What happens to it from outside (a kill, silence) is seen by who watches it (`trainer.data.workers`)."""

import multiprocessing.queues
import re
from pathlib import Path
from typing import Any

import torch
from torch._utils import ExceptionWrapper
from torch.utils.data import get_worker_info

from trainer.errors import DataError

# The words for it in what Python, numpy and torch raise.
_NO_SHARED = re.compile(r"unable to [\w() ]+ </torch_\d+_\d+_\d+>.*(No space left on device|File too large)")
_NO_FILES = "Too many open files"
_NO_MEMORY = re.compile(
    r"[\w.]*MemoryError\b|(RuntimeError|OSError|[\w.]*AcceleratorError): "
    r".*([Cc]an(no|')t allocate memory|out of memory|unable to mmap)"
)
_REPORTED = re.compile(r"Caught \w+ (in|sending from) DataLoader worker process \d+\.\n")
_SENDING = "sending from"
_FRAME = re.compile(r'^ +File "(.+)", line (\d+), in (\S+)$', re.MULTILINE)
_OURS, _TORCHS = Path(__file__).parents[1], Path(torch.__file__).parent


def report_what_cannot_be_sent() -> None:
    """In a worker: an error of the thread that sends becomes the micro-batch's.

    A worker pickles on a thread what it sends. As Python has it, an error there is printed and the micro-batch is
    gone, so that the program waits for it for ever: where shared memory is full, or an item cannot be pickled.
    """
    if hasattr(multiprocessing.queues.Queue, "_on_queue_feeder_error"):  # made to be overridden, but a private name
        multiprocessing.queues.Queue._on_queue_feeder_error = _report


def _report(queue: Any, error: Exception, sent: Any) -> None:
    info = get_worker_info()
    told = ExceptionWrapper(where=f"{_SENDING} DataLoader worker process {info.id if info else 0}")
    content = sent[1]
    if isinstance(content, ExceptionWrapper):  # an exception of a class that cannot be pickled
        told = content
        told.exc_type = RuntimeError
    elif not isinstance(error, MemoryError | OSError):
        told.exc_type = RuntimeError
    queue.put((sent[0], told))


def explained(error: BaseException) -> DataError | None:
    """The sentence for what a worker reported, where it is not the user's own error but a lack of memory or a
    micro-batch that cannot be sent."""
    text = str(error.args[0]) if error.args else ""
    reported = _REPORTED.match(text)
    what = _what(text)
    if _NO_FILES in what and (reported or text.startswith(_NO_FILES)):
        return DataError(
            f"no more files can be opened for what the processes that load data send ({what}{_place(text)}): raise the "
            "limit (ulimit -n), lower data.workers, or look for files that the dataset leaves open."
        )
    if reported is None:
        return None
    if _NO_SHARED.search(what):
        return DataError(
            f"a process that loads data found no shared memory for a micro-batch ({what}): make it larger (/dev/shm; "
            "docker run --shm-size=8g), or lower data.workers or data.batch_size; data.workers=0 needs none."
        )
    if _NO_MEMORY.match(what):
        return DataError(
            f"a process that loads data ran out of memory ({what}{_place(text)}): each of the data.workers needs "
            "memory of its own, so lower their number or data.batch_size, or look with data.workers=0."
        )
    if reported[1] == _SENDING:
        return DataError(
            f"a micro-batch could not be sent by the process that loads data ({what}): make items of tensors, numbers "
            "and texts, or load them with data.workers=0."
        )
    return None


def _what(text: str) -> str:
    """The exception's own words: what follows the last line of the traceback that is indented."""
    lines = text.rstrip().splitlines()
    begins = max((number for number, line in enumerate(lines) if line.startswith(" ")), default=-1) + 1
    return " ".join(" ".join(lines[begins:]).split())


def _place(text: str) -> str:
    """Where in the user's code."""
    for file, line, name in reversed(_FRAME.findall(text)):
        path = Path(file)
        if not (path.is_relative_to(_OURS) or path.is_relative_to(_TORCHS)):
            return f", {file}:{line} in {name}"
    return ""
