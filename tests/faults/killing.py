"""Runs in forked children that are killed at a random instant, and what they come to when they are taken up.

The children are forked from one warm process, so a trial costs its run and no import. A child says in shared memory
where it is; the parent sleeps, sends SIGKILL, and reads it.
"""

import mmap
import os
import random
import signal
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from runs import MSE, error, lines, trainer_of
from test_run_state import whole_state

from trainer import Trainer, rng
from trainer.checkpoint import folder, store

STAGES = ("starting", "recovering", "drawing", "window", "step", "evaluation", "done")
DONE = STAGES.index("done")


class Where:
    """What a child says of itself: its stage, whether a save is under way, and how many checkpoints are whole."""

    def __init__(self) -> None:
        self._shared = mmap.mmap(-1, 4)

    def say(self, stage: str) -> None:
        self._shared[0] = STAGES.index(stage)

    def saves(self, by: int) -> None:
        self._shared[1] = max(0, self._shared[1] + by)

    def saved(self) -> None:
        self._shared[2] = min(255, self._shared[2] + 1)

    @property
    def stage(self) -> str:
        return STAGES[self._shared[0]]

    @property
    def is_saving(self) -> bool:
        return self._shared[1] > 0

    @property
    def checkpoints(self) -> int:
        return self._shared[2]


@dataclass
class Kind:
    """A run to be killed: the kind of `runs.kinds`, its settings, and how it is built when it is taken up."""

    name: str
    settings: dict[str, Any]

    def made(self, run: Path, where: Where | None, resumed: bool) -> Trainer:
        """Resumed, it is built with another start and a poisoned rate: it passes only if the state was truly loaded."""
        other = {"start": 77, "poison": 1e4, "seed": 55} if resumed else {}

        def objective(model: Any, batch: Any) -> Any:
            if where is not None and torch.is_grad_enabled():
                where.say("window")
            return MSE(model, batch)

        objective.weight = MSE.weight  # type: ignore[attr-defined]
        trainer = trainer_of(
            self.name, folder=run, objective=objective, metrics_file=True, **{**self.settings, **other}
        )
        if resumed:
            rng.seed_all(1234)
        if where is not None:
            watch(trainer, where)
        return trainer


def watch(trainer: Trainer, where: Where) -> None:
    """Let a run say where it is."""
    evaluation, update, mark = trainer._held_out.evaluation, trainer.step._updates[0].apply, trainer._feed._mark
    evaluation._metrics = lambda model, batch: (where.say("evaluation"), error(model, batch))[1]
    trainer.step._updates[0].apply = lambda factor: (where.say("step"), update(factor))[1]
    trainer._feed._mark = lambda: (where.say("drawing"), mark())[1]
    trainer._loggers.start = lambda event, own=trainer._loggers.start: (where.say("starting"), own(event))[1]
    write = store.write

    def written(path: Path, taken: Any, label: Any) -> Any:
        where.saves(1)
        try:
            return write(path, taken, label)
        finally:
            where.saved()
            where.saves(-1)

    store.write = written  # of this child alone


def lives(kind: Kind, run: Path, where: Where) -> dict[str, Any]:
    """What a child does: take the folder up, or begin, and come to the end. Returns its whole state."""
    where.say("recovering")
    trainer = kind.made(run, where, resumed=folder.last(run) is not None)
    trainer.fit(resume="auto")
    where.say("done")
    return whole_state(trainer)


def forked(act: Callable[[], Any]) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # fork beside threads: the child takes no lock of theirs
        child = os.fork()
    if child == 0:
        try:
            act()
            os._exit(0)
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(1)
    return child


def ends(child: int) -> int:
    """Its exit code, negative where a signal ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed(kind: Kind, run: Path, after: Callable[[Where], None]) -> Where:
    """Fork a child that lives, and kill it once `after` returns. What it said last."""
    where = Where()
    child = forked(lambda: lives(kind, run, where))
    after(where)
    os.kill(child, signal.SIGKILL)
    code = ends(child)
    assert code == -signal.SIGKILL or (code == 0 and where.stage == "done"), f"the child ended by itself with {code}"
    return where


def at_random(random_: random.Random, longest: float) -> Callable[[Where], None]:
    """Some time after the run's first word."""

    def wait(where: Where) -> None:
        until = time.monotonic() + 60
        while where.stage == "starting" and time.monotonic() < until:
            time.sleep(0.0005)
        time.sleep(random_.uniform(0, longest))

    return wait


def outcome(kind: Kind, run: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The end of a run that is let go on in this process, and its metrics."""
    state = lives_here(kind, run)
    return state, lines(run)


def lives_here(kind: Kind, run: Path) -> dict[str, Any]:
    resumed = folder.last(run) is not None
    trainer = kind.made(run, None, resumed)
    trainer.fit(resume="auto")
    return whole_state(trainer)


def what_differs(whole: tuple[dict[str, Any], Any], found: tuple[dict[str, Any], Any]) -> str | None:
    parts = [name for name in whole[0] if whole[0][name] != found[0][name]]
    if whole[1] != found[1]:
        parts.append("metrics.jsonl")
    return ", ".join(parts) or None
