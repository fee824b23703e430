"""SIGKILL at a random instant of a run, and during recovery: taken up, it ends as if it had never been killed.

Everything is compared bit for bit: parameters, buffers, optimizer, clocks, generators, the place in the data, the best
so far, and every line of metrics.jsonl but for its times.
"""

import random
import shutil
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from killing import Kind, Where, at_random, killed, lives_here, outcome, what_differs
from results import SECOND, judge_instants
from tally import Tally, scratch, times

from trainer.checkpoint import folder
from trainer.optim import cosine

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no fork and no SIGKILL")

OFTEN = {"checkpoint_every": 2, "checkpoint_clock": "steps", "evaluate_every": 3, "evaluate_clock": "steps"}
KINDS = [
    Kind("adamw", {"steps": 40, "schedule": cosine(60, warmup=2), **OFTEN}),
    Kind("momentum", {"epochs": 13, "log_every": 3, **OFTEN, "evaluate_clock": "epochs", "evaluate_every": 1}),
    Kind("items", {"steps": 30, "checkpoint_background": False, **OFTEN}),
    Kind("loader", {"steps": 31, "log_every": 4, **OFTEN}),
    Kind("never", {"steps": 40, **OFTEN, "checkpoint_every": 7}),
]
"""Saves, evaluations and windows of several micro-batches take most of their time, as the promise is about those."""


class Whole:
    """Each kind's run that was never killed, and how long it takes; made once."""

    def __init__(self) -> None:
        self._known: dict[str, tuple] = {}

    def of(self, kind: Kind) -> tuple[tuple, float]:
        if kind.name not in self._known:
            taken = []
            for _ in range(3):  # the shortest: a busy machine would else let most runs end before they are struck
                with scratch() as run:
                    began = time.monotonic()
                    found = outcome(kind, run)
                    taken.append(time.monotonic() - began)
            self._known[kind.name] = (found, min(taken))
        return self._known[kind.name]


WHOLE = Whole()


def where_word(where: Where) -> str:
    if where.is_saving:
        return "in a save"
    words = {"window": "in an open window", "evaluation": "in an evaluation", "step": "between", "drawing": "between"}
    return words.get(where.stage, f"while {where.stage}")


def trials(count: int, seed: int, most: int = 1) -> Tally:
    """Each trial: a run, killed up to `most` times at random instants, then let go on to its end."""
    tally, rng = Tally(), random.Random(seed)
    for trial in range(count):
        kind = KINDS[trial % len(KINDS)]
        whole, seconds = WHOLE.of(kind)
        with scratch() as run:
            checkpoints = 0
            for _ in range(rng.randint(1, most)):
                where = struck(kind, run, rng, seconds)
                checkpoints += where.checkpoints
                tally.instants[where_word(where)] += 1
                tally.instants[SECOND] += checkpoints >= 2
            told = f"trial {trial}, {kind.name}, {where_word(where)}"
            tally.note("equal bit for bit", broken(kind, run, whole, told))
    return tally


def struck(kind: Kind, run: Path, rng: random.Random, seconds: float) -> Where:
    """Kill a run inside it: one that was faster than the kill is no trial, and is tried again sooner."""
    for turn in range(6):
        with scratch() as copy:
            if (run / "metrics.jsonl").exists():
                shutil.copytree(run, copy, dirs_exist_ok=True)
            where = killed(kind, run, at_random(rng, seconds * 0.7**turn))
            if where.stage != "done":
                break
            shutil.rmtree(run)
            shutil.copytree(copy, run)
    return where


def recovery(count: int, seed: int) -> Tally:
    """Each trial: a run killed at a random instant, killed again while it is taken up, and again, then let go on."""
    tally, rng = Tally(), random.Random(seed)
    for trial in range(count):
        kind = KINDS[trial % len(KINDS)]
        whole, seconds = WHOLE.of(kind)
        with scratch() as run:
            killed(kind, run, at_random(rng, seconds))
            for _ in range(2):
                where = killed(kind, run, while_recovering(rng))
                tally.instants[where.stage] += 1
            tally.note("equal bit for bit", broken(kind, run, whole, f"trial {trial}, {kind.name}"))
    return tally


def while_recovering(rng: random.Random):
    """A few milliseconds from the start on: the folder is locked and swept, the state read, checked and put back."""

    def wait(where: Where) -> None:
        while where.stage == "starting":
            time.sleep(0.0002)
        time.sleep(rng.uniform(0, 0.02))

    return wait


def broken(kind: Kind, run: Path, whole: tuple, told: str) -> str | None:
    try:
        differs = what_differs(whole, outcome(kind, run))
    except Exception as error:
        differs = f"{type(error).__name__}: {error}"
    return differs and f"{told}: {differs}"


def test_a_run_that_is_killed_ends_as_if_it_never_was() -> None:
    tally = trials(times(20), seed=1, most=2)
    assert not tally.broken, str(tally)
    judge_instants(tally)
    assert not tally.broken, tally.told


def test_a_run_that_is_killed_while_it_is_taken_up_does_too() -> None:
    tally = recovery(times(8), seed=2)
    assert not tally.broken, str(tally)
    assert tally.instants["recovering"], tally.instants


# Negative controls: without the safeguard the same trials find it.


@pytest.mark.parametrize("left_out", ["the generators", "the place in the data", "the optimizer's state"])
def test_a_state_that_is_not_whole_is_found(left_out, monkeypatch) -> None:
    from trainer.checkpoint import contents, run_state

    if left_out == "the generators":
        monkeypatch.setattr(contents.rng, "restore", lambda state: None)
    elif left_out == "the place in the data":
        monkeypatch.setattr(run_state.RunState, "position", 0)
    else:
        monkeypatch.setattr(contents, "load_optimizers", lambda *_: None)
    kind = Kind("adamw", {"steps": 20, **OFTEN})
    with scratch() as run:
        whole = outcome(kind, run)
    found: Counter[bool] = Counter()
    for trial in range(3):
        with scratch() as run:
            killed(kind, run, until_saved)
            assert folder.last(run) is not None
            found[broken(kind, run, whole, str(trial)) is not None] += 1
    assert found[True] == 3


def until_saved(where: Where) -> None:
    while where.checkpoints < 2:
        time.sleep(0.0005)


@pytest.mark.parametrize("cuts", [True, False])
def test_a_metrics_file_that_is_not_cut_is_found(cuts, monkeypatch) -> None:
    from trainer.loggers import metrics

    if not cuts:
        monkeypatch.setattr(metrics, "cut", lambda *_: None)
    kind = Kind("adamw", {"steps": 20, **OFTEN, "checkpoint_every": 5})
    with scratch() as run:
        whole = outcome(kind, run)
    with scratch() as run:
        killed(kind, run, until_saved)
        shutil.rmtree(folder.last(run))  # its lines are on the disk, and it is not
        assert (broken(kind, run, whole, "it") is None) is cuts


def test_the_trials_would_see_a_difference() -> None:
    kind = Kind("adamw", {"steps": 6, **OFTEN})
    with scratch() as run:
        whole = outcome(kind, run)
    with scratch() as run:
        other = Kind("adamw", {"steps": 6, **OFTEN, "clip_norm": 0.49})
        assert "model" in (what_differs(whole, outcome(other, run)) or "")
    with scratch() as run:
        assert lives_here(kind, run) == whole[0], "the same twice"
