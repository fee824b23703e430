"""The run: limits, events, what is written and what is left alone."""

import copy
import dataclasses
import math
import traceback

import pytest
import torch
from runs import MSE, QUIET, Interrupted, Line, bits, error, lines, net, rows, saved, trainer_of
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from trainer import (
    CheckpointError,
    ConfigError,
    DataError,
    DivergedError,
    GradientError,
    Settings,
    Step,
    Trainer,
    rng,
    supervised,
)
from trainer.checkpoint import contents
from trainer.checkpoint.finished import MODEL
from trainer.checkpoint.folder import last
from trainer.checkpoint.run_state import BEST, LAST
from trainer.optim import Manual, sgd


class Watches:
    """A logger that remembers all five events, and ticks and flushes."""

    def __init__(self) -> None:
        self.events: list[tuple] = []

    def start(self, event) -> None:
        self.events.append(("start", event))

    def step(self, report, seconds) -> None:
        self.events.append(("step", report.clocks["windows"], report))
        assert seconds >= 0

    def evaluate(self, event, model) -> None:
        self.events.append(("evaluate", event.clocks["windows"], event, model))

    def skip(self, report) -> None:
        self.events.append(("skip", report.clocks["windows"], report))

    def stop(self, event) -> None:
        self.events.append(("stop", event))

    def tick(self) -> None:
        self.events.append(("tick",))

    def flush(self) -> None:
        self.events.append(("flush",))

    def at(self, name: str) -> list[int]:
        return [event[1] for event in self.events if event[0] == name]

    def names(self) -> list[str]:
        return [event[0] for event in self.events]


def simple(count: int = 8, **settings) -> Trainer:
    """One linear map, 8 rows in 4 micro-batches of 2."""
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    wanted = {**QUIET, "data": rows(count), "batch_size": 2, "seed": 0, **settings}
    optimizer = wanted.pop("optimizer", None) or sgd(model.parameters(), lr=0.05)
    return Trainer(model, wanted.pop("objective", MSE), optimizer, **wanted)


def with_limits(trainer: Trainer, **limits) -> Trainer:
    trainer.settings = dataclasses.replace(
        trainer.settings, limits=dataclasses.replace(trainer.settings.limits, **limits)
    )
    return trainer


# Limits.


@pytest.mark.parametrize(
    ("limits", "reason", "clocks"),
    [
        ({"epochs": 2}, "2 epochs done", {"epochs": 2, "windows": 8, "steps": 8, "rows": 16, "micro_batches": 8}),
        ({"steps": 3}, "3 steps done", {"epochs": 0, "windows": 3, "steps": 3, "rows": 6}),
        ({"steps": 4}, "4 steps done", {"epochs": 1, "windows": 4, "steps": 4, "rows": 8}),
        ({"rows": 9}, "9 rows done", {"epochs": 1, "windows": 5, "rows": 10}),
        ({"steps": 100, "epochs": 1}, "1 epoch done", {"epochs": 1, "steps": 4}),
        ({"steps": 3, "epochs": 1}, "3 steps done", {"epochs": 0, "steps": 3}),
        ({"steps": 0}, "0 steps done", {"windows": 0, "epochs": 0}),
        ({"epochs": 0}, "0 epochs done", {"windows": 0}),
        ({"steps": 3, "accumulation_steps": 3}, "3 steps done", {"micro_batches": 7, "windows": 3, "epochs": 1}),
    ],
)
def test_a_run_ends_at_the_first_limit_that_is_reached(limits, reason, clocks) -> None:
    stop = simple(**limits).fit()
    assert stop.reason == reason
    assert {name: stop.clocks[name] for name in clocks} == clocks
    assert stop.skips == 0


def test_a_run_ends_after_its_time() -> None:
    stop = simple(time=0.05).fit()
    assert stop.reason == "0.05 seconds are over"
    assert 0.05 <= stop.seconds < 5
    assert stop.clocks["steps"] > 1


def test_a_run_ends_when_patience_does() -> None:
    def noise(model, batch):
        return (model(batch[0]) * 0).sum() + (1.0 if len(seen) < 3 else 2.0) + 0 * len(seen.append(1) or seen)

    seen: list[int] = []
    stop = simple(objective=noise, evaluation_data=rows(2), epochs=50, patience=2, evaluate_every=1).fit()
    assert stop.reason == "no new best in 2 evaluations"
    assert stop.clocks["epochs"] == 3
    assert stop.best[:2] == ("loss", 2.0)


