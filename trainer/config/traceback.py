"""The traceback of an exception out of the user's own code, without our frames above it."""

import sys
import traceback
from collections.abc import Callable
from types import TracebackType

import trainer

_LIBRARIES = ("torch", "hydra", "omegaconf", "contextlib", "importlib", "runpy")


def print_users(error: BaseException) -> None:
    """Print to stderr, beginning with the first frame that is neither ours nor of the libraries in between.

    An exception that no code of the user's took part in begins with our last frame: it is between us and torch.
    """
    whole = error.__traceback__
    users = _from(whole, lambda frame: not (_ours(frame) or _library(frame)))
    if users is None:
        users = _from(whole, lambda frame: not _ours(frame) and not _library(frame, ("hydra", "omegaconf")))
    error.__traceback__ = users or whole
    traceback.print_exception(error, file=sys.stderr)


def _from(frame: TracebackType | None, wanted: Callable[[TracebackType], bool]) -> TracebackType | None:
    while frame is not None and not wanted(frame):
        frame = frame.tb_next
    return frame


def _ours(frame: TracebackType) -> bool:
    """Whether the frame is of this package. The recipes are not: they are written as a user's own."""
    name = str(frame.tb_frame.f_globals.get("__name__", ""))
    return name.partition(".")[0] == trainer.__name__ and not name.startswith("trainer.recipes")


def _library(frame: TracebackType, names: tuple[str, ...] = _LIBRARIES) -> bool:
    return str(frame.tb_frame.f_globals.get("__name__", "")).partition(".")[0] in names
