"""What became of the jobs of a sweep, whichever launcher ran them, and the table at its end."""

import math
import shlex
from collections.abc import Sequence
from typing import Any

from trainer.config.help import table


class Failed(float):
    """A job's value where it has none: NaN, with the reason and the exit code. It travels from another process.

    A sweeper that learns from values asks for float(value), which raises ValueError: so it knows a failure as such.
    """

    reason: str
    code: int

    def __new__(cls, reason: str, code: int) -> "Failed":
        made = super().__new__(cls, math.nan)
        made.reason, made.code = " ".join(reason.split()), code
        return made

    def __float__(self) -> float:
        raise ValueError(self.reason)

    def __reduce__(self) -> tuple[Any, ...]:
        return Failed, (self.reason, self.code)


class Watched:
    """A launcher of Hydra's, with what each of its jobs gave kept in `jobs`: its overrides and its value."""

    def __init__(self, launcher: Any) -> None:
        self._launcher = launcher
        self.jobs: list[tuple[Sequence[str], Any]] = []

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Any:
        """Run a batch of jobs. Returns Hydra's JobReturns."""
        returns = self._launcher.launch(job_overrides, initial_job_idx=initial_job_idx)
        for words, job in zip(job_overrides, returns, strict=True):
            value = job._return_value
            if type(value) is float and math.isnan(value):
                job.return_value = Failed("its metric is not a number", 0)
            # An exception here is the launcher's: a job of ours says with a Failed what went wrong in it.
            self.jobs.append((words, Failed(repr(value), 1) if isinstance(value, BaseException) else value))
        return returns


def summary(jobs: Sequence[tuple[Sequence[str], Any]], folder: str, metric: str, mode: str) -> list[str]:
    """The lines at the end: each job with what set it apart, its metric or why it failed, and which one is best."""
    failed = sum(isinstance(value, Failed) for _, value in jobs)
    count = f"{len(jobs)} job{'' if len(jobs) == 1 else 's'}"
    values = {number: value for number, (_, value) in enumerate(jobs) if math.isfinite(value)}
    best = (max if mode == "max" else min)(values, key=values.__getitem__) if len(values) > 1 else None
    common = set.intersection(*(set(words) for words, _ in jobs)) if len(jobs) > 1 else set()
    rows = []
    for number, (words, value) in enumerate(jobs):
        said = f"failed: {value.reason}" if isinstance(value, Failed) else f"{metric} {value:.6g}"
        own = shlex.join(word for word in words if word not in common)
        rows.append((f"job {number}  {own}".rstrip(), f"{said}, best" if number == best else said))
    return [f"sweep: {count}, {failed or 'none'} failed, in {folder}", *table(rows)]


def code(jobs: Sequence[tuple[Sequence[str], Any]]) -> int:
    """The exit code of the first job that failed, or 0."""
    return next((value.code for _, value in jobs if isinstance(value, Failed)), 0)
