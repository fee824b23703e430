"""Safeguards taken out, one at a time: the trials that need it must then find something wrong, or they prove nothing.

SAFEGUARDS lists all of them with the test that takes them out; those that have no place beside their trials are here.
"""

import os
import signal
import threading
import time
from pathlib import Path

import pytest
import test_lock
import test_signals
import test_sites
import test_store_full
import test_store_operations
from killing import ends, forked
from runs import Items, trainer_of
from tally import Tally
from test_boundaries import stopped_at, whole

from trainer import Trainer
from trainer.checkpoint import disk, folder
from trainer.checkpoint.lock import Lock
from trainer.checkpoint.run_state import RunState
from trainer.checkpoint.writer import Writer
from trainer.errors import Stopped
from trainer.held_out import HeldOut
from trainer.optim.rates import Rates
from trainer.signals import Signals
from trainer.step import Step

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")

SAFEGUARDS = {
    "each fsync": "test_store_operations.py::test_each_fsync_is_needed",
    "the fsync of the folder above": "test_store_operations.py::test_the_first_checkpoint_of_a_run_is_there_once_its_"
    "save_has_returned",
    "writing beside and renaming": "test_store_killed.py::test_without_writing_beside_half_a_checkpoint_is_found_under_"
    "its_own_name",
    "removing by way of another name": "test_controls.py::test_without_another_name_half_of_what_was_removed_is_found",
    "the sweep of what a cut save left": "test_controls.py::test_without_the_sweep_what_is_left_over_is_found",
    "the hash of each file": "test_store_damage.py::test_without_the_hash_damage_is_loaded_silently",
    "the fallback to an older checkpoint": "test_controls.py::test_without_the_fallback_damage_is_the_end",
    "the error of a save in the background": "test_controls.py::test_a_save_whose_error_is_swallowed_is_found",
    "the lock of a folder": "test_controls.py::test_without_the_lock_two_runs_share_a_folder",
    "generators, place in the data, optimizer": "test_runs_killed.py::test_a_state_that_is_not_whole_is_found",
    "the place in the data, off by one": "test_controls.py::test_a_place_in_the_data_that_is_off_by_one_is_found",
    "clocks, schedule, loss scale": "test_controls.py::test_a_step_that_is_not_whole_is_found",
    "metrics.jsonl cut to the checkpoint": "test_runs_killed.py::test_a_metrics_file_that_is_not_cut_is_found",
    "the open window's gradients, sums, buffers, draws": "test_boundaries.py::test_an_open_window_that_is_not_whole_is_"
    "found",
    "the open evaluation's sums": "test_boundaries.py::test_an_evaluation_that_is_not_whole_is_found",
    "the poisoned rate of the run that goes on": "test_controls.py::test_a_rate_that_comes_from_the_code_is_found",
    "the look for a signal between micro-batches": "test_controls.py::test_without_the_look_between_micro_batches",
    "the look for a signal in evaluation": "test_controls.py::test_without_the_look_in_evaluation",
    "a stop while the run waits for data": "test_controls.py::test_without_the_word_that_it_waits_a_stop_waits_too",
    "the grace time": "test_controls.py::test_without_the_grace_time_what_hangs_is_waited_for",
    "a second signal": "test_controls.py::test_without_the_second_signal_nothing_ends",
    "the verdict on what is not finite": "test_sites.py::test_without_the_verdict_the_poison_is_found",
    "the buffers kept for a skip": "test_sites.py::test_without_the_kept_buffers_a_skip_is_seen_to_change_the_model",
    "the check of the optimizer's state": "test_sites.py::test_without_the_check_a_broken_optimizer_state_is_found",
    "the check of the learning rate": "test_controls.py::test_without_the_check_a_broken_rate_is_taken",
    "workers that die at a quiet moment": "test_loaders.py::test_without_the_safeguard_a_death_comes_up_wherever_the_"
    "program_is",
    "structure that comes from code alone": "test_store_hostile.py::test_the_canary_sings_where_a_pickle_is_loaded",
    "checks of a config": "test_configs.py::test_an_exception_that_is_no_error_of_ours_is_found",
    "memory, threads and files that are counted": "test_soak.py::test_what_leaks_is_found",
}


def controls() -> Tally:
    """For scripts/torture: each safeguard, and whether its absence is found."""
    import subprocess
    import sys

    here = Path(__file__).parent
    words = [sys.executable, "-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider"]
    said = subprocess.run(
        [*words, *(str(here / test) for test in SAFEGUARDS.values())], capture_output=True, text=True, check=False
    ).stdout
    tally = Tally()
    for safeguard, test in SAFEGUARDS.items():
        lines = [line for line in said.splitlines() if f"{test}" in line and line.split()[0].isupper()]
        passed = bool(lines) and all(line.startswith("PASSED") for line in lines)
        tally.note("its absence is found", None if passed else f"{safeguard}: its absence is not found")
    tally.told.append("Taken out one at a time, each makes a test red: " + "; ".join(SAFEGUARDS) + ".")
    return tally


@pytest.mark.parametrize("test", SAFEGUARDS.values(), ids=list(SAFEGUARDS))
def test_each_safeguard_has_its_test(test) -> None:
    file, _, name = test.partition("::")
    assert f"\ndef {name}(" in (Path(__file__).parent / file).read_text(encoding="utf-8")


# Saving.


def test_without_another_name_half_of_what_was_removed_is_found(monkeypatch) -> None:
    remove = disk.remove
    monkeypatch.setattr(disk, "remove", lambda folder, gone: remove(folder, folder))
    assert test_store_operations.failing_calls(90, seed=1).broken