def test_a_run_without_a_limit_is_refused() -> None:
    with pytest.raises(
        ConfigError, match="no limit is set, so the run would never end: set limits.epochs, steps, rows"
    ):
        simple().fit()
    with pytest.raises(ConfigError, match="no limit is set"):
        simple(patience=3).fit()


@pytest.mark.parametrize("nonfinite", ["skip", "raise"])
def test_a_run_that_only_skips_has_diverged_and_its_last_checkpoint_is_left_alone(nonfinite, tmp_path) -> None:
    def sometimes(model, batch):
        loss = MSE(model, batch)
        return loss * math.nan if broken else loss

    broken = False
    watches = Watches()
    trainer = simple(
        objective=sometimes, folder=tmp_path, steps=3, skips_in_a_row=5, nonfinite=nonfinite, loggers=[watches]
    )
    trainer.fit()

    def files():
        return {
            path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and "captured" not in path.parts
        }

    before = files()
    parameters = bits(contents.model_state(trainer.model))
    broken = True
    with_limits(trainer, steps=100)
    sentence = (
        "5 steps in a row were skipped, the last because the loss of micro-batch 1 of 1 is nan: the run has diverged"
    )
    with pytest.raises(DivergedError, match=sentence if nonfinite == "skip" else "nonfinite=raise stops here"):
        trainer.fit()
    assert files() == before
    assert len(list((tmp_path / "captured").iterdir())) == (3 if nonfinite == "skip" else 1)
    assert bits(contents.model_state(trainer.model)) == parameters
    stop = watches.events[-1][1]
    assert stop.reason.startswith("stopped by DivergedError")
    assert stop.skips == (5 if nonfinite == "skip" else 1)
    if nonfinite == "skip":
        assert watches.at("skip") == [4, 5, 6, 7, 8]


def test_skips_that_are_not_in_a_row_do_not_end_a_run() -> None:
    seen: list[int] = []

    def every_other(model, batch):
        seen.append(1)
        return MSE(model, batch) * (math.inf if len(seen) % 2 else 1.0)

    watches = Watches()
    stop = simple(objective=every_other, steps=6, skips_in_a_row=2, loggers=[watches], log_every=1).fit()
    assert (stop.clocks["steps"], stop.clocks["windows"], stop.skips) == (6, 12, 6)
    assert watches.at("skip") == [1, 3, 5, 7, 9, 11]
    assert "inf" in watches.events[watches.names().index("skip")][2].reason


# Going on.


@pytest.mark.parametrize("steps", [1, 3, 4, 5, 7])
def test_fit_again_goes_on_exactly_where_it_stopped(steps) -> None:
    whole = trainer_of("adamw", steps=10)
    whole.fit()
    generators = bits(rng.capture())
    parts = trainer_of("adamw", steps=steps)
    parts.fit()
    # The seed counts when a run begins, not when it goes on.
    assert with_limits(parts, steps=10).fit().clocks == whole.step.clocks.as_dict()
    assert bits(rng.capture()) == generators
    assert bits(contents.model_state(parts.model)) == bits(contents.model_state(whole.model))
    assert with_limits(parts, steps=10).fit().reason == "10 steps done"


@pytest.mark.parametrize("forward", [1, 2, 4, 9])
def test_ctrl_c_gives_the_window_up_and_the_run_goes_on_as_if_nothing_was(forward, tmp_path) -> None:
    whole = trainer_of("adamw", steps=6)
    whole.fit()
    stopped = trainer_of("adamw", steps=6, objective=Interrupted(MSE, forward), folder=tmp_path)
    before = bits(contents.model_state(stopped.model))
    with pytest.raises(KeyboardInterrupt):
        stopped.fit()
    done = stopped.step.clocks.steps
    assert done == {1: 0, 2: 0, 4: 1, 9: 3}[forward]
    assert not stopped.step.is_torn
    assert (last(tmp_path) is not None) is (done > 0)
    if done:
        assert saved(tmp_path)["step"]["clocks"]["steps"] == done
        assert bits(saved(tmp_path)["model"]) == bits(contents.model_state(stopped.model))
    else:
        assert bits(contents.model_state(stopped.model)) == before
    stopped.fit()
    assert bits(contents.model_state(stopped.model)) == bits(contents.model_state(whole.model))


