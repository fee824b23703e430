"""Processes that load data: killed, hung, out of memory, gone, raising. A clear error, no orphan, and the run goes on
bit for bit."""

import faulthandler
import functools
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from runs import Items, bits, rows, trainer_of
from tally import Tally, scratch, times
from test_run_state import differing, whole_state
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from trainer import DataError
from trainer.checkpoint.folder import last
from trainer.data import workers
from trainer.errors import TrainerWarning

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="signals of POSIX, limits and /proc of Linux")
resource = pytest.importorskip("resource", reason="Windows has no limits on a process")
STEPS = {"steps": 6, "evaluate_every": None, "metrics_file": True}


class Breaks(Items):
    """Items of which one does something bad once, when it is asked for the n-th time: a file counts."""

    def __init__(self, count: int, how: str, mark: Path, row: int = 17, visit: int = 1) -> None:
        super().__init__(count)
        self.how, self.mark, self.row, self.visit = how, mark, row, visit

    def collate_fn(self, items):
        if self.how != "nothing to share":
            return default_collate(items)
        return tuple(torch.stack(column) for column in zip(*items, strict=True))  # not yet in shared memory

    def __getitem__(self, row: int):
        if row == self.row and self._visited() == self.visit:
            if self.how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            elif self.how == "crashed":
                faulthandler.disable()  # pytest's would fill the page with this worker's stack
                os.abort()
            elif self.how == "gone":
                os._exit(3)
            elif self.how == "hung":
                time.sleep(60)
            elif self.how == "raising":
                raise LookupError("my own")
            elif self.how == "python's memory":
                limit(resource.RLIMIT_AS, own_size() + (1 << 28))
                bytearray(1 << 32)
            elif self.how == "torch's memory":
                limit(resource.RLIMIT_AS, own_size() + (1 << 28))
                torch.empty(1 << 32)
            elif self.how in ("no shared memory", "nothing to share"):
                limit(resource.RLIMIT_FSIZE, 8)
            elif self.how == "unsendable":
                return super().__getitem__(row)[0], (lambda: 0)
        return super().__getitem__(row)

    def _visited(self) -> int:
        with self.mark.open("ab") as file:
            file.write(b".")
        return self.mark.stat().st_size


