"""Where a run stands: stopped anywhere and rebuilt from nothing, it goes on bit for bit."""

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import KINDS, MSE, Interrupted, bits, error, lines, net, rows, trainer_of
from torch import nn

from trainer import CheckpointError, ConfigError, Settings, Step, Trainer, rng
from trainer.checkpoint import contents, store
from trainer.checkpoint.folder import found
from trainer.checkpoint.run_state import LAST, RunState
from trainer.optim import sgd

STEPS = 10


def whole_state(trainer: Trainer) -> dict:
    state = trainer.state
    return {
        "model": bits(contents.model_state(trainer.model)),
        "optimizers": bits([one.state_dict() for one in trainer.step.optimizers]),
        "step": bits(trainer.step.state_dict()),
        "rng": bits(rng.capture()),
        "place": (state.order_seed, state.position, state.best, state.evaluations_without_best, bits(state.metrics)),
    }


def run(kind: str, folder, **settings) -> Trainer:
    settings = {"steps": STEPS, "evaluate_every": 2, "evaluate_clock": "steps", "metrics_file": True, **settings}
    trainer = trainer_of(kind, folder=folder, **settings)
    trainer.fit()
    return trainer


def goes_on(kind: str, folder, **settings) -> Trainer:
    """A new Trainer with another start, another seed and spoiled rates, that takes the folder's state up."""
    settings = {"steps": STEPS, "evaluate_every": 2, "evaluate_clock": "steps", "metrics_file": True, **settings}
    trainer = trainer_of(kind, folder=folder, **{"start": 77, "seed": 55, "poison": 1e4, **settings})
    rng.seed_all(1234)
    trainer.fit(resume="auto")
    return trainer


def differing(left: dict, right: dict) -> list[str]:
    return [name for name in left if left[name] != right[name]]


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_stopped_by_ctrl_c_in_any_window_equals_one_that_was_not(kind, tmp_path) -> None:
    whole = run(kind, tmp_path / "whole")
    expected, written = whole_state(whole), lines(tmp_path / "whole")
    # 23 rows in micro-batches of 3 are 8: windows of 3, 3 and 2. An epoch and its borders are tried.
    for forward in (*range(1, 10), 16, 18, 23, 27) if kind == "adamw" else (1, 5, 8, 16):
        folder = tmp_path / str(forward)
        with pytest.raises(KeyboardInterrupt):
            run(kind, folder, objective=Interrupted(MSE, forward))
        # Before the first step there is nothing to save, and the run starts anew.
        again = {"start": 0, "seed": 3, "poison": 1.0} if forward <= 3 else {}
        trainer = goes_on(kind, folder, **again)
        assert differing(expected, whole_state(trainer)) == [], forward
        assert lines(folder) == written, forward


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_stopped_by_a_limit_after_any_step_equals_one_that_was_not(kind, tmp_path) -> None:
    whole = run(kind, tmp_path / "whole", evaluate_every=1)
    expected, written = whole_state(whole), lines(tmp_path / "whole")
    for steps in range(1, STEPS) if kind == "adamw" else (1, 3, 5, 6):
        folder = tmp_path / str(steps)
        run(kind, folder, steps=steps, evaluate_every=1)
        trainer = goes_on(kind, folder, evaluate_every=1)
        assert differing(expected, whole_state(trainer)) == [], steps
        assert lines(folder) == written, steps


@pytest.mark.parametrize("steps", [3, 4, 6])
def test_evaluation_by_epochs_at_an_epochs_end_comes_once_also_where_the_run_stops_there(steps, tmp_path) -> None:
    by_epochs = {"evaluate_every": 1, "evaluate_clock": "epochs"}
    run("adamw", tmp_path / "whole", **by_epochs)
    run("adamw", tmp_path / "b", steps=steps, **by_epochs)
    goes_on("adamw", tmp_path / "b", **by_epochs)
    at = [
        [line["windows"] for line in lines(tmp_path / name) if line["event"] == "evaluation"] for name in ("whole", "b")
    ]
    assert at[0] == [3, 6, 9, 10]
    assert at[1] == sorted({*at[0], steps})
    assert [line["epochs"] for line in lines(tmp_path / "b") if line["event"] == "evaluation"] == (
        [1, 1, 2, 3, 3] if steps == 4 else [1, 2, 3, 3]
    )