class CutOff(torch.optim.SGD):
    """Stopped by Ctrl-C with half of its parameters moved, in its n-th step."""

    left = 0

    def step(self, closure=None):
        super().step()
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


def test_a_step_that_was_cut_off_inside_the_update_is_not_saved(tmp_path) -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    two = [CutOff([model.weight], lr=0.1), torch.optim.SGD([model.bias], lr=0.1)]
    watches = Watches()
    trainer = Trainer(
        model, MSE, two, data=rows(8), batch_size=2, steps=10, seed=0, folder=tmp_path, loggers=[watches],
        checkpoint_every=2, checkpoint_clock="steps", **QUIET,
    )  # fmt: skip
    two[0].left = 5
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    state = saved(tmp_path)
    assert state["step"]["clocks"]["steps"] == 4
    assert not torch.equal(state["model"]["weight"], model.weight), "the parameters went on by half a step"
    assert not (tmp_path / MODEL).exists()
    assert watches.events[-1][1].reason == "stopped by Ctrl-C"
    with pytest.raises(GradientError, match="the last step was cut off while its parameters were being changed"):
        trainer.fit()
    assert saved(tmp_path)["step"]["clocks"]["steps"] == 4
    trainer.fit(resume="auto")
    torch.manual_seed(0)
    fresh = nn.Linear(3, 1)
    whole = [torch.optim.SGD([fresh.weight], lr=0.1), torch.optim.SGD([fresh.bias], lr=0.1)]
    Trainer(fresh, MSE, whole, data=rows(8), batch_size=2, steps=10, seed=0, **QUIET).fit()
    assert bits(contents.model_state(model)) == bits(contents.model_state(fresh))


def test_a_users_own_error_keeps_its_traceback_and_the_state_before_it_is_saved(tmp_path) -> None:
    def mine(model, batch):
        if trainer.step.clocks.steps == 2:
            raise LookupError("my own")
        return MSE(model, batch)

    watches = Watches()
    trainer = simple(objective=mine, folder=tmp_path, steps=5, loggers=[watches])
    with pytest.raises(LookupError, match="my own") as caught:
        trainer.fit()
    assert traceback.extract_tb(caught.value.__traceback__)[-1].name == "mine"
    assert watches.names()[-1] == "stop"
    assert watches.events[-1][1].reason == "stopped by LookupError"
    assert saved(tmp_path)["step"]["clocks"]["steps"] == 2


def test_an_error_in_the_data_inside_a_window_takes_no_part_of_it() -> None:
    class Breaks(TensorDataset):
        def __getitem__(self, row):
            if row == 5:
                raise OSError("the disk is gone")
            return super().__getitem__(row)

    trainer = simple(data=Breaks(*rows(8)), shuffle=False, batch_size=1, accumulation_steps=3, steps=9)
    with pytest.raises(OSError, match="the disk is gone"):
        trainer.fit()
    assert trainer.step.clocks.as_dict()["rows"] == 3


# Events.


def test_the_events_come_in_order_with_their_facts() -> None:
    watches = Watches()
    trainer = simple(
        epochs=2, accumulation_steps=3, evaluation_data=rows(5), metrics=error, loggers=[watches], log_every=2,
        recipe="mine", config={"a": 1}, clip_norm=1.0,
    )  # fmt: skip
    stop = trainer.fit()
    # Windows of 3 and 1 micro-batches; the first is logged at once, then every second.
    assert watches.names() == [
        "start", "tick", "step", "tick", "step", "evaluate", "tick", "tick", "step", "evaluate", "flush", "stop",
    ]  # fmt: skip
    assert watches.at("step") == [1, 2, 4]
    assert watches.at("evaluate") == [2, 4]
    start = watches.events[0][1]
    assert (start.recipe, start.config, start.model, start.parameters) == ("mine", {"a": 1}, "Linear", 4)
    assert (start.device, start.precision, start.total_windows) == (str(trainer._device), "fp32", 4)
    assert start.window == "window 3 × 2 rows = 6 rows, divided by elements"
    assert start.folder is start.resumed_from is None
    assert not any(start.clocks.values())
    evaluated, model = watches.events[5][2:]
    assert model is trainer.model
    assert list(evaluated.metrics) == ["loss", "error"]
    assert (evaluated.rows, evaluated.grad_mode, evaluated.best) == (5, "no_grad", True)
    assert evaluated.clocks["epochs"] == 1
    assert evaluated.seconds > 0
    assert watches.events[-1][1] is stop
    assert stop.metrics == watches.events[-3][2].metrics
    assert stop.files == {}
    assert stop.go_on is None
    assert watches.events[2][2].grad_norm > 0
    assert trainer.last_report is watches.events[8][2]