def own_size() -> int:
    """Bytes of this process's address space."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def limit(what: int, value: int) -> None:
    resource.setrlimit(what, (value, resource.getrlimit(what)[1]))


class Stream(IterableDataset):
    def __init__(self, items: Items) -> None:
        self.items = items

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        return iter(self.items[row] for row in range(info.id, len(self.items), info.num_workers))


def children() -> set[int]:
    return {child.pid for child in multiprocessing.active_children()}


def of(kind: str, items: Items):
    if kind == "user's loader":
        return DataLoader(items, batch_size=3, num_workers=2)
    return Stream(items) if kind == "stream" else items


DEATHS = [
    *(("killed", kind) for kind in ("dataset", "stream", "user's loader")),
    ("gone", "stream"),
    ("crashed", "dataset"),
]


@pytest.mark.parametrize(("how", "kind"), DEATHS)
def test_a_death_is_a_clear_error_within_ten_seconds_and_leaves_no_orphan(how, kind, tmp_path) -> None:
    before = children()
    trainer = trainer_of(
        "items", data=of(kind, Breaks(23, how, tmp_path / "mark")), workers=2, folder=tmp_path / "run", **STEPS
    )
    began = time.monotonic()
    with pytest.raises(DataError, match=r"a process that loads data died \(.*\): it was killed, often") as caught:
        trainer.fit()
    assert time.monotonic() - began < 12
    assert caught.value.exit_code == 3
    assert children() == before
    assert not trainer.step.is_open and not trainer.step.is_torn


@pytest.mark.parametrize("how", ["killed", "raising", "hung"])
def test_what_was_done_before_is_saved_and_goes_on_bit_for_bit(how, tmp_path) -> None:
    whole = trainer_of("items", workers=2, folder=tmp_path / "whole", **STEPS)
    whole.fit()
    data = Breaks(23, how, tmp_path / "mark")
    wanted = {"killed": DataError, "raising": LookupError, "hung": DataError}[how]
    with pytest.raises(wanted):
        trainer_of("items", data=data, workers=2, folder=tmp_path / "b", timeout=2.0, **STEPS).fit()
    again = trainer_of("items", data=data, workers=2, folder=tmp_path / "b", start=9, poison=1e4, timeout=3.0, **STEPS)
    assert again.fit(resume="auto").clocks["steps"] == 6
    left, right = whole_state(whole), whole_state(again)
    assert differing(left, right) == []


def test_silence_is_a_warning_first_and_an_error_at_the_timeout(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(workers, "SILENCE", 1.5)
    before = children()
    trainer = trainer_of("items", data=Breaks(23, "hung", tmp_path / "mark"), workers=2, timeout=4.0, **STEPS)
    began = time.monotonic()
    with (
        pytest.warns(TrainerWarning, match=r"no worker has given a micro-batch for 2 seconds; after 4 it is given up"),
        pytest.raises(DataError, match=r"for [45] seconds \(data.timeout=4\): one hangs in the dataset's code"),
    ):
        trainer.fit()
    assert 4 <= time.monotonic() - began < 15
    assert children() == before
    assert workers.PATIENCE <= 1.0


def test_a_users_own_exception_in_a_worker_keeps_its_type_and_its_traceback(tmp_path) -> None:
    before = children()
    trainer = trainer_of("items", data=Breaks(23, "raising", tmp_path / "mark"), workers=2, **STEPS)
    with pytest.raises(LookupError, match=r"(?s)my own") as caught:
        trainer.fit()
    assert "in DataLoader worker process" in str(caught.value)
    assert children() == before


def test_workers_end_with_a_run_that_ends_inside_an_epoch() -> None:
    before = children()
    trainer_of("items", workers=2, **{**STEPS, "steps": 1, "metrics_file": False}).fit()
    assert children() == before


class Slow(Dataset):
    """Items that come at once, but one worker dies while the step is at work."""

    def __init__(self) -> None:
        self.tensors = rows(24)

    def __len__(self) -> int:
        return 24

    def __getitem__(self, row: int):
        return self.tensors[0][row], self.tensors[1][row]


def test_a_death_while_a_step_is_taken_does_not_tear_it() -> None:
    trainer = trainer_of(
        "items", data=Slow(), shuffle=False, workers=2, accumulation_steps=1, **STEPS | {"metrics_file": False}
    )
    parameters = []

    def update(factor, apply=trainer.step._updates[0].apply) -> None:
        if trainer.step.clocks.steps == 1:
            for child in multiprocessing.active_children():
                os.kill(child.pid, signal.SIGKILL)
            time.sleep(0.3)  # the signal of the child's end comes here
        apply(factor)
        parameters.append(bits(list(trainer.model.parameters())))

    trainer.step._updates[0].apply = update
    with pytest.raises(DataError, match="a process that loads data died"):
        trainer.fit()
    assert not trainer.step.is_torn
    assert bits(list(trainer.model.parameters())) == parameters[-1]


GROUP = """
import os, sys
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
from runs import MSE, trainer_of

def objective(model, batch):
    seen.append(1)
    if len(seen) == 4:
        print("ready", flush=True)
    if len(seen) > 3:
        import time; time.sleep(0.5)
    return MSE(model, batch)
seen = []
trainer_of("items", objective=objective, workers=2, folder=sys.argv[2], steps=50).fit()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_whole_group_stops_the_run_and_not_its_workers(number, tmp_path) -> None:
    tests = Path(__file__).parents[1]
    words = [sys.executable, "-c", GROUP, str(tests), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(tests.parent)}

    def alone() -> None:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, preexec_fn=alone
    ) as running:
        assert running.stdout.readline() == "ready\n"
        os.killpg(running.pid, number)
        _, said = running.communicate(timeout=30)
    assert running.returncode == 75, said
    assert said == "", "nothing of a worker"
    with pytest.raises(ProcessLookupError):
        os.killpg(running.pid, 0)  # nobody is left of the group


# The row of the programme.

SAID = {
    "killed": (DataError, r"a process that loads data died \(.*\): it was killed, often"),
    "gone": (DataError, r"a process that loads data died \("),
    "crashed": (DataError, r"a process that loads data died \("),
    "hung": (DataError, r"for \d seconds \(data.timeout=2\): one hangs"),
    "raising": (LookupError, r"(?s)in DataLoader worker process .*my own"),
    "python's memory": (DataError, r"ran out of memory \(MemoryError, .*test_loaders.py:\d+ in __getitem__\): each"),
    "torch's memory": (DataError, r"ran out of memory \(RuntimeError: .*you tried to allocate 17179869184 bytes"),
    # Where a batch is made in shared memory, as torch's own collating does, and where only sending puts it there.
    "no shared memory": (DataError, r"found no shared memory for a micro-batch \(.*\): make it larger"),
    "nothing to share": (DataError, r"found no shared memory for a micro-batch \(.*\): make it larger"),
}
# An iterable's rows go to a default collate of torch's, and a loader of the user's is watched for deaths alone.
ROWS = 12  # two windows in each of two epochs
OF_DATASETS = {"nothing to share"}
OF_OURS = {"hung"}


