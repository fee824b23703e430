"""Thousands of steps through faults of every kind, taken up each time: the end is that of the run never disturbed.

Faults: SIGKILL (anywhere, inside a save, while the run is taken up), SIGTERM, SIGUSR1, the newest checkpoint damaged, a
full disk, a killed process that loads data, and micro-batches that are not finite. Memory, threads and file descriptors
are counted inside the processes, every few steps.
"""

import json
import os
import random
import resource
import signal
import struct
import sys
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from mmap import mmap
from pathlib import Path
from typing import Any

import pytest
import torch
from killing import ends, forked
from runs import MSE, QUIET, Items, error, lines, net, rows
from tally import Tally, scratch
from test_run_state import whole_state
from torch import nn

from trainer import Trainer, TrainerError, rng
from trainer.checkpoint import folder
from trainer.errors import Stopped
from trainer.optim import adamw, cosine

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and limits another process")

FAULTS = ["kill", "kill in a save", "kill while it is taken up", "term", "save", "damage", "full disk", "worker"]
EVERY = 10
"""Steps from one look at the process to the next."""


@dataclass
class Sample:
    step: int
    kib: int
    files: int
    threads: int
    native: int


class Noisy(Items):
    """Items whose noise follows from the seed, the epoch and the row: no number of workers changes it."""

    def __init__(self, count: int, seed: int = 0) -> None:
        super().__init__(count)
        self._seed = seed

    def for_epoch(self, seed: int, epoch: int) -> "Noisy":
        return Noisy(len(self), 1000 * seed + epoch)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        noise = random.Random(f"{self._seed}, {row}").gauss(0, 0.1)
        return self.tensors[0][row] + noise, self.tensors[1][row]