def test_the_last_report_is_logged_and_the_end_evaluated_once() -> None:
    watches = Watches()
    simple(
        steps=7, evaluation_data=rows(3), evaluate_every=3, evaluate_clock="steps", log_every=5, loggers=[watches]
    ).fit()
    assert watches.at("step") == [1, 5, 7]
    assert watches.at("evaluate") == [3, 6, 7]
    watches = Watches()
    simple(
        steps=6, evaluation_data=rows(3), evaluate_every=3, evaluate_clock="steps", log_every=3, loggers=[watches]
    ).fit()
    assert watches.at("step") == [1, 3, 6]
    assert watches.at("evaluate") == [3, 6]
    watches = Watches()
    simple(steps=6, evaluation_data=rows(3), evaluate_every=None, loggers=[watches]).fit()
    assert watches.at("evaluate") == [6]


@pytest.mark.parametrize(
    ("clock", "every", "at"),
    [
        ("steps", 3, [3, 6, 8]),
        ("windows", 3, [3, 6, 8]),
        ("micro_batches", 3, [2, 3, 5, 6, 8]),
        ("rows", 5, [2, 3, 4, 5, 7, 8]),
        ("epochs", 1, [2, 4, 6, 8]),
        ("epochs", 2, [4, 8]),
        ("tokens", 1, [8]),
    ],
)
def test_evaluation_and_saving_follow_every_clock(clock, every, at, tmp_path) -> None:
    watches = Watches()
    settings = {"evaluation_data": rows(2), "accumulation_steps": 2, "loggers": [watches], "epochs": 4}
    simple(evaluate_every=every, evaluate_clock=clock, **settings).fit()
    # 4 micro-batches of 2 rows an epoch, in windows of 2.
    assert watches.at("evaluate") == at
    trainer = simple(checkpoint_every=every, checkpoint_clock=clock, folder=tmp_path, **settings)
    saved = []
    save = trainer.state.save
    trainer.state.save = lambda name: saved.append((name, trainer.step.clocks.windows)) or save(name)
    trainer.fit()
    assert sorted({windows for name, windows in saved if name == LAST}) == at


def test_what_loggers_hold_is_written_before_a_checkpoint(tmp_path) -> None:
    watches = Watches()
    trainer = simple(steps=4, folder=tmp_path, checkpoint_every=2, checkpoint_clock="steps", loggers=[watches])
    save = trainer.state.save
    trainer.state.save = lambda name: watches.events.append(("save",)) or save(name)
    trainer.fit()
    names = watches.names()
    assert names.count("save") == 3
    assert all(names[index - 1] == "flush" for index, name in enumerate(names) if name == "save")


def test_every_logger_is_told_the_end_also_where_another_or_the_disk_fails(tmp_path) -> None:
    class Fails(Watches):
        def stop(self, event) -> None:
            raise OSError("no space")

    watches = Watches()
    with pytest.raises(OSError, match="no space"):
        simple(steps=1, loggers=[Fails(), watches]).fit()
    assert watches.names()[-1] == "stop"

    class Blocks(Watches):
        def step(self, report, seconds: float) -> None:
            (tmp_path / "checkpoints").write_text("")

    watches = Blocks()
    with pytest.raises(CheckpointError, match="step-000001 could not be written"):
        simple(steps=1, folder=tmp_path, loggers=[watches]).fit()
    assert watches.names()[-1] == "stop"
    assert (tmp_path / MODEL).exists(), "the model has a file of its own"


def test_a_logger_that_cannot_start_ends_the_run_and_the_others(tmp_path) -> None:
    class Fails(Watches):
        def start(self, event) -> None:
            raise OSError("no terminal")

    watches = Watches()
    with pytest.raises(OSError, match="no terminal"):
        simple(steps=1, loggers=[watches, Fails()]).fit()
    assert watches.names() == ["start", "flush", "stop"]


# What is written.


