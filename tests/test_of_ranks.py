"""What each rank has of its own in a checkpoint: whichever rank a stop hits, wherever it stands, all of them go on as
if nothing had been. Everything is compared bit for bit, on each rank."""

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from ranks import over_ranks
from runs import MSE, error, lines, rows, saved, trainer_of
from test_run_state import differing, whole_state

from trainer import CheckpointError, rng
from trainer.checkpoint import folder as folder_of
from trainer.checkpoint import manifest, of_ranks, store
from trainer.distributed.call import Call
from trainer.errors import ConfigError, Stopped

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")

SETTINGS = {
    "distributed": "ddp",
    "epochs": 2,
    "evaluate_every": 2,
    "evaluate_clock": "steps",
    "evaluation_batch_size": 1,
    "metrics_file": True,
    "audit": False,
}
"""23 rows in micro-batches of 3 on two ranks: in an epoch windows of 3 and 1 micro-batches on each."""
POISON = {"start": 77, "seed": 55, "poison": 1e4}


class Sends:
    """An objective and a metric that send a signal to their process when they are called for the n-th time."""

    def __init__(self, forward: int = -1, evaluation: int = -1, number: int = signal.SIGTERM) -> None:
        self.left = {"forward": forward, "evaluation": evaluation}
        self.number = number
        self.weight = MSE.weight

    def _count(self, what: str) -> None:
        self.left[what] -= 1
        if self.left[what] == 0:
            signal.raise_signal(self.number)

    def __call__(self, model, batch):
        if torch.is_grad_enabled():
            self._count("forward")
        return MSE(model, batch)

    def metrics(self, model, batch):
        self._count("evaluation")
        return error(model, batch)


def lives(kind: str, folder: str, sends: Sends | None = None, resume: str = "never", **settings):
    """One rank's run to its end, or to its stop: its whole state, and how it ended."""
    again = resume != "never" and folder_of.last(Path(folder)) is not None
    sends = sends or Sends()
    trainer = trainer_of(kind, folder=folder, objective=sends, **{**SETTINGS, **(POISON if again else {}), **settings})
    trainer._held_out.evaluation._metrics = sends.metrics
    if again:
        rng.seed_all(1234 + trainer.step.ranks.rank)
    try:
        trainer.fit(resume)
        ended = "done"
    except Stopped as stop:
        ended = stop.reason
    return whole_state(trainer), ended, trainer


def stops(
    rank: int, world: int, folder: str, kind: str, at: list, deaf: bool = True, lost: str | None = None, **settings
):
    """A run that nothing stops; for each (ranks, what they send to themselves) one that is stopped and gone on with.

    Args:
        deaf: a rank hears of another's signal only when they sum, so that where it stands does not hang on time.
        lost: a part of what a rank has of its own that does not come back to it.

    Returns what differs from the first run in each that was stopped, and where each stood then.
    """
    heard, of_rank = Call.is_heard, of_ranks.of_rank
    whole, _, _ = lives(kind, f"{folder}/whole", **settings)
    broken, stood = [], []
    for number, (who, sent) in enumerate(at):
        run = f"{folder}/{number}"
        try:
            if deaf:
                Call.is_heard = lambda self: False
            _, ended, trainer = lives(kind, run, Sends(**sent) if rank in who else None, **settings)
            if lost is not None:
                of_ranks.of_rank = lambda state, *others: {**of_rank(state, *others), lost: state[lost]}
            open_, sums = trainer.step._open, trainer._held_out.evaluation.sums
            stood.append((ended, open_ and open_.micro_batches, sums and sums.position, trainer.step.clocks.windows))
            found, ended, _ = lives(kind, run, None, "auto", **settings)
        finally:
            Call.is_heard, of_ranks.of_rank = heard, of_rank
        differs = differing(whole, found)
        if not rank and lines(Path(run)) != lines(Path(f"{folder}/whole")):
            differs.append("metrics.jsonl")
        broken.append(differs + ([] if ended == "done" else [ended]))
    return broken, stood


def test_a_stop_inside_a_window_is_gone_on_with_bit_for_bit_on_every_rank(tmp_path) -> None:
    """On one rank, on the other, on both at other places; the rank that is not signalled comes to the window's end."""
    at = [([1], {"forward": 2}), ([0], {"forward": 1}), ([0, 1], {"forward": 6}), ([1], {"forward": 4})]
    left, right = over_ranks(stops, str(tmp_path), "adamw", at)
    assert left[0] == right[0] == [[]] * 4
    assert [one[0] for one in left[1]] == [one[0] for one in right[1]] == ["stopped by SIGTERM"] * 4
    assert (left[1][0][1], right[1][0][1]) == (3, 2), "the first rank at its window's end, the second inside"
    assert (left[1][1][1], right[1][1][1]) == (1, 3)
    assert (left[1][2][1], right[1][2][1]) == (2, 2)
    assert (left[1][3][1], right[1][3][1], left[1][3][3]) == (None, None, 2), "in the last micro-batch: a window's end"


@pytest.mark.parametrize("kind", ["items", "momentum", "never", "two"])
def test_so_is_one_of_every_kind_of_run(kind, tmp_path) -> None:
    """20 rows: at an epoch's end one rank's window is empty while the other's is open."""
    more = {"data": rows(20)} if kind == "momentum" else {}
    at = [([1], {"forward": 1}), ([0], {"forward": 5})]
    left, right = over_ranks(stops, str(tmp_path), kind, at, deaf=kind == "two", **more)
    assert left[0] == right[0] == [[], []]
    assert right[1][0][1] == 1 and left[1][1][1] == 1


