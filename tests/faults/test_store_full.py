"""A disk that is full: the bytes are told, the old checkpoint is intact, and training goes on if it was asked to."""

import contextlib
import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from tally import Tally, scratch, times
from test_store_operations import state, value_of

from trainer import CheckpointError
from trainer.checkpoint import folder, store
from trainer.checkpoint.saving import Saving
from trainer.errors import TrainerWarning
from trainer.settings import CheckpointSettings

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit on a file's size")
SIZE = 400_000


def large(value: int) -> dict:
    return {**state(value), "model": {**state(value)["model"], "more": torch.full((SIZE // 4,), float(value))}}


def fills(run: Path, background: bool, on_error: str, room: "contextlib.AbstractContextManager[None]") -> dict:
    """The child: three saves, of which the second has no room."""
    saving = Saving(run, CheckpointSettings(background=background, on_error=on_error, keep_last=2))
    said = []
    for value in (1, 2, 3):
        with room if value == 2 else contextlib.nullcontext(), warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            try:
                saving.save((large if value == 2 else state)(value), {"steps": value, "micro_batches": value})
                if saving._writer._thread is not None:
                    saving._writer._thread.join()
                saving.look()
            except CheckpointError as error:
                said.append(str(error))
                break
            finally:
                said += [str(one.message) for one in warned if one.category is TrainerWarning]
    return {"said": said, "last": value}


@contextlib.contextmanager
def small_files():
    """Files of this process end at 100,000 bytes: a short write, then EFBIG (SIGXFSZ is ignored by Python)."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def small_disk(folder: Path):
    """A file system of 256 KiB on the folder: ENOSPC. Where nobody may mount one, CannotMountError."""
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise CannotMountError
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


class CannotMountError(Exception):
    """Only root may, and not in every container."""


def trials(count: int, seed: int) -> Tally:
    """By turns: both kinds of full disk, in the background and not, stopping and going on."""
    tally = Tally()
    for trial in range(count):
        background, on_error, kind = trial % 2 == 0, ("stop", "warn")[trial // 2 % 2], trial // 4 % 2
        with scratch() as there, contextlib.ExitStack() as stack:
            name = "file too large"
            if kind == 1:
                try:
                    stack.enter_context(small_disk(there))
                    name = "no space"
                except (CannotMountError, FileNotFoundError):
                    kind = 0
            run = there / "run"
            room = small_files() if kind == 0 else contextlib.nullcontext()
            result = in_a_child(lambda: fills(run, background, on_error, room))  # noqa: B023
            tally.note(f"{name}, {on_error}", judged(run, result, on_error))
    return tally


def in_a_child(act) -> dict:
    """What a forked process answers: limits on a process should not touch the tests."""
    read, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        try:
            os.write(write, json.dumps(act()).encode())
        except BaseException as error:
            os.write(write, json.dumps({"error": repr(error)}).encode())
        finally:
            os._exit(0)
    os.close(write)
    answer = b""
    while more := os.read(read, 1 << 16):
        answer += more
    os.close(read)
    os.waitpid(child, 0)
    return json.loads(answer)


def judged(run: Path, result: dict, on_error: str) -> str | None:
    if "error" in result or len(result["said"]) != 1:
        return f"said {result}"
    sentence = result["said"][0]
    needs = re.search(r"step-000002 could not be written \(.*\): it needs (\d+) bytes, (\d+) are free there", sentence)
    if needs is None or not SIZE < int(needs[1]) < SIZE * 2:
        return f"said {sentence}"
    path, loaded, damaged = store.newest(run)
    wanted = 3 if on_error == "warn" else 1
    if path is None or value_of(loaded) != wanted or damaged:
        return f"{path} is there, {damaged}"
    left = [one.name for one in (run / folder.CHECKPOINTS).iterdir() if not one.name.startswith("step-")]
    return f"left over: {left}" if left else None


def test_a_full_disk_is_told_in_bytes_and_spoils_nothing() -> None:
    tally = trials(times(6), seed=1)
    assert not tally.broken, str(tally)
    assert tally.outcomes["file too large, stop"] and tally.outcomes["file too large, warn"], str(tally)