def test_nothing_is_written_without_a_folder(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = {"tensorboard": True, "metrics_file": True, "checkpoint_every": 1, "checkpoint_clock": "steps"}
    stop = simple(steps=3, evaluation_data=rows(2), **settings).fit()
    assert list(tmp_path.iterdir()) == []
    assert stop.files == {}


def test_what_lies_in_the_folder_at_the_end(tmp_path) -> None:
    trainer = simple(epochs=2, evaluation_data=rows(4), folder=tmp_path / "run", metrics_file=True, tensorboard=True)
    trainer.go_on = "the words"
    stop = trainer.fit()
    assert {name: path.name for name, path in stop.files.items()} == {
        "model": MODEL, "checkpoint": "step-000008", "best": "step-000008", "metrics": "metrics.jsonl",
        "tensorboard": "run",
    }  # fmt: skip
    assert stop.go_on == "the words"
    found = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert [name for name in found if not name.startswith("events.out.tfevents")] == sorted(
        [MODEL, "checkpoints", "gradient_norms.png", "metrics.jsonl"]
    )
    assert len(found) == 5
    assert [line["event"] for line in lines(tmp_path / "run")] == ["step", "evaluation", "step", "evaluation"]


def test_the_best_checkpoint_is_of_the_best_evaluation(tmp_path) -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    # A rate that makes the loss fall first and rise later.
    schedule = lambda count: 1.0 if count < 6 else -3.0  # noqa: E731
    watches = Watches()
    trainer = Trainer(
        model, MSE, Manual(model.parameters(), lr=0.05), data=rows(8), batch_size=8, steps=12, evaluation_data=rows(8),
        evaluate_every=1, evaluate_clock="steps", schedule=schedule, folder=tmp_path, loggers=[watches], **QUIET,
    )  # fmt: skip
    stop = trainer.fit()
    assert [event[2].best for event in watches.events if event[0] == "evaluate"] == [True] * 6 + [False] * 6
    assert stop.best[2] == 6
    trainer.load(tmp_path / BEST)
    assert trainer.evaluate()["loss"] == stop.best[1]
    assert saved(tmp_path)["run"]["best"] == stop.best


# What is left alone.


@pytest.mark.parametrize("data", ["tensors", "stream", "items"])
def test_without_a_seed_the_global_generators_are_untouched(data) -> None:
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(zip(*rows(8), strict=True))

    found = {"tensors": rows(8), "stream": Stream(), "items": TensorDataset(*rows(8))}[data]
    found = torch.utils.data.Subset(found, range(8)) if data == "items" else found
    trainer = simple(seed=None, data=found, epochs=3, evaluation_data=found)
    rng.seed_all(11)
    before = rng.capture()
    trainer.fit()
    trainer.evaluate()
    assert bits(rng.capture()) == bits(before)


def test_with_a_seed_a_run_is_the_same_whatever_was_drawn_before() -> None:
    found = []
    for other in (1, 2):
        trainer = trainer_of("adamw", steps=5)
        rng.seed_all(other)
        trainer.fit()
        found.append(bits(contents.model_state(trainer.model)))
    assert found[0] == found[1]
    other = trainer_of("adamw", steps=5, seed=4)
    other.fit()
    assert bits(contents.model_state(other.model)) != found[0]


def test_the_callers_objects_stay_the_callers() -> None:
    model = nn.Linear(3, 1)
    parameters = [id(parameter) for parameter in model.parameters()]
    optimizer = sgd(model.parameters(), lr=0.1)
    loader = DataLoader(TensorDataset(*rows(8)), batch_size=4)
    inputs, targets = rows(8)
    kept = inputs.clone(), targets.clone()
    trainer = Trainer(model, MSE, optimizer, data=loader, evaluation_data=(inputs, targets), steps=3, **QUIET)
    trainer.fit()
    assert trainer.model is model
    assert trainer.step.optimizers == [optimizer]
    assert [id(parameter) for parameter in model.parameters()] == parameters
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == parameters
    assert torch.equal(inputs, kept[0])
    assert torch.equal(targets, kept[1])


def test_evaluate_and_its_sentence_without_data() -> None:
    trainer = simple(evaluation_data=rows(7), metrics=error, evaluation_batch_size=3)
    before = bits(rng.capture()), bits(contents.model_state(trainer.model))
    inputs, targets = rows(7)
    outputs = trainer.model(inputs)
    assert trainer.evaluate() == {
        "loss": pytest.approx(nn.functional.mse_loss(outputs, targets).item(), rel=1e-6),
        "error": pytest.approx((outputs - targets).abs().mean().item(), rel=1e-6),
    }
    assert (bits(rng.capture()), bits(contents.model_state(trainer.model))) == before
    with pytest.raises(ConfigError, match="there is no evaluation data: give evaluation_data="):
        simple().evaluate()


def test_a_data_loader_as_evaluation_data_leaves_the_generators_alone() -> None:
    trainer = simple(evaluation_data=DataLoader(TensorDataset(*rows(7)), batch_size=3, shuffle=True))
    before = bits(rng.capture())
    trainer.evaluate()
    assert bits(rng.capture()) == before


def test_a_model_that_is_wholly_in_eval_is_put_in_train_and_a_line_says_so() -> None:
    for wholly in (True, False):
        watches = Watches()
        model = net()
        model.eval()
        if not wholly:
            model[4].train()
        Trainer(model, MSE, sgd(model.parameters(), lr=0.01), data=rows(8), steps=1, loggers=[watches], **QUIET).fit()
        said = "the model was wholly in eval mode: it was put in train mode." in watches.events[0][1].notes
        assert said is wholly
        assert model[1].training is wholly
    plain = Line()
    plain.norm.eval()
    Trainer(plain, MSE, Manual([plain.w], lr=0.1), data=rows(8), steps=1, **QUIET).fit()
    assert plain.norm.training


def test_an_optimizer_with_modes_is_put_in_train() -> None:
    class Modes(torch.optim.SGD):
        mode = "eval"

        def train(self):
            self.mode = "train"

        def eval(self):
            self.mode = "eval"

        def step(self, closure=None):
            if self.mode != "train":
                raise RuntimeError("not in train mode")
            super().step()

    model = nn.Linear(3, 1)
    trainer = Trainer(
        model, MSE, Modes(model.parameters(), lr=0.1), data=rows(8), epochs=2, evaluation_data=rows(4), **QUIET
    )
    assert trainer.fit().clocks["epochs"] == 2


# Kinds of training.


def test_accumulated_micro_batches_equal_the_large_batch_over_whole_epochs() -> None:
    """Row 9 and the issue's check, small: 197 rows in digits' shape, 16 × 4 in segments against 64, the same order."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.rand(197, 64, generator=generator, dtype=torch.float64)
    data = inputs, (inputs[:, :10] * 3).argmax(1)
    found = []
    for settings in (
        {"batch_size": 16, "accumulation_steps": 4, "activation_checkpointing": "segments"},
        {"batch_size": 64},
    ):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10)).double()
        start = copy.deepcopy(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        objective = supervised(nn.CrossEntropyLoss())
        stop = Trainer(
            model, objective, optimizer, data=data, seed=1, epochs=6, precision="fp64", **settings, **QUIET
        ).fit()
        # 197 rows end in a micro-batch of 5, in a window of 16 · 0 + 5 rows.
        assert (stop.clocks["steps"], stop.clocks["rows"]) == (24, 6 * 197)
        found.append(torch.cat([parameter.flatten() for parameter in model.parameters()]))
        assert (found[-1] - torch.cat([p.flatten() for p in start.parameters()])).abs().max() > 0.05
    assert (found[0] - found[1]).abs().max() <= 1e-9


def test_a_game_of_two_is_a_step_each_over_shared_windows() -> None:
    """A GAN in short: two Steps in a loop of one's own."""
    torch.manual_seed(0)
    generator, judge = nn.Linear(2, 3), nn.Linear(3, 1)
    both = nn.ModuleDict({"generator": generator, "judge": judge})
    bce = nn.functional.binary_cross_entropy_with_logits

    def judging(model, batch):
        fake = model["generator"](batch[0][:, :2]).detach()
        logits = model["judge"](torch.cat([batch[0], fake]))
        wanted = torch.cat([torch.ones(len(batch[0]), 1), torch.zeros(len(fake), 1)])
        return bce(logits, wanted)

    def fooling(model, batch):
        return bce(model["judge"](model["generator"](batch[0][:, :2])), torch.ones(len(batch[0]), 1))

    first = Step(both, judging, sgd(judge.parameters(), lr=0.1))
    second = Step(both, fooling, sgd(generator.parameters(), lr=0.1))
    before = [bits(part.state_dict()) for part in (generator, judge)]
    first([(rows(8)[0],)])
    assert bits(generator.state_dict()) == before[0]
    middle = bits(judge.state_dict())
    assert middle != before[1]
    second([(rows(8)[0],)])
    assert bits(judge.state_dict()) == middle
    assert bits(generator.state_dict()) != before[0]


def test_a_plain_object_trains_by_hand() -> None:
    model = Line()
    manual = Manual([model.w], lr=0.1)
    trainer = Trainer(model, MSE, manual, data=rows(32), batch_size=8, epochs=40, evaluation_data=rows(32), **QUIET)
    before = trainer.evaluate()["loss"]
    # It has no bias, so the mean of the targets stays.
    assert trainer.fit().metrics["loss"] < before / 4


@pytest.mark.parametrize("precision", ["fp64", "bf16"])
def test_precisions_end_to_end(precision, tmp_path) -> None:
    seen = set()

    def objective(model, batch):
        outputs = model(batch[0])
        seen.add((batch[0].dtype, outputs.dtype))
        return (outputs - batch[1]).square().mean()

    torch.manual_seed(0)
    dtype = torch.float64 if precision == "fp64" else torch.float32
    for data in (rows(24), DataLoader(TensorDataset(*rows(24)), batch_size=8), TensorDataset(*rows(24))):
        model = nn.Linear(3, 1)
        trainer = Trainer(
            model, objective, sgd(model.parameters(), lr=0.1), data=data, evaluation_data=data, batch_size=8, epochs=20,
            precision=precision, folder=tmp_path, seed=0, **QUIET,
        )  # fmt: skip
        stop = trainer.fit()
        assert stop.metrics["loss"] < 0.1
        assert all(parameter.dtype is dtype for parameter in model.parameters())
        assert saved(tmp_path)["model"]["weight"].dtype is dtype
    assert seen == {(torch.float64, torch.float64)} if precision == "fp64" else {(torch.float32, torch.bfloat16)}


def test_a_data_loader_says_what_resume_means_for_it() -> None:
    watches = Watches()
    loader = DataLoader(TensorDataset(*rows(8)), batch_size=4)
    simple(data=loader, steps=1, loggers=[watches]).fit()
    start = watches.events[0][1]
    assert any("the data's order is its own" in note for note in start.notes)
    assert start.window == "window 1 micro-batch, divided by elements"


# Refused.


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("device", ["cuda", "cuda:3"])
def test_a_device_that_is_not_here(device) -> None:
    with pytest.raises(
        ConfigError, match=f"device={device} is not here: torch sees no CUDA device. Choose device=cpu or auto"
    ):
        simple(device=device)


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="there is an MPS device")
def test_mps_where_it_is_not() -> None:
    with pytest.raises(ConfigError, match="device=mps is not here: torch sees no MPS device"):
        simple(device="mps")