def test_a_stop_inside_an_evaluation_too(tmp_path) -> None:
    at = [([1], {"evaluation": 1}), ([0], {"evaluation": 4}), ([0, 1], {"evaluation": 2})]
    left, right = over_ranks(stops, str(tmp_path), "adamw", at)
    assert left[0] == right[0] == [[]] * 3
    assert [one[2] for one in left[1]] == [3, 1, 2] and [one[2] for one in right[1]] == [1, 2, 2]


@pytest.mark.parametrize(("lost", "kind"), [("rng", "adamw"), ("model", "adamw"), ("step", "adamw"), ("run", "items")])
def test_what_does_not_come_back_to_its_rank_is_found(lost, kind, tmp_path) -> None:
    _, right = over_ranks(stops, str(tmp_path), kind, [([1], {"forward": 6})], lost=lost)
    assert right[0][0], f"{lost} was lost, and nobody saw it"


def stopped_in_a_window(rank: int, world: int, folder: str):
    lives("adamw", folder, Sends(forward=2) if rank else None)


def test_the_checkpoint_has_a_file_for_each_other_rank_and_reads_like_that_of_one_process(tmp_path) -> None:
    over_ranks(stopped_in_a_window, str(tmp_path))
    path = folder_of.last(tmp_path)
    written = manifest.read(path)
    assert written.world == 2 and "rank-00001.safetensors" in written.files
    state = saved(tmp_path)
    first, second = state["ranks"]
    assert first == {} and set(second["step"]) == set(of_ranks.OF_STEP)
    assert set(second["step"]["gradients"]) == set(state["step"]["gradients"])
    assert set(second["model"]) == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    assert store.load(path, 1)["ranks"][1].keys() == second.keys() and store.load(path, 2)["ranks"] == [{}, {}]
    other = path / "rank-00001.safetensors"
    other.write_bytes(other.read_bytes()[:-1] + b"?")
    with pytest.raises(CheckpointError, match=r"rank-00001.safetensors is damaged"):
        store.load(path)
    store.load(path, 2)


def goes_on(rank: int, world: int, folder: str, resume: str = "auto", accept=(), **settings):
    try:
        trainer = trainer_of("adamw", folder=folder, **{**SETTINGS, **POISON, **settings})
        trainer.fit(resume, accept)
    except (CheckpointError, ConfigError) as error:
        return type(error).__name__, str(error)
    return whole_state(trainer), trainer.state.notes


def test_another_number_of_ranks_is_refused_inside_a_window_and_said_twice_at_its_end(tmp_path) -> None:
    inside, at_end = tmp_path / "inside", tmp_path / "at end"
    over_ranks(stopped_in_a_window, str(inside))
    over_ranks(goes_on, str(at_end), "never", steps=3)
    alone = {"distributed": "none", "accept": ["distributed"]}
    kind, said = goes_on(0, 1, str(inside), **alone)
    assert kind == "CheckpointError" and "was saved by 2 ranks inside a window, and now there is 1: " in said
    assert "go on with 2 until the window's end, or from a checkpoint that was saved at one (resume=PATH)" in said
    kind, said = goes_on(0, 1, str(at_end), distributed="none")
    assert kind == "ConfigError" and "(distributed ddp on 2 ranks → none on 1 rank)" in said
    _, notes = goes_on(0, 1, str(at_end), **alone)
    assert "distributed ddp on 2 ranks → none on 1 rank" in notes[0]
    shutil.rmtree(at_end)
    goes_on(0, 1, str(at_end), "never", distributed="none", steps=3)
    (left, _), (right, _) = over_ranks(goes_on, str(at_end), accept=["distributed"])
    assert left["model"] != right["model"] and left["rng"] != right["rng"] and left["optimizers"] == right["optimizers"]


def test_a_damaged_checkpoint_is_refused_by_every_rank(tmp_path) -> None:
    over_ranks(stopped_in_a_window, str(tmp_path))
    path = folder_of.last(tmp_path)
    (path / "rank-00001.safetensors").unlink()
    for answer in over_ranks(goes_on, str(tmp_path), str(path)):
        assert answer[0] == "CheckpointError" and "rank-00001.safetensors is missing" in answer[1]


def asks_others(rank: int, world: int, steps: int):
    """How often a run asks the other rank for something, with windows of so many micro-batches."""
    asked = []
    trainer = trainer_of("adamw", **{**SETTINGS, "epochs": 1, "accumulation_steps": steps, "metrics_file": False},
                         data=rows(3 * 2 * steps), log_every=100)  # fmt: skip
    ranks = trainer.step.ranks
    for name in ("sum_later", "gather", "to_first"):
        own = getattr(ranks, name)
        setattr(ranks, name, lambda value, own=own, name=name: (asked.append(name), own(value))[1])
    trainer.fit()
    assert trainer.step.clocks.as_dict()["windows"] == 1
    return sorted(asked)


def test_a_run_that_no_signal_reaches_asks_nothing_more_in_a_longer_window() -> None:
    short, long = over_ranks(asks_others, 2)[0], over_ranks(asks_others, 9)[0]
    assert short == long and short.count("sum_later") == 2