def test_a_run_stopped_inside_an_evaluation_catches_up_on_it(tmp_path) -> None:
    class Stops:
        def __init__(self, at: int) -> None:
            self.left = at

        def __call__(self, model, batch):
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
            return error(model, batch)

    whole = run("adamw", tmp_path / "whole", patience=3)
    for evaluation in (1, 2, 3):
        folder = tmp_path / str(evaluation)
        trainer = trainer_of(
            "adamw", folder=folder, steps=STEPS, evaluate_every=2, evaluate_clock="steps", metrics_file=True, patience=3
        )
        trainer._held_out.evaluation._metrics = Stops(2 * evaluation)  # two micro-batches in each
        with pytest.raises(KeyboardInterrupt):
            trainer.fit()
        again = goes_on("adamw", folder, patience=3)
        assert differing(whole_state(whole), whole_state(again)) == []
        assert lines(folder) == lines(tmp_path / "whole")


KILLED = """
import os, sys
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
from runs import MSE, Interrupted, trainer_of

class Killed(Interrupted):
    def __call__(self, model, batch):
        try:
            return super().__call__(model, batch)
        except KeyboardInterrupt:
            os._exit(9)

objective = Killed(MSE, 20)
trainer_of("items", objective=objective, folder=sys.argv[2], steps=10, evaluate_every=2, evaluate_clock="steps",
           metrics_file=True, checkpoint_every=2, checkpoint_clock="steps").fit()
"""


def test_a_run_killed_without_a_word_goes_on_from_its_last_save(tmp_path) -> None:
    whole = run("items", tmp_path / "whole")
    here = Path(__file__).parent
    words = [sys.executable, "-c", KILLED, str(here), str(tmp_path / "b")]
    assert subprocess.run(words, timeout=60, env={**os.environ, "PYTHONPATH": str(here.parent)}).returncode == 9
    # Killed in the eighth window; the last save was after the sixth, and by then its lines were on the disk.
    assert max(line["windows"] for line in lines(tmp_path / "b")) >= 6
    trainer = goes_on("items", tmp_path / "b", checkpoint_every=2, checkpoint_clock="steps")
    assert differing(whole_state(whole), whole_state(trainer)) == []
    assert lines(tmp_path / "b") == lines(tmp_path / "whole")


def test_the_same_trainer_goes_on_where_it_was_stopped(tmp_path) -> None:
    whole = run("adamw", tmp_path / "whole")
    trainer = trainer_of(
        "adamw",
        objective=Interrupted(MSE, 14),
        folder=tmp_path / "b",
        steps=STEPS,
        evaluate_every=2,
        evaluate_clock="steps",
        metrics_file=True,
    )
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    trainer.fit()
    assert differing(whole_state(whole), whole_state(trainer)) == []
    assert lines(tmp_path / "b") == lines(tmp_path / "whole")


def test_a_finished_run_that_is_started_again_keeps_its_results(tmp_path) -> None:
    first = run("adamw", tmp_path)
    written = lines(tmp_path)
    trainer = trainer_of("adamw", start=5, folder=tmp_path, steps=STEPS, metrics_file=True)
    stop = trainer.fit(resume="auto")
    assert stop.metrics == first.state.metrics
    assert stop.reason == "10 steps done"
    assert lines(tmp_path) == written


def test_patience_is_not_used_up_by_stopping() -> None:
    trainer = trainer_of("momentum", steps=1)
    state = trainer.state
    assert state.judge({"loss": 1.0})
    assert not state.judge({"loss": 1.0}, due=False)
    assert state.evaluations_without_best == 0
    assert not state.judge({"loss": 2.0})
    assert state.evaluations_without_best == 1
    assert state.judge({"loss": 0.5}, due=False)
    assert state.evaluations_without_best == 0