def test_a_device_that_is_none() -> None:
    with pytest.raises(ConfigError, match="device='gpu' is no device: choose auto, cpu, cuda"):
        simple(device="gpu")


def test_settings_and_flat_keywords_are_not_mixed_and_misspelled_ones_named() -> None:
    with pytest.raises(ConfigError, match="Trainer got settings= and also steps, seed: give one or the other"):
        Trainer(None, MSE, None, data=None, settings=Settings(), steps=3, seed=1)
    with pytest.raises(ConfigError, match="Trainer has no setting 'step': did you mean 'steps'"):
        Trainer(None, MSE, None, data=None, step=3)


def test_data_that_is_empty_is_named() -> None:
    class Empty:
        def __iter__(self):
            return iter(())

    with pytest.raises(DataError, match="the data gave no micro-batch in a whole epoch: it is empty"):
        simple(data=Empty(), epochs=3).fit()
    with pytest.raises(DataError, match="the evaluation data gave no micro-batch"):
        simple(evaluation_data=[], epochs=1).fit()


def test_a_list_of_micro_batches_of_mappings() -> None:
    inputs, targets = rows(9)
    data = [{"x": inputs[:4], "y": targets[:4]}, {"x": inputs[4:], "y": targets[4:]}]

    def objective(model, batch):
        return (model(batch["x"]) - batch["y"]).square().mean()

    stop = simple(data=data, evaluation_data=data, objective=objective, accumulation_steps=2, epochs=60).fit()
    assert stop.clocks["rows"] == 9 * 60
    assert stop.metrics["loss"] < 0.1
