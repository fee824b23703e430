"""SIGKILL of one rank or of all at a random instant: the others end and name the rank that is gone, nobody is left
behind, and taken up on as many ranks the run ends as if none had ever been killed, bit for bit, on each rank.

In some trials a stop comes first, so that what is taken up is a window left open on every rank.
"""

import os
import pickle
import random
import signal
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from killing import Kind, Where
from ranks import _loopback
from runs import lines
from tally import Tally, scratch, times
from test_run_state import whole_state

from trainer import Trainer
from trainer.checkpoint import folder, of_ranks, store
from trainer.errors import LostRankError, Stopped

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no fork and no SIGKILL")

WORLD = 2
PATIENCE = 60.0
OFTEN = {
    "distributed": "ddp",
    "checkpoint_every": 2,
    "checkpoint_clock": "steps",
    "evaluate_every": 3,
    "evaluate_clock": "steps",
    "evaluation_batch_size": 1,
    "audit": False,
}
KINDS = [
    Kind("adamw", {"steps": 24, **OFTEN}),
    Kind("items", {"steps": 20, **OFTEN, "checkpoint_background": False}),
    Kind("never", {"steps": 24, **OFTEN, "checkpoint_every": 5}),
]
Changed = Callable[[Trainer, int], None]


@dataclass
class Run:
    """The ranks of one run, each a fork of this warm process; what each of them came to lies in `outcome`."""

    kind: Kind
    run: Path
    changed: Changed | None = None
    where: list[Where] = field(default_factory=lambda: [Where() for _ in range(WORLD)])
    codes: list[int | None] = field(default_factory=lambda: [None] * WORLD)

    def __enter__(self) -> "Run":
        self._group = scratch()
        self._shared = self._group.__enter__()
        os.environ.setdefault("GLOO_SOCKET_IFNAME", _loopback())
        resumed = folder.last(self.run) is not None
        self.children = [self._forked(rank, resumed) for rank in range(WORLD)]
        return self

    def __exit__(self, *_: object) -> None:
        for rank, child in enumerate(self.children):
            if self.codes[rank] is None:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
        self._group.__exit__(None, None, None)

    def _forked(self, rank: int, resumed: bool) -> int:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", DeprecationWarning
            )  # fork beside threads: the child takes no lock of theirs
            child = os.fork()
        if child:
            return child
        code = 1
        try:
            code = self._lives(rank, resumed)
        finally:
            os._exit(code)

    def _lives(self, rank: int, resumed: bool) -> int:
        import torch.distributed as dist

        try:
            shared = dist.FileStore(f"{self._shared}/store", WORLD)
            late = timedelta(seconds=PATIENCE)
            dist.init_process_group("gloo", store=shared, rank=rank, world_size=WORLD, timeout=late)
            where = self.where[rank]
            where.say("recovering")
            trainer = self.kind.made(self.run, where, resumed)
            save = trainer.state.save
            trainer.state.save = lambda name: (where.saves(1), save(name), where.saves(-1))[1]
            if self.changed is not None:
                self.changed(trainer, rank)
            trainer.fit("auto")
            where.say("done")
            found: Any = whole_state(trainer)
            code = 0
        except Stopped as stop:
            found, code = str(stop.reason), 75
        except LostRankError as error:
            found, code = str(error), 2
        except BaseException as error:
            found, code = f"{type(error).__name__}: {error}", 1
        Path(f"{self._shared}/{rank}").write_bytes(pickle.dumps(found))
        return code

    def strike(self, who: list[int], number: int) -> None:
        for rank in who:
            os.kill(self.children[rank], number)

    def wait(self) -> list[int]:
        """Until every rank has ended by itself or by what struck it: their exit codes, negative for a signal."""
        end = time.monotonic() + PATIENCE
        while None in self.codes and time.monotonic() < end:
            for rank, child in enumerate(self.children):
                if self.codes[rank] is None and (found := os.waitpid(child, os.WNOHANG))[0]:
                    self.codes[rank] = os.waitstatus_to_exitcode(found[1])
            time.sleep(0.001)
        assert None not in self.codes, f"a rank did not end within {PATIENCE:g} s: {self.codes}"
        return self.codes

    def outcome(self, rank: int) -> Any:
        return pickle.loads(Path(f"{self._shared}/{rank}").read_bytes())


def to_the_end(kind: Kind, run: Path) -> tuple[Any, ...]:
    """Each rank's whole state at the run's end, and its metrics."""
    with Run(kind, run) as ranks:
        codes = ranks.wait()
        found = [ranks.outcome(rank) for rank in range(WORLD)]
        assert codes == [0] * WORLD, found
        return (*found, lines(run))