class Seen:
    """In memory that a child shares with its parent: its last step, whether it saves, and what it uses."""

    _ROW = struct.Struct("5I")

    def __init__(self, steps: int) -> None:
        self._shared = mmap(-1, 16 + self._ROW.size * (steps // EVERY + 2))

    step = property(lambda self: struct.unpack_from("I", self._shared, 0)[0])
    is_saving = property(lambda self: bool(self._shared[8]))

    def look(self, step: int, is_saving: bool) -> None:
        is_new = step != self.step  # a skip looks at the same step again
        struct.pack_into("I", self._shared, 0, step)
        self._shared[8] = is_saving
        if is_new and step % EVERY == 0:
            (count,) = struct.unpack_from("I", self._shared, 4)
            self._ROW.pack_into(self._shared, 16 + count * self._ROW.size, step, *used())
            struct.pack_into("I", self._shared, 4, count + 1)

    def samples(self) -> list[Sample]:
        (count,) = struct.unpack_from("I", self._shared, 4)
        return [Sample(*self._ROW.unpack_from(self._shared, 16 + at * self._ROW.size)) for at in range(count)]


def used() -> tuple[int, int, int, int]:
    """Resident memory in KiB, open file descriptors, Python's threads, the system's threads of this process."""
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() // 1024
    native = len(os.listdir("/proc/self/task"))
    return resident, len(os.listdir("/proc/self/fd")), threading.active_count(), native


def grown(samples: list[Sample]) -> dict[str, int]:
    """By how much the least of the last third exceeds the least of the second: what comes and goes does not count."""
    third = len(samples) // 3
    middle, last = samples[third : 2 * third], samples[2 * third :]
    names = ("kib", "files", "threads", "native")
    return {name: min(getattr(s, name) for s in last) - min(getattr(s, name) for s in middle) for name in names}


def made(run: Path, steps: int, workers: int, tick: Callable[[Trainer], None]) -> Trainer:
    """Items with noise of their own, dropout, BatchNorm, a schedule, a clip; in every 13th window NaN may be a loss."""
    resumed = folder.last(run) is not None
    torch.manual_seed(77 if resumed else 0)
    model = net()
    model.register_buffer("table", torch.zeros(60_000) if resumed else torch.randn(60_000))

    def objective(model: nn.Module, batch: Any) -> Any:
        loss = MSE(model, batch)
        is_poisoned = model.training and trainer.step.clocks.windows % 13 == 5 and float(batch[0][0, 0]) > 0
        return loss * float("nan") if is_poisoned else loss

    objective.weight = MSE.weight  # type: ignore[attr-defined]
    trainer = Trainer(
        model, objective, adamw(model.parameters(), lr=100.0 if resumed else 0.01), data=Noisy(1200),
        evaluation_data=rows(5, seed=2), metrics=error, schedule=cosine(2 * steps, warmup=5), clip_norm=0.5,
        workers=workers, batch_size=8, accumulation_steps=2, folder=run, seed=55 if resumed else 3, steps=steps,
        log_every=EVERY, evaluate_every=40, evaluate_clock="steps", checkpoint_every=25, checkpoint_clock="steps",
        **{**QUIET, "metrics_file": True},
    )  # fmt: skip
    if resumed:
        rng.seed_all(1234)
    trainer._loggers.ticks.append(lambda: tick(trainer))
    return trainer


def life(run: Path, steps: int, seen: Seen, workers: int, more: Callable[[], None] = lambda: None) -> None:
    """What a child does: take the folder up, or begin, and leave its last state beside it when it comes to its end."""
    os.setpgid(0, 0)
    warnings.simplefilter("ignore")
    said = os.open(run.with_suffix(".said"), os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(said, 2)  # what a worker that is killed says
    sys.stderr = os.fdopen(said, "w")

    def tick(trainer: Trainer) -> None:
        thread = trainer.state._saving._writer._thread
        seen.look(trainer.step.clocks.steps, thread is not None and thread.is_alive())
        more()

    trainer = made(run, steps, workers, tick)
    try:
        trainer.fit(resume="auto", accept=["data.workers"])
    except Stopped:
        os._exit(Stopped.exit_code)
    except TrainerError as error:
        os._exit(error.exit_code)
    state = {name: sha256(repr(value).encode()).hexdigest() for name, value in whole_state(trainer).items()}
    run.with_suffix(".json").write_text(json.dumps(state))


def end_of(run: Path) -> dict[str, str]:
    """The hash of each part of the last state, and of what was logged."""
    state: dict[str, str] = json.loads(run.with_suffix(".json").read_text())
    return state | {"metrics.jsonl": sha256(repr(lines(run)).encode()).hexdigest()}


def struck(
    run: Path, steps: int, fault: str, rng: random.Random, apart: int, children: list[int]
) -> tuple[str, str | None, list[Sample]]:
    """One life and its fault: what came of it, what was wrong, and what it used until then."""
    seen = Seen(steps)
    workers = 2 if fault == "worker" else rng.choice([0, 0, 0, 1])
    child = forked(lambda: life(run, steps, seen, workers))
    children.append(child)
    since = last_step(run)
    target = since + rng.randint(1, apart)
    until = time.monotonic() + 120
    early = fault == "kill while it is taken up"

    def waits() -> bool:
        return not early and seen.step < target and time.monotonic() < until and os.waitid(*_still(child)) is None

    if early:
        time.sleep(rng.uniform(0, 0.05))
    while waits():
        time.sleep(0.001)
    if os.waitid(*_still(child)) is not None:
        code = ends(child)
        return "done", None if code == 0 else f"a run that nothing struck ended with {code}", seen.samples()
    wanted = [-signal.SIGKILL]
    if fault == "kill in a save":
        patience = time.monotonic() + 1.0
        while not seen.is_saving and time.monotonic() < patience:
            time.sleep(0.0002)
    if fault == "term":
        os.kill(child, signal.SIGTERM)
        wanted = [Stopped.exit_code]
    elif fault == "save":
        os.kill(child, signal.SIGUSR1)
        time.sleep(rng.uniform(0, 0.1))
        os.kill(child, signal.SIGKILL)
    elif fault == "full disk":
        # Beyond the log, or inside it: once a checkpoint is refused, once a line.
        size = (run / "metrics.jsonl").stat().st_size + (100_000 if rng.random() < 0.7 else 0)
        resource.prlimit(child, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        wanted = [1, 5]
    elif fault == "worker":
        of_child = Path(f"/proc/{child}/task/{child}/children").read_text().split()
        if of_child:
            os.kill(int(rng.choice(of_child)), signal.SIGKILL)
            wanted = [3]
        else:
            os.kill(child, signal.SIGKILL)
    else:
        os.kill(child, signal.SIGKILL)
    code = ends_soon(child)
    if fault == "damage":
        damage(run, rng)
    wrong = None if code in (*wanted, 0) else f"{fault} at step {seen.step}: it ended with {code}"
    return fault, wrong, seen.samples()


def _still(child: int) -> tuple[int, int, int]:
    return os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT


def ends_soon(child: int) -> int:
    until = time.monotonic() + 60
    while os.waitid(*_still(child)) is None:
        if time.monotonic() > until:
            os.killpg(child, signal.SIGKILL)
        time.sleep(0.001)
    return ends(child)


def alone(groups: list[int]) -> str | None:
    """Processes that outlive their run: those that load data have some seconds to see that it is gone."""
    until = time.monotonic() + 15
    while left := [stat for stat in Path("/proc").glob("[0-9]*/stat") if _is_of(stat, groups)]:
        if time.monotonic() > until:
            return f"{len(left)} processes outlived their run"
        time.sleep(0.05)
    return None


def _is_of(stat: Path, groups: list[int]) -> bool:
    try:
        state, _, of = stat.read_text().rpartition(")")[2].split()[:3]
    except (OSError, ValueError):
        return False
    return int(of) in groups and state != "Z"


def last_step(run: Path) -> int:
    path = folder.last(run)
    return 0 if path is None else int(path.name.split("-")[1])


def damage(run: Path, rng: random.Random) -> None:
    """A bit of the newest checkpoint, any file's, or its end."""
    path = folder.last(run)
    if path is None or len(folder.listed(run)) < 2:
        return
    file = rng.choice(sorted(path.iterdir()))
    content = bytearray(file.read_bytes())
    at = rng.randrange(len(content))
    content[at] ^= 1 << rng.randrange(8)
    file.write_bytes(content if rng.random() < 0.7 else content[:at])


def trials(steps: int, seed: int, apart: int = 200) -> Tally:
    """The run undisturbed, then through faults until it is done; each fault is a trial, and so are the two ends."""
    tally, rng = Tally(), random.Random(seed)
    with scratch() as there:
        seen = Seen(steps)
        code = ends(forked(lambda: life(there / "whole", steps, seen, 2 if steps > 1000 else 0)))
        tally.note("undisturbed, memory, threads and files flat", flat(seen.samples()) if code == 0 else f"exit {code}")
        used = seen.samples()
        order = rng.sample(FAULTS, len(FAULTS))
        count, children = 0, []
        while not (there / "run.json").exists():
            assert count < steps, "it does not come to its end"
            fault = order[count] if count < len(order) else rng.choice(FAULTS)
            fault, wrong, samples = struck(there / "run", steps, fault, rng, apart, children)
            count += 1
            few = len(samples) > 15 and {name: by for name, by in grown(samples).items() if by > 0 and name != "kib"}
            tally.note(fault, wrong or (f"more {few} after {fault}" if few else None))
        tally.note("no process is left", alone(children))
        whole, found = end_of(there / "whole"), end_of(there / "run")
        differs = [name for name in whole if whole[name] != found[name]]
        tally.note("the end equal bit for bit", f"it differs in {', '.join(differs)}" if differs else None)
        if used:
            first, last = used[len(used) // 3], used[-1]
            tally.told.append(
                f"{steps} steps through {count} lives: undisturbed, from step {first.step} to {last.step}, resident "
                f"memory went from {first.kib / 1024:.1f} to {last.kib / 1024:.1f} MiB, with {last.files} descriptors "
                f"and {last.threads} threads."
            )
    return tally


def flat(samples: list[Sample]) -> str | None:
    """What grew. Memory may by half a MiB and 85 bytes for each step of the run: allocators are never wholly still."""
    allowed = {"kib": 512 + (samples[-1].step - samples[0].step) // 12, "files": 0, "threads": 0, "native": 0}
    wrong = [f"{name} grew by {by}" for name, by in grown(samples).items() if by > allowed[name]]
    return ", ".join(wrong) or None


def test_a_run_through_every_fault_ends_as_if_there_were_none() -> None:
    tally = trials(300, seed=1, apart=40)
    assert not tally.broken, str(tally)
    assert set(FAULTS) <= set(tally.outcomes), str(tally)


def test_what_leaks_is_found() -> None:
    kept: list[Any] = []

    def leaks() -> None:
        kept.append((os.urandom(40_000), os.dup(0)))
        kept.append(threading.Thread(target=threading.Event().wait, daemon=True))
        kept[-1].start()

    with scratch() as there:
        seen = Seen(120)
        assert ends(forked(lambda: life(there / "run", 120, seen, 0, leaks))) == 0
    found = flat(seen.samples())
    assert found is not None
    assert [word in found for word in ("kib", "files", "threads", "native")] == [True] * 4, found