def trials(count: int, seed: int) -> Tally:
    """By turns every way to fail, of a random row at its first or second time, by one to three workers; then go on."""
    tally, chance = Tally(), random.Random(seed)
    for trial in range(count):
        how = list(SAID)[trial % len(SAID)]
        kinds = ["dataset", *(["stream"] if how not in OF_DATASETS else [])]
        kinds += ["user's loader"] if how not in OF_DATASETS | OF_OURS else []
        kind, row, visit = chance.choice(kinds), chance.randrange(ROWS), chance.choice((1, 2))
        workers = chance.choice((1, 2, 3)) if kind == "dataset" else 2
        with scratch() as there:
            told = fails_once(there, how, kind, row, visit, workers)
        tally.note(how, told and f"{how}, {kind}, row {row}, visit {visit}, {workers} workers: {told}")
    return tally


def fails_once(there: Path, how: str, kind: str, row: int, visit: int, workers: int) -> str | None:
    """A run that fails so, and the same again: what was not as promised."""
    before = children()
    settings = {**STEPS, "steps": 4, "folder": there / "run", "timeout": 2.0}
    items = Breaks(ROWS, how, there / "mark", row, visit)
    trainer = trainer_of("items", data=of(kind, items), workers=workers, **settings)
    error, words = SAID[how]
    began = time.monotonic()
    try:
        trainer.fit()
        return "nothing was told"
    except error as told:
        if not re.search(words, str(told)):
            return f"said {told}"
    took = time.monotonic() - began
    if took > 10:
        return f"{took:.0f} s until it was told"
    if children() != before:
        return "an orphan"
    if trainer.step.is_open or trainer.step.is_torn:
        return "the window is still open"
    spoiled = {"start": 9, "poison": 1e4} if last(there / "run") else {}
    again = trainer_of("items", data=of(kind, items), workers=workers, **spoiled, **settings)
    again.fit(resume="auto")
    apart = differing(never_failed(kind), whole_state(again))
    return f"went on to another state: {apart[:3]}" if apart else None


@functools.cache
def never_failed(kind: str):
    with scratch() as there:
        data = of(kind, Breaks(ROWS, "nothing", there / "mark"))
        run = trainer_of("items", data=data, workers=2, folder=there / "run", **STEPS | {"steps": 4})
        run.fit()
        return whole_state(run)


def test_a_failing_worker_is_told_and_the_run_goes_on_bit_for_bit() -> None:
    tally = trials(times(12), seed=1)
    assert not tally.broken, tally
    assert len(tally.outcomes) == len(SAID)


def as_they_are(self, items):
    return default_collate(items) if all(torch.is_tensor(item[1]) for item in items) else items


def test_what_cannot_be_sent_is_told_at_once(tmp_path, monkeypatch) -> None:
    data = Breaks(23, "unsendable", tmp_path / "mark", row=3)
    monkeypatch.setattr(Breaks, "collate_fn", as_they_are)
    trainer = trainer_of("items", data=data, workers=2, **STEPS | {"metrics_file": False})
    with pytest.raises(DataError, match=r"could not be sent by the process that loads data \(.*[Pp]ickle.*\): make"):
        trainer.fit()


# The negative controls.


def test_without_the_report_a_lack_of_shared_memory_is_silence(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(workers, "report_what_cannot_be_sent", lambda: None)
    told = fails_once(tmp_path, "nothing to share", "dataset", row=7, visit=1, workers=1)
    assert told is not None and "one hangs" in told


def test_without_the_safeguard_a_death_comes_up_wherever_the_program_is(monkeypatch) -> None:
    monkeypatch.setattr(workers, "unhurried", lambda: None)
    former = signal.getsignal(signal.SIGCHLD)
    from torch.utils.data._utils import signal_handling

    monkeypatch.setattr(signal_handling, "_SIGCHLD_handler_set", False)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        with pytest.raises((AssertionError, RuntimeError)):
            test_a_death_while_a_step_is_taken_does_not_tear_it()
    finally:
        signal.signal(signal.SIGCHLD, former)
