"""The family of errors. Each says what is wrong, where and what to do, and carries its exit code."""

import difflib
from collections.abc import Iterable


class TrainerError(Exception):
    """The root of the family. Raised itself only for what has no exit code of its own (1)."""

    exit_code = 1


class ConfigError(TrainerError):
    """A setting, an argument or a name that cannot be meant as it stands."""

    exit_code = 2


class DataError(TrainerError):
    """Data that cannot be read, or that is not what the run needs."""

    exit_code = 3


class DivergedError(TrainerError):
    """The run left the numbers that training can go on from."""

    exit_code = 4


class CheckpointError(TrainerError):
    """A checkpoint that cannot be written, read or fitted to this run, or a run's folder that cannot be written."""

    exit_code = 5


class LostRankError(TrainerError):
    """Another rank is gone or does not answer, so that this one cannot go on."""


class WrongGradientError(TrainerError):
    """The certificate says that what is configured does not compute the gradient that was asked for."""

    exit_code = 6


class ObjectiveError(TrainerError):
    """An objective whose answer is not something that can be differentiated as a window asks."""


class GradientError(TrainerError):
    """A gradient that autograd refuses, or that would silently be wrong."""


class TrainerWarning(UserWarning):
    """What goes wrong and does not stop the run, because it was asked not to."""


class Stopped(SystemExit):
    """The run was asked to stop (SIGTERM, Ctrl-C) and its state is saved. Uncaught it ends the process with 75, the
    exit code of what can be taken up again (EX_TEMPFAIL of sysexits.h)."""

    exit_code = 75

    def __init__(self, reason: str) -> None:
        super().__init__(self.exit_code)
        self.reason = reason


class Paused(BaseException):
    """Raised between two micro-batches, of a window or of an evaluation: what is open stays so, to be gone on with."""


def did_you_mean(wrong: str, known: Iterable[str]) -> str:
    """The hint behind a wrong name: the nearest right one, or all of them when none is near."""
    names = sorted(known)
    near = difflib.get_close_matches(wrong, names, n=1, cutoff=0.6)
    if near:
        return f"did you mean '{near[0]}'?"
    return f"choose one of: {', '.join(names)}." if names else "there is none to choose from."
