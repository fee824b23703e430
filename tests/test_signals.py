"""Signals: real ones, in every stage of a step and of a run; what is saved goes on bit for bit."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from runs import MSE, Items, error, lines, rows, trainer_of
from test_run_state import STEPS, differing, goes_on, run, whole_state

from trainer import ConfigError, Trainer
from trainer.checkpoint import folder as folder_of
from trainer.errors import Paused, Stopped
from trainer.signals import Signals

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
EVALUATED = {"steps": STEPS, "evaluate_every": 2, "evaluate_clock": "steps", "metrics_file": True}


class Sends:
    """Sends a signal to this process when it is called for the n-th time."""

    def __init__(self, number: int, at: int) -> None:
        self.number = number
        self.left = at

    def __call__(self, *_: object) -> None:
        self.left -= 1
        if self.left == 0:
            signal.raise_signal(self.number)


def sending(stage: str, sends: Sends, folder: Path, **settings) -> Trainer:
    """A run that gets the signal in a stage."""

    def objective(model, batch):
        if stage == "forward" and model.training:
            sends()
        loss = MSE(model, batch)
        if stage == "backward" and model.training:
            loss.value.register_hook(sends) if hasattr(loss, "value") else loss.register_hook(sends)
        return loss

    objective.weight = MSE.weight
    trainer = trainer_of("adamw", folder=folder, objective=objective, **{**EVALUATED, **settings})
    if stage == "accumulate":
        next(trainer.model.parameters()).register_post_accumulate_grad_hook(sends)
    elif stage in (
        "update",
        "after the update",
    ):  # not by a hook of torch's, with which the kernel is not called itself
        update = trainer.step._updates[0]
        apply, before = update.apply, stage == "update"
        update.apply = lambda factor: (sends() if before else None, apply(factor), None if before else sends())[1]
    elif stage == "evaluation":
        trainer._held_out.evaluation._metrics = lambda model, batch: (sends(), error(model, batch))[1]
    elif stage == "logging":
        trainer._loggers.ticks.append(sends)
    elif stage == "saving":
        save = trainer.state.save
        trainer.state.save = lambda name: (sends(), save(name))[1]
    elif stage == "drawing":
        trainer._feed._mark = lambda own=trainer._feed._mark: (sends(), own())[1]
    return trainer


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return whole_state(run("adamw", folder)), lines(folder)


# 23 rows in micro-batches of 3: windows of 3, 3 and 2. An evaluation of 2 micro-batches after every second step.
AT = {
    "forward": (1, 2, 3, 4, 6, 8, 9, 11, 17, 27),
    "backward": (1, 3, 4, 8, 9, 17),
    "accumulate": (1, 3, 4, 8, 9, 17),
    "update": (1, 2, 3, 4, 10),
    "after the update": (1, 2, 3, 4, 9),
    "logging": (1, 3, 9),
    "drawing": (1, 2, 5, 6, 9),
    "evaluation": (1, 2, 3, 8, 10),
    "saving": (1, 2, 3),
}


@pytest.mark.parametrize("stage", list(AT))
def test_a_stop_in_any_stage_leaves_what_goes_on_bit_for_bit(stage, whole, tmp_path) -> None:
    for turn, at in enumerate(AT[stage]):
        number = signal.SIGINT if turn % 2 else signal.SIGTERM
        folder = tmp_path / f"{at}-{number}"
        sends = Sends(number, at)
        before = [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGALRM)]
        trainer = sending(stage, sends, folder, checkpoint_every=3, checkpoint_clock="steps")
        with pytest.raises(Stopped) as stopped:
            trainer.fit()
        assert stopped.value.code == 75
        assert stopped.value.__cause__ is None
        assert sends.left <= 0
        after = [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGALRM)]
        assert after == before
        started = folder_of.last(folder) is not None
        again = {} if started else {"start": 0, "seed": 3, "poison": 1.0}
        resumed = goes_on("adamw", folder, **again)
        assert differing(whole[0], whole_state(resumed)) == [], (at, number)
        assert lines(folder) == whole[1], (at, number)


@pytest.mark.parametrize("stage", [stage for stage in AT if stage != "saving"])
def test_usr1_saves_and_the_run_goes_on_as_if_nothing_was(stage, whole, tmp_path) -> None:
    for at in AT[stage][:4]:
        saved = []
        trainer = sending(stage, Sends(signal.SIGUSR1, at), tmp_path / str(at), checkpoint_best=False)
        save = trainer.state.save

        def kept(name, save=save, saved=saved, folder=tmp_path / str(at), saving=trainer.state._saving):
            save(name)
            saving.wait()
            if not saved:
                target = folder.with_name(f"{folder.name}-saved")
                shutil.copytree(folder, target)
                (target / "run.lock").unlink()
                saved.append(target)

        trainer.state.save = kept
        trainer.fit()
        assert differing(whole[0], whole_state(trainer)) == [], at
        resumed = goes_on("adamw", saved[0])
        assert differing(whole[0], whole_state(resumed)) == [], at
        assert [line | {"best": None} for line in lines(saved[0])] == [line | {"best": None} for line in whole[1]]


def test_the_state_saved_inside_a_window_has_its_gradients_and_inside_an_evaluation_its_sums(tmp_path) -> None:
    trainer = sending("forward", Sends(signal.SIGTERM, 5), tmp_path / "window")
    with pytest.raises(Stopped):
        trainer.fit()
    assert trainer.step.is_open
    state = trainer.step.state_dict()
    assert state["open"]["sums"]["micro_batches"] == 2
    assert set(state["gradients"]) == set(dict(trainer.model.named_parameters()))
    assert trainer.state.window_rng is not None
    trainer = sending("evaluation", Sends(signal.SIGTERM, 1), tmp_path / "evaluation")
    with pytest.raises(Stopped):
        trainer.fit()
    sums = trainer._held_out.state_dict()
    assert (sums["position"], sums["rows"]) == (1, 3)
    assert trainer.state.owes_evaluation
    # What lies behind is not evaluated again.
    resumed = trainer_of("adamw", folder=tmp_path / "evaluation", **{**EVALUATED, "steps": 2})
    seen = []
    resumed._held_out.evaluation._metrics = lambda model, batch: (seen.append(len(batch[0])), error(model, batch))[1]
    resumed.fit(resume="auto")
    assert seen == [2]


def test_the_same_trainer_goes_on_after_a_stop(whole, tmp_path) -> None:
    trainer = sending("forward", Sends(signal.SIGTERM, 5), tmp_path)
    with pytest.raises(Stopped):
        trainer.fit()
    trainer.fit()
    assert differing(whole[0], whole_state(trainer)) == []
    assert lines(tmp_path) == whole[1]


@pytest.mark.parametrize("kind", ["momentum", "items", "loader", "plain", "never", "tensor_rate", "factored", "two"])
def test_a_window_saved_open_is_gone_on_with_whatever_the_run_is_made_of(kind, tmp_path) -> None:
    expected = run(kind, tmp_path / "whole")
    for forward in (2, 3, 5, 8, 10):
        folder = tmp_path / str(forward)
        sends = Sends(signal.SIGTERM, forward)

        def objective(model, batch, sends=sends):
            if torch.is_grad_enabled():
                sends()
            return MSE(model, batch)

        objective.weight = MSE.weight
        trainer = trainer_of(kind, folder=folder, objective=objective, **EVALUATED)
        with pytest.raises(Stopped):
            trainer.fit()
        resumed = goes_on(kind, folder)
        assert differing(whole_state(expected), whole_state(resumed)) == [], forward
        assert lines(folder) == lines(tmp_path / "whole"), forward


# Waiting, and what takes too long.


class Slow(Items):
    """A dataset that waits before one of its rows, as a slow disk does."""

    def __init__(self, count: int, slow: int) -> None:
        super().__init__(count)
        self.left = slow

    def __getitem__(self, row: int):
        self.left -= 1
        if self.left == 0:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)  # nothing; only here to show that other timers are left alone
            threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
            time.sleep(30)
        return super().__getitem__(row)


def test_a_stop_does_not_wait_for_data(tmp_path) -> None:
    expected = run("items", tmp_path / "whole")
    trainer = trainer_of("items", folder=tmp_path / "b", data=Slow(23, 14), **EVALUATED)
    began = time.monotonic()
    with pytest.raises(Stopped):
        trainer.fit()
    assert time.monotonic() - began < 10
    resumed = goes_on("items", tmp_path / "b")
    assert differing(whole_state(expected), whole_state(resumed)) == []


@pytest.mark.parametrize("where", ["forward", "evaluation"])
def test_what_takes_longer_than_the_grace_time_is_given_up(where, whole, tmp_path) -> None:
    left = [5 if where == "forward" else 3]

    def hangs(model, batch):
        if model.training is (where == "forward"):
            left[0] -= 1
            if left[0] == 0:
                signal.raise_signal(signal.SIGTERM)
                time.sleep(30)
        return MSE(model, batch)

    hangs.weight = MSE.weight
    trainer = trainer_of("adamw", folder=tmp_path, objective=hangs, grace=0.2, **EVALUATED)
    began = time.monotonic()
    with pytest.raises(Stopped):
        trainer.fit()
    assert 0.2 <= time.monotonic() - began < 10
    assert not trainer.step.is_open, "half a micro-batch is no part of a window"
    resumed = goes_on("adamw", tmp_path)
    assert differing(whole_state(resumed), whole[0]) == []
    assert lines(tmp_path) == whole[1]


TWICE = """
import os, signal, sys, time
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
from runs import MSE, trainer_of

