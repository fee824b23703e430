"""Any call of a save that fails, and any crash inside one: the old state or the new one, never a third."""

import itertools
import random
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from crash import Crash, Disk, Recorder
from tally import Tally, scratch, times

from trainer import CheckpointError
from trainer.checkpoint import disk, folder, store
from trainer.checkpoint.saving import Saving
from trainer.settings import CheckpointSettings


def state(value: int) -> dict:
    """A state of several files, larger than a page, that holds its value in each of them."""
    return {
        "model": {"w": torch.full((300,), float(value)), "b": torch.full((3,), float(value))},
        "optimizers": [{"state": {0: {"exp_avg": torch.full((300,), float(value))}}}],
        "rng": {"torch": torch.full((100,), float(value))},
        "run": {"n": value},
    }


def value_of(loaded: dict) -> int:
    """The value, checked to be the same in all parts."""
    found = {
        *loaded["model"]["w"].tolist(), *loaded["model"]["b"].tolist(), *loaded["rng"]["torch"].tolist(),
        *loaded["optimizers"][0]["state"][0]["exp_avg"].tolist(), loaded["run"]["n"],
    }  # fmt: skip
    assert len(found) == 1, f"a third state: {found}"
    return int(found.pop())


def save(run: Path, value: int) -> None:
    """As a run does it, with the checkpoints removed that need not stay: here all but the newest."""
    settings = CheckpointSettings(background=False, keep_last=1, keep_best=0)
    Saving(run, settings).save(state(value), {"steps": value, "micro_batches": value})


@contextmanager
def recorded(recorder: Recorder):
    real, disk.os = disk.os, recorder
    try:
        yield
    finally:
        disk.os = real
        recorder.end()


@contextmanager
def a_run():
    """A folder with one checkpoint in it."""
    with scratch() as there:
        run = there / "run"
        save(run, 1)
        yield run


def goes_on(run: Path, value: int) -> str | None:
    """What is wrong where a run takes this folder up again: sweeps it, saves, and loads what it saved."""
    folder.sweep(run)
    left = [path.name for path in (run / folder.CHECKPOINTS).iterdir() if path.name.startswith(".")]
    if left:
        return f"left over: {left}"
    save(run, value)
    return None if value_of(store.newest(run)[1]) == value else "what was saved afterwards is not what is loaded"


def judged(run: Path, tally: Tally, wanted: set[int], outcome: str, told: str, whole: bool = False) -> None:
    """Whether the state is one of the wanted; `whole` where nothing that is damaged may be there either."""
    path, loaded, damaged = store.newest(run)
    if whole and damaged:
        tally.note("half a checkpoint under its own name", f"{told}: {damaged[0]}")
        return
    if path is None:
        tally.note("nothing left", f"{told}: no checkpoint is whole")
        return
    value = value_of(loaded)
    wrong = f"{told}: state {value} where {wanted} may be" if value not in wanted else goes_on(run, 9)
    tally.note(f"{outcome}: {'old' if value == 1 else 'new'}", wrong and f"{told}: {wrong}")


def failing_calls(count: int, seed: int) -> Tally:
    """Call N of a save fails, for every N and in every way, again and again up to `count` trials."""
    tally, rng = Tally(), random.Random(seed)
    with a_run() as run:
        recorder = Recorder()
        with recorded(recorder):
            save(run, 2)
    ways = itertools.cycle(itertools.product(range(recorder.calls), ("exit", "ENOSPC", "EIO")))
    for number, how in itertools.islice(ways, count):
        with a_run() as run:
            recorder = Recorder(number, how, lasting=rng.random() < 0.5)
            ended = "returned"
            with recorded(recorder):
                try:
                    save(run, 2)
                except Crash:
                    ended = "gone"
                except CheckpointError:
                    ended = "refused"
            told = f"call {number}, {how}"
            judged(run, tally, {2} if ended == "returned" else {1, 2}, f"{how} {ended}", told, whole=True)
    return tally


def crashes(count: int, seed: int, without: str | None = None) -> Tally:
    """The machine stops at any call of a save or after it, and what was not synced is damaged or lost."""
    tally, rng = Tally(), random.Random(seed)
    with a_run() as run, scratch() as there:
        before = there / "before"
        shutil.copytree(run, before)
        recorder = Recorder(without=without)
        with recorded(recorder):
            save(run, 2)
        log = [tuple(_moved(part, run, before) for part in entry) for entry in recorder.log]
        for trial in range(count):
            # A third of the crashes come after the save has returned: then the new state must be there.
            at = len(log) if trial % 3 == 0 else rng.randrange(len(log))
            crashed = Disk(before)
            for entry in log[:at]:
                crashed.play(entry)
            after = there / "after"
            crashed.crash(after, rng)
            told = f"crash after {at} of {len(log)}"
            judged(after, tally, {2} if at == len(log) else {1, 2}, "crash", told)
            shutil.rmtree(after)
    return tally


def _moved(part, run: Path, to: Path):
    return to / part.relative_to(run) if isinstance(part, Path) else part


def trials(count: int, seed: int) -> Tally:
    """Two thirds failing calls, one third crashes."""
    tally = failing_calls(count * 2 // 3, seed)
    other = crashes(count - tally.trials, seed)
    return Tally(tally.outcomes + other.outcomes, tally.broken + other.broken)


def test_a_save_in_which_any_call_fails_or_the_machine_stops_leaves_the_old_state_or_the_new() -> None:
    tally = trials(times(180), seed=1)
    assert not tally.broken, str(tally)
    seen = {"exit gone: old", "exit gone: new", "ENOSPC refused: old", "EIO refused: old", "crash: old", "crash: new"}
    assert seen <= set(tally.outcomes), str(tally)


@pytest.mark.parametrize("fsync", ["file", "pending", "parent"])
def test_each_fsync_is_needed(fsync) -> None:
    assert crashes(times(40), seed=2, without=fsync).broken


@pytest.mark.parametrize("without", [None, "parent"])
def test_the_first_checkpoint_of_a_run_is_there_once_its_save_has_returned(without) -> None:
    """The folder of the checkpoints is new as well, and its own name must be on the disk."""
    lost = 0
    with scratch() as there:
        run, before = there / "run", there / "before"
        run.mkdir()
        before.mkdir()
        recorder = Recorder(without=without)
        with recorded(recorder):
            save(run, 1)
        for seed in range(30):
            crashed = Disk(before)
            for entry in recorder.log:
                crashed.play(tuple(_moved(part, run, before) for part in entry))
            crashed.crash(there / "after", random.Random(seed))
            lost += store.newest(there / "after")[0] is None
            shutil.rmtree(there / "after")
    assert bool(lost) is (without == "parent")