class Whole:
    """Each kind's run that was never killed, and how long it takes; made once."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[tuple[Any, ...], float]] = {}

    def of(self, kind: Kind) -> tuple[tuple[Any, ...], float]:
        if not self._known:  # what a first run imports late, each fork would else import for itself
            with scratch() as run:
                alone = {**kind.settings, "distributed": "none", "steps": 1}
                trainer = Kind(kind.name, alone).made(run, None, False)
                trainer.fit()
                whole_state(trainer)
        if kind.name not in self._known:
            taken = []
            for _ in range(2):  # the shorter: a busy machine would else let most runs end before they are struck
                with scratch() as run:
                    began = time.monotonic()
                    found = to_the_end(kind, run)
                    taken.append(time.monotonic() - began)
            self._known[kind.name] = found, min(taken)
        return self._known[kind.name]


WHOLE = Whole()


def trials(count: int, seed: int) -> Tally:
    """Each trial: a run, in every third stopped first, then one rank or all killed, then let go on to its end."""
    tally, rng = Tally(), random.Random(seed)
    for trial in range(count):
        kind = KINDS[trial % len(KINDS)]
        whole, seconds = WHOLE.of(kind)
        who = rng.choice([[0], [1], [0, 1]])
        with scratch() as run:
            told = f"trial {trial}, {kind.name}, ranks {who}"
            wrong = None
            if trial % 3 == 2:
                wrong = struck(kind, run, rng, seconds, [rng.randrange(WORLD)], signal.SIGTERM, tally)
            wrong = wrong or struck(kind, run, rng, seconds, who, signal.SIGKILL, tally)
            wrong = wrong or broken(kind, run, whole)
            what = f"{'all ranks' if len(who) == WORLD else f'rank {who[0]}'} killed: equal bit for bit"
            tally.note(what, wrong and f"{told}: {wrong}")
    return tally


def struck(
    kind: Kind,
    run: Path,
    rng: random.Random,
    seconds: float,
    who: list[int],
    number: int,
    tally: Tally,
) -> str | None:
    """Strike ranks at a random instant. What the others made of it that they should not have, None where nothing."""
    with Run(kind, run) as ranks:
        early = ("starting",) if rng.random() < 0.15 else ("starting", "recovering")
        at = rng.uniform(0, 0.8 * seconds)
        while ranks.where[who[0]].stage in early:
            time.sleep(0.0005)
        time.sleep(at)
        ranks.strike(who, number)
        where = ranks.where[who[0]]
        if number == signal.SIGKILL:
            tally.instants["in a save" if where.is_saving else f"while {where.stage}"] += 1
            tally.instants["after the second checkpoint"] += ranks.where[0].checkpoints >= 2
        codes = ranks.wait()
        if number == signal.SIGTERM:  # before the run has begun and when it is done it ends its process
            tally.instants["after a stop"] += codes == [75] * WORLD
            is_early_or_late = codes[who[0]] == -signal.SIGTERM and where.stage in ("recovering", "starting", "done")
            is_right = len(set(codes)) == 1 and codes[0] in (0, 75)
            return None if is_right or is_early_or_late else f"stopped in {where.stage}, they ended with {codes}"
        for rank in set(range(WORLD)) - set(who):
            if codes[rank] == 0 and ranks.where[who[0]].stage == "done":
                continue
            said = ranks.outcome(rank)
            if codes[rank] != 2 or f"rank {who[0]} is gone" not in said:
                return f"rank {rank} ended with {codes[rank]} and said {str(said)[:200]}"
    return None


def broken(kind: Kind, run: Path, whole: tuple[Any, ...]) -> str | None:
    try:
        found = to_the_end(kind, run)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    parts = [
        f"{name} of rank {rank}"
        for rank in range(WORLD)
        for name in whole[rank]
        if whole[rank][name] != found[rank][name]
    ]
    return ", ".join([*parts, *(["metrics.jsonl"] if whole[-1] != found[-1] else [])]) or None


def test_ranks_that_are_killed_end_as_if_they_never_were() -> None:
    tally = trials(times(6), seed=1)
    assert not tally.broken, str(tally)


def in_its_second_save(trainer: Trainer, rank: int) -> None:
    """Rank 1 dies when it is to give what it has of its own."""
    if rank == 1:
        ranks, calls = trainer.step.ranks, []
        to_first = ranks.to_first

        def dies(value: Any) -> list[Any]:
            calls.append(1)
            if len(calls) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            return to_first(value)

        ranks.to_first = dies  # type: ignore[method-assign]


def test_a_rank_that_dies_while_it_saves_leaves_the_checkpoint_before_it() -> None:
    kind = KINDS[0]
    whole, _ = WHOLE.of(kind)
    with scratch() as run:
        with Run(kind, run, in_its_second_save) as ranks:
            assert ranks.wait() == [2, -signal.SIGKILL]
            assert "rank 1 is gone" in ranks.outcome(0)
        (only,) = folder.listed(run)
        assert only.manifest is not None and only.manifest.clocks["steps"] == 2
        store.load(only.path)
        assert broken(kind, run, whole) is None


@pytest.mark.parametrize("lost", ["rng", "model"])
def test_what_a_rank_has_of_its_own_is_missed(lost, monkeypatch) -> None:
    """Negative control: the second rank takes up the first one's generators, or its buffers."""
    kind = KINDS[0]
    whole, _ = WHOLE.of(kind)
    with scratch() as run:
        with Run(kind, run, in_its_second_save) as ranks:
            ranks.wait()
        of_rank = of_ranks.of_rank
        monkeypatch.setattr(of_ranks, "of_rank", lambda state, *others: {**of_rank(state, *others), lost: state[lost]})
        assert "of rank 1" in (broken(kind, run, whole) or "")