def test_without_the_sweep_what_is_left_over_is_found(monkeypatch) -> None:
    monkeypatch.setattr(folder, "sweep", lambda run: [])
    found = test_store_operations.failing_calls(30, seed=1).broken
    assert any("left over" in told for told in found), found


def test_without_the_fallback_damage_is_the_end(monkeypatch) -> None:
    import test_store_damage

    newest_first = folder.newest_first
    monkeypatch.setattr(folder, "newest_first", lambda run: newest_first(run)[:1])
    assert test_store_damage.trials(10, seed=1).outcomes["no fallback"] == 10


def test_a_save_whose_error_is_swallowed_is_found(monkeypatch) -> None:
    monkeypatch.setattr(Writer, "check", lambda self: None)
    assert test_store_full.trials(1, seed=1).broken


def test_without_the_lock_two_runs_share_a_folder(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(Lock, "take", lambda self: True)
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        test_lock.test_another_trainer_of_this_process_is_kept_out_too(tmp_path)


# What a run that goes on has.


def test_a_place_in_the_data_that_is_off_by_one_is_found(monkeypatch) -> None:
    expected = whole("one micro-batch")
    assert stopped_at("one micro-batch", 2, expected) is None
    own = RunState.position.fget
    monkeypatch.setattr(RunState, "position", property(lambda self: max(0, own(self) - 1)))
    assert "model" in (stopped_at("one micro-batch", 2, expected) or "")


@pytest.mark.parametrize(
    ("part", "variant"),
    [
        ("clocks", "cosine"),
        ("rates", "a schedule of torch's"),
        ("loss_scale", "fp16 and its scale"),
    ],
)
def test_a_step_that_is_not_whole_is_found(part, variant, monkeypatch) -> None:
    expected = whole(variant)
    load = Step.load_state_dict

    def without(self: Step, state) -> None:
        load(self, {**state, part: self.state_dict()[part]})

    monkeypatch.setattr(Step, "load_state_dict", without)
    # Where it is by chance as it was at the start, nothing can be found: one of some boundaries must show it.
    assert any(stopped_at(variant, at, expected) for at in range(3, expected[2], 2))


def test_a_rate_that_comes_from_the_code_is_found(monkeypatch) -> None:
    """The run that goes on is built with ten thousand times the rate: taken up with that, it must not pass."""
    from trainer.checkpoint import contents

    expected = whole("constant with warmup")
    load = contents.load_optimizers

    def without(optimizers, *more) -> None:
        kept = [[group["lr"] for group in one.param_groups] for one in optimizers]
        first = [[group.get("initial_lr") for group in one.param_groups] for one in optimizers]
        load(optimizers, *more)
        for one, rates, begun in zip(optimizers, kept, first, strict=True):
            for group, rate, begin in zip(one.param_groups, rates, begun, strict=True):
                group["lr"] = rate
                group["initial_lr"] = rate if begin is None else begin

    monkeypatch.setattr(contents, "load_optimizers", without)
    assert "model" in (stopped_at("constant with warmup", 5, expected) or "")


def test_without_the_check_a_broken_rate_is_taken(monkeypatch) -> None:
    assert test_sites.rate("fp32", float("nan")) is None
    monkeypatch.setattr(Rates, "_check", lambda self: None)
    assert "was taken" in (test_sites.rate("fp32", float("nan")) or "")


# Signals.


def test_without_the_look_between_micro_batches(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(Trainer, "_between", lambda self: None)
    with pytest.raises(AssertionError):
        test_signals.test_the_state_saved_inside_a_window_has_its_gradients_and_inside_an_evaluation_its_sums(tmp_path)


def test_without_the_look_in_evaluation(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(HeldOut, "_look", lambda self: None)
    with pytest.raises((AssertionError, TypeError)):
        test_signals.test_the_state_saved_inside_a_window_has_its_gradients_and_inside_an_evaluation_its_sums(tmp_path)


def seconds_to_stop(run: Path) -> float:
    """From a SIGTERM in a dataset that waits for a second and a half, until the run has stopped."""

    class Slow(Items):
        def __getitem__(self, row: int):
            if len(told) == 9:
                threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
                told.append(time.monotonic())
                time.sleep(1.5)
            told.append(0.0)
            return super().__getitem__(row)

    told: list[float] = []
    with pytest.raises(Stopped):
        trainer_of("items", folder=run, data=Slow(23), steps=9).fit()
    return time.monotonic() - max(told)


def test_without_the_word_that_it_waits_a_stop_waits_too(tmp_path, monkeypatch) -> None:
    assert seconds_to_stop(tmp_path / "a") < 1.5
    monkeypatch.setattr(Signals, "waiting", property(lambda self: False, lambda self, value: None), raising=False)
    assert seconds_to_stop(tmp_path / "b") >= 1.5


def test_without_the_grace_time_what_hangs_is_waited_for(tmp_path, monkeypatch) -> None:
    expected = None
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 1.0)))
    monkeypatch.setattr(signal, "setitimer", lambda *_: None)
    with pytest.raises(AssertionError):
        test_signals.test_what_takes_longer_than_the_grace_time_is_given_up("forward", expected, tmp_path)


@pytest.mark.parametrize("is_there", [True, False])
def test_without_the_second_signal_nothing_ends(is_there, monkeypatch) -> None:
    if not is_there:
        stop = Signals._stop

        def once(self, number, frame) -> None:
            handlers = [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)]
            stop(self, number, frame)
            for one, handler in zip((signal.SIGTERM, signal.SIGINT), handlers, strict=True):
                signal.signal(one, handler)

        monkeypatch.setattr(Signals, "_stop", once)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)

    def act() -> None:
        with Signals(5.0):
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)

    assert ends(forked(act)) == (-signal.SIGTERM if is_there else 0)