signal.signal(signal.SIGINT, signal.default_int_handler)
def objective(model, batch):
    if len(seen) == 4:
        print("ready", flush=True)
        time.sleep(60)
    seen.append(1)
    return MSE(model, batch)
seen = []
trainer_of("momentum", objective=objective, folder=sys.argv[2], steps=10).fit()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_leaves_now(number, tmp_path) -> None:
    here = Path(__file__).parent
    words = [sys.executable, "-c", TWICE, str(here), str(tmp_path)]
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(here.parent)}
    ) as running:
        assert running.stdout.readline() == "ready\n"
        running.send_signal(number)
        time.sleep(0.3)
        assert running.poll() is None, "the first one waits for the micro-batch"
        running.send_signal(number)
        running.wait(timeout=10)
    assert running.returncode == -number  # a shell shows 130 and 143
    assert not folder_of.last(tmp_path) is not None


def test_a_launcher_that_passes_the_same_signal_on_is_no_second_one(monkeypatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    with Signals(5.0) as signals:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert signals.to_stop


# Where no handler belongs.


def test_handlers_of_others_a_thread_and_a_prompt_are_left_alone(monkeypatch) -> None:
    mine = signal.signal(signal.SIGUSR1, lambda *_: None)
    try:
        own = signal.getsignal(signal.SIGUSR1)
        with Signals(1.0):
            assert signal.getsignal(signal.SIGUSR1) is own
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    finally:
        signal.signal(signal.SIGUSR1, mine)
    found = []

    def inside() -> None:
        with Signals(1.0):
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    inside()
    assert found == [signal.SIG_DFL] * 2


def test_without_a_folder_ctrl_c_is_what_it_always_was() -> None:
    def objective(model, batch):
        signal.raise_signal(signal.SIGINT)
        return MSE(model, batch)

    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            trainer_of("momentum", steps=3, objective=objective).fit()
    finally:
        signal.signal(signal.SIGINT, former)


def test_a_signal_while_the_end_is_saved_ends_nothing(tmp_path) -> None:
    trainer = trainer_of("momentum", folder=tmp_path, steps=3, checkpoint_best=False)
    finish = trainer.state.finish
    trainer.state.finish = lambda: (signal.raise_signal(signal.SIGTERM), finish())[1]
    assert trainer.fit().reason == "3 steps done"
    assert trainer_of("momentum", folder=tmp_path, steps=3).fit(resume="auto").clocks["steps"] == 3


def test_a_forked_child_is_ended_by_term_and_leaves_ctrl_c_to_its_parent() -> None:
    with Signals(5.0) as signals:
        for number, expected in ((signal.SIGTERM, signal.SIGTERM), (signal.SIGINT, 0)):
            child = os.fork()
            if child == 0:
                signal.raise_signal(number)
                os._exit(0)
            _, status = os.waitpid(child, 0)
            assert os.waitstatus_to_exitcode(status) == -expected
        assert signals.asked is None


def test_what_a_signal_does_between_two_micro_batches_is_one_look(tmp_path) -> None:
    signals = Signals(5.0)
    assert signals.asked is None and not signals.to_stop
    with signals:
        signal.raise_signal(signal.SIGUSR1)
        assert signals.asked == "SIGUSR1" and not signals.to_stop
        signals.waiting = True
        with pytest.raises(Paused):
            signal.raise_signal(signal.SIGTERM)
        assert signals.to_stop and signals.reason == "stopped by SIGTERM"
        signal.raise_signal(signal.SIGUSR1)
        assert signals.to_stop, "a save does not take a stop back"


@pytest.mark.parametrize("grace", [0, -1, "soon"])
def test_the_grace_time_is_a_number_of_seconds(grace) -> None:
    with pytest.raises(ConfigError, match="grace"):
        trainer_of("momentum", steps=1, grace=grace)


def test_a_signals_stop_is_told_with_the_words_that_go_on(tmp_path, capsys) -> None:
    trainer = sending("forward", Sends(signal.SIGINT, 5), tmp_path, console=True)
    trainer.go_on = "the words"
    with pytest.raises(Stopped):
        trainer.fit()
    printed = capsys.readouterr().out
    assert "stopped by Ctrl-C" in printed and "go on with: the words" in printed


def test_in_a_window_of_one_nothing_is_asked_between(tmp_path) -> None:
    """A window of one micro-batch ends in its step: nothing is saved open."""
    trainer = trainer_of("momentum", folder=tmp_path, data=rows(8), accumulation_steps=1, steps=4)
    trainer.step.optimizers[0].register_step_pre_hook(Sends(signal.SIGTERM, 2))
    with pytest.raises(Stopped):
        trainer.fit()
    assert not trainer.step.is_open
    assert trainer.step.clocks.steps == 2
