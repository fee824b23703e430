"""SIGKILL at any instant of a save, for real: what was saved before is there, or what was being saved."""

import os
import random
import signal
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from tally import Tally, scratch, times
from test_store_operations import goes_on, state, value_of

from trainer.checkpoint import disk, folder, manifest, store
from trainer.checkpoint.manifest import Entry, Manifest
from trainer.checkpoint.saving import Saving
from trainer.settings import CheckpointSettings

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no fork and no SIGKILL")


def saves_on(run: Path, report: int, background: bool) -> None:
    """The child: saves one state after the other, and says each value that is surely on the disk."""
    saving = Saving(run, CheckpointSettings(background=background, keep_last=2))
    saving.begin()
    for value in range(1, 10_000):
        saving.save(state(value), {"steps": value, "micro_batches": value})
        if background and value % 3:
            continue  # one is being written while the next is taken
        saving.wait()
        os.write(report, value.to_bytes(4, "little"))


def trials(count: int, seed: int) -> Tally:
    """Fork from this process, kill after a random time, take the folder up; every third folder is killed again."""
    tally, rng = Tally(), random.Random(seed)
    torch.set_num_threads(1)
    for trial in range(count):
        with scratch() as run:
            for _ in range(1 + trial % 3 // 2):
                surely = killed(run, rng, background=trial % 2 == 0)
                left = list((run / folder.CHECKPOINTS).glob(".*")) if (run / folder.CHECKPOINTS).is_dir() else []
                tally.note("inside a save" if left else "between saves", judged(run, surely, f"trial {trial}"))
    return tally


def judged(run: Path, surely: int, told: str) -> str | None:
    path, loaded, damaged = store.newest(run)
    value = value_of(loaded) if path is not None else 0
    if damaged or value < surely:
        return f"{told}: {value} loaded where {surely} was on the disk; {damaged}"
    wrong = goes_on(run, value + 1)
    return wrong and f"{told}: {wrong}"


def killed(run: Path, rng: random.Random, background: bool) -> int:
    """Returns the last value that the child said is on the disk."""
    read, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # fork beside threads: the child takes no lock of theirs
        child = os.fork()
    if child == 0:
        try:
            os.close(read)
            saves_on(run, write, background)
        finally:
            os._exit(1)
    os.close(write)
    first = os.read(read, 4)  # it is under way
    time.sleep(rng.uniform(0, 0.03))
    if rng.random() < 0.5:  # half of the kills wait for a save to be under way
        patience = time.monotonic() + 0.2
        while not any((run / folder.CHECKPOINTS).glob(".*")) and time.monotonic() < patience:
            time.sleep(0.0002)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "the child ended by itself"
    said = first
    while more := os.read(read, 1 << 16):
        said += more
    os.close(read)
    return int.from_bytes(said[len(said) // 4 * 4 - 4 :][:4], "little")


def test_a_save_that_is_killed_leaves_the_last_state_or_the_one_being_saved() -> None:
    tally = trials(times(20), seed=1)
    assert not tally.broken, str(tally)
    assert tally.outcomes["inside a save"] >= tally.trials // 4, str(tally)


def test_without_writing_beside_half_a_checkpoint_is_found_under_its_own_name(monkeypatch) -> None:
    def in_place(path, taken, label):
        disk.make_folder(path)
        files = {name: Entry(*disk.write(path / name, made())) for name, made in taken.files().items()}
        written = Manifest(label.number, label.clocks, label.best, files)
        disk.write(path / manifest.NAME, [written.encoded()])
        return written

    monkeypatch.setattr(store, "write", in_place)
    assert trials(times(20), seed=1).broken