# What does not fit.


@pytest.fixture
def saved(tmp_path):
    run("adamw", tmp_path, metrics_file=False)
    return found(tmp_path)


def changed(path, change) -> None:
    state = store.load(path)
    change(state)
    shutil.rmtree(path)
    store.save(path, state)


def drop(*names):
    def change(state):
        inner = state
        for name in names[:-1]:
            inner = inner[name]
        del inner[names[-1]]

    return change


def put(value, *names):
    def change(state):
        inner = state
        for name in names[:-1]:
            inner = inner[name]
        inner[names[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (drop("model", "0.weight"), r"has no '0\.weight' \(1 missing\)"),
        (put(torch.ones(2), "model", "0.wieght"), r"'0\.wieght' \(1 left over\), .*: did you mean '0\.weight'"),
        (put(torch.ones(6, 4), "model", "0.weight"), r"'0\.weight' has shape \(6, 4\) there and \(6, 3\) in the model"),
        (put(torch.ones(6, 3).double(), "model", "0.weight"), r"'0\.weight' is float64 there and float32 in the model"),
        (put([], "optimizers"), "holds 0 optimizers, the run has 1"),
        (put([1], "optimizers", 0, "param_groups", 0, "params"), r"optimizer 0 hold \[1\] parameters there and \[6\]"),
        (put(torch.ones(5), "optimizers", 0, "state", 1, "exp_avg"), r"of parameter 1 of optimizer 0 has shape \(5,\)"),
        (put(torch.ones(6) / 0, "optimizers", 0, "state", 1, "exp_avg"), "'exp_avg' of .* for '0.bias' is not finite"),
        (put({}, "optimizers", 0, "state", 9), "has a state for parameter 9, which it does not hold"),
        (put(3, "optimizers"), "does not hold what it should"),
        (put(None, "model"), "does not hold what it should"),
        (put({}, "step"), "has no 'gradients': it was not written whole"),
        (put({"0.weight": torch.ones(2)}, "step", "gradients"), r"the saved gradient of '0\.weight' has shape \(2,\)"),
        (put({}, "rng"), "has no 'torch'"),
        (put({"torch": 3}, "rng"), "generators is none"),
        *[(drop(name), f"has no '{name}'") for name in ("model", "optimizers", "step", "rng", "run")],
        *[(drop("run", name), f"has no '{name}'") for name in ("epoch_began", "best")],
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(change, sentence, saved) -> None:
    changed(saved, change)
    trainer = trainer_of("adamw", steps=STEPS, folder=saved.parents[1])
    before = bits(contents.model_state(trainer.model))
    with pytest.raises(CheckpointError, match=sentence):
        trainer.fit(resume=saved)
    if not any(late in sentence for late in ("torch", "generators", "gradient")):
        assert bits(contents.model_state(trainer.model)) == before, "nothing was changed before all was checked"


def test_another_model_or_optimizer_is_named(saved) -> None:
    model = net()
    same = {"batch_size": 3, "accumulation_steps": 3, "clip_norm": 0.5, "console": False}
    two = [sgd(model[0].parameters(), lr=0.1), sgd(model[4].parameters(), lr=0.1)]
    with pytest.raises(CheckpointError, match="holds 1 optimizers, the run has 2"):
        Trainer(model, MSE, two, data=rows(4), steps=1, **same).fit(resume=saved)
    other = nn.Linear(3, 1)
    with pytest.raises(CheckpointError, match=r"has no 'weight' \(2 missing\)"):
        Trainer(other, MSE, sgd(other.parameters(), lr=0.1), data=rows(4), steps=1, **same).fit(resume=saved)


def test_a_third_partys_state_may_have_any_shape(tmp_path) -> None:
    class Ranked(torch.optim.Optimizer):
        """Keeps one number a row under a name that others give to a tensor of the parameter's shape."""

        def __init__(self, params) -> None:
            super().__init__(params, {"lr": 0.1})

        @torch.no_grad()
        def step(self, closure=None):
            for parameter in self.param_groups[0]["params"]:
                state = self.state[parameter]
                state["exp_avg"] = state.get("exp_avg", 0) + parameter.grad.reshape(len(parameter), -1).sum(1)
                parameter.sub_(0.1 * parameter.grad)

    for steps in (2, 3):
        torch.manual_seed(0)
        model = nn.Linear(3, 1)
        trainer = Trainer(
            model, MSE, Ranked(model.parameters()), data=rows(4), steps=steps, folder=tmp_path, console=False
        )
        trainer.fit(resume="auto")
    assert trainer.step.clocks.steps == 3


def test_an_optimizer_that_cannot_be_saved_is_named() -> None:
    class Stateless:
        param_groups: list = []

    with pytest.raises(CheckpointError, match=r"Stateless has no state_dict\(\): its state cannot be saved"):
        contents.optimizer_state(Stateless())


def test_resume_says_where_nothing_is(tmp_path) -> None:
    trainer = trainer_of("momentum", steps=1)
    with pytest.raises(ConfigError, match='resume="auto" needs the folder'):
        trainer.fit(resume="auto")
    with pytest.raises(CheckpointError, match="nothing is not there"):
        trainer.fit(resume=tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="holds no checkpoint: name one"):
        trainer.fit(resume=str(tmp_path))
    assert trainer_of("momentum", steps=1, folder=tmp_path).fit(resume="auto").reason == "1 step done"


def test_resume_from_a_folder_and_from_any_saved_file(tmp_path) -> None:
    run("momentum", tmp_path / "a", steps=4)
    for start in (tmp_path / "a", tmp_path / "a" / "last", str(tmp_path / "a" / "best"), found(tmp_path / "a")):
        trainer = trainer_of("momentum", start=9, steps=6)
        events = []
        trainer._loggers.start = events.append
        trainer.fit(resume=start)
        assert trainer.step.clocks.steps == 6
        assert events[0].resumed_from is not None
        assert events[0].clocks["steps"] <= 4


def test_a_checkpoint_needs_a_folder() -> None:
    model = nn.Linear(3, 1)
    step = Step(model, MSE, sgd(model.parameters(), lr=0.1))
    state = RunState(model, step, Settings(), None, {})
    with pytest.raises(ConfigError, match="there is no folder to save into"):
        state.save(LAST)
    assert state.files() == {}


def test_without_a_seed_every_run_has_an_order_of_its_own_that_is_kept(tmp_path) -> None:
    seeds = {trainer_of("momentum", seed=None, steps=1).state.order_seed for _ in range(5)}
    assert len(seeds) == 5
    first = trainer_of("momentum", seed=None, steps=2, folder=tmp_path)
    first.fit()
    second = trainer_of("momentum", seed=None, steps=3, folder=tmp_path)
    second.fit(resume="auto")
    assert second.state.order_seed == first.state.order_seed


def test_the_best_metric_must_be_among_the_metrics() -> None:
    trainer = trainer_of("momentum", steps=2, best_metric="eror")
    with pytest.raises(
        ConfigError, match="best.metric=eror is not among the metrics of the evaluation: did you mean 'error'"
    ):
        trainer.fit()


def test_the_best_is_the_least_or_the_most_and_never_a_nan() -> None:
    for mode, values, best in (("min", [3, math.nan, 2, 2, 5, 1], 1), ("max", [3, math.inf, 2, 3, 5, math.nan], 5)):
        state = trainer_of("momentum", steps=1, best_mode=mode, best_metric="error").state
        found = [state.judge({"loss": 0.0, "error": float(value)}) for value in values]
        assert found == (
            [True, False, True, False, False, True] if mode == "min" else [True, False, False, False, True, False]
        )
        assert state.best == ("error", best, 0)
