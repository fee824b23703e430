"""Every flat keyword of Trainer(...) reaches what it should; one without its test here turns the last test red."""

import itertools
import json
import math
import signal
import socket
import threading
import time

import pytest
import torch
from ranks import over_ranks
from runs import MSE, QUIET, bits, error, rows
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import Dataset

from trainer import CheckpointError, ConfigError, DataError, DivergedError, Sum, Trainer, WrongGradientError
from trainer.checkpoint import contents, folder, store
from trainer.checkpoint.folder import listed
from trainer.data import order
from trainer.diagnose.capture import captured
from trainer.errors import GradientError, TrainerError, TrainerWarning
from trainer.optim import sgd
from trainer.settings import flat_names

TRIED: set[str] = set()


def tries(*names):
    """Marks a test as the one that proves these keywords."""
    TRIED.update(names)
    return lambda test: test


class Sees:
    """An objective that remembers the rows of its micro-batches in training."""

    def __init__(self, factor: float = 1.0) -> None:
        self.batches: list[list[float]] = []
        self.evaluated: list[int] = []
        self.modes: list[tuple[bool, bool]] = []
        self.factor = factor

    def __call__(self, model, batch):
        value = (model(batch[0]) - batch[1]).square().mean() * self.factor
        if model.training:
            self.batches.append(batch[0][:, 0].tolist())
        else:
            self.evaluated.append(len(batch[0]))
            self.modes.append((value.requires_grad, value.is_inference()))
        return value


class Hears:
    def __init__(self) -> None:
        self.steps: list[int] = []
        self.evaluations: list[int] = []
        self.bests: list[bool] = []
        self.norms: list = []
        self.scales: list = []

    def start(self, event) -> None:
        self.started = event

    def step(self, report, seconds) -> None:
        self.steps.append(report.clocks["windows"])
        self.norms.append((report.grad_norm, report.clip_factor, report.loss))
        self.scales.append(report.loss_scale)

    def evaluate(self, event, model) -> None:
        self.evaluations.append(event.clocks["windows"])
        self.bests.append(event.best)

    def skip(self, report) -> None: ...

    def stop(self, event) -> None:
        self.stopped = event


def made(objective=MSE, count: int = 10, **flat) -> tuple[Trainer, Hears]:
    torch.manual_seed(0)
    hears = Hears()
    dtype = torch.float64 if flat.get("precision") == "fp64" else torch.float32
    model = flat.pop("model", None) or nn.Linear(3, 1, dtype=dtype)
    optimizer = flat.pop("optimizer", None) or sgd(model.parameters(), lr=0.1)
    flat = {**QUIET, "seed": 0, "batch_size": 2, "data": rows(count), "steps": 5, "log_every": 1, **flat}
    return Trainer(model, objective, optimizer, loggers=[hears], **flat), hears


def flat(batches: list[list[float]]) -> list[float]:
    return list(itertools.chain.from_iterable(batches))


def moved(trainer: Trainer) -> torch.Tensor:
    trainer.fit()
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


@tries("seed")
def test_seed() -> None:
    sees = Sees()
    made(sees, seed=7)[0].fit()
    inputs = rows(10)[0][:, 0]
    assert flat(sees.batches) == inputs[order(7, 0, 0, 10)].tolist()


@tries("device")
def test_device() -> None:
    model = nn.Linear(3, 1)
    trainer, hears = made(model=model, device="cpu")
    trainer.fit()
    assert hears.started.device == "cpu"
    with pytest.raises(ConfigError, match="device='nowhere' is no device"):
        made(device="nowhere")


@tries("precision")
def test_precision() -> None:
    seen = []

    def objective(model, batch):
        outputs = model(batch[0])
        seen.append(outputs.dtype)
        return (outputs - batch[1]).square().mean()

    for precision in ("fp32", "bf16", "bf16_true", "fp16", "fp64"):
        made(objective, precision=precision, steps=1, loss_scale=1.0)[0].fit()
    assert seen == [torch.float32, torch.bfloat16, torch.bfloat16, torch.float16, torch.float64]


@tries("accumulate_in", "master_parameters")
def test_accumulate_in_and_master_parameters() -> None:
    for flat, kept, held in (
        ({}, torch.float32, torch.bfloat16),
        ({"accumulate_in": "parameter"}, *[torch.bfloat16] * 2),
        ({"master_parameters": True}, *[torch.float32] * 2),
    ):
        model = nn.Linear(3, 1)
        trainer, _ = made(
            lambda m, b: (m(b[0]) - b[1]).float().square().mean(), model=model, precision="bf16_true", **flat
        )
        trainer.fit()
        assert model.weight.dtype is torch.bfloat16
        assert model.weight.grad.dtype is kept
        assert trainer.step.optimizers[0].param_groups[0]["params"][0].dtype is held


@tries("loss_scale", "loss_scale_interval")
def test_loss_scale_and_loss_scale_interval() -> None:
    trainer, hears = made(precision="fp16", loss_scale=4.0, loss_scale_interval=2, steps=5)
    trainer.fit()
    assert hears.scales == [4.0, 4.0, 8.0, 8.0, 16.0]
    trainer, hears = made(loss_scale=4.0)
    trainer.fit()
    assert set(hears.scales) == {None}


@tries("tf32")
def test_tf32() -> None:
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32 = False
        made(tf32=False)
        assert not torch.backends.cuda.matmul.allow_tf32
        made(tf32=True)
        assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@tries("accumulation_steps", "batch_size", "steps")
def test_accumulation_steps_batch_size_and_steps() -> None:
    sees = Sees()
    trainer, _ = made(sees, accumulation_steps=3, batch_size=2, steps=4)
    trainer.fit()
    # 10 rows are 5 micro-batches: windows of 3 and 2.
    assert [len(batch) for batch in sees.batches] == [2] * 10
    assert trainer.step.clocks.as_dict() == {
        "micro_batches": 10, "windows": 4, "epochs": 2, "steps": 4, "rows": 20, "tokens": 0,
    }  # fmt: skip
    sees = Sees()
    made(sees, batch_size=4, steps=3)[0].fit()
    assert [len(batch) for batch in sees.batches] == [4, 4, 2]


@tries("reduction")
def test_reduction() -> None:
    data = rows(3, torch.float64)
    found = {}
    for reduction in ("mean", "sum", "micro_batches"):
        model = nn.Linear(3, 1, bias=False, dtype=torch.float64)
        with torch.no_grad():
            model.weight.zero_()
        flat = {"data": data, "batch_size": 2, "accumulation_steps": 2, "steps": 1, "shuffle": False}
        found[reduction] = moved(made(model=model, reduction=reduction, **flat)[0])
    by_row = 0.1 * 2 * data[1] * data[0]  # at zero weights, times the learning rate
    assert torch.allclose(found["mean"], by_row.mean(0), atol=1e-12)
    assert torch.allclose(found["sum"], by_row.sum(0), atol=1e-12)
    assert torch.allclose(found["micro_batches"], (by_row[:2].mean(0) + by_row[2]) / 2, atol=1e-12)


@tries("zero_grad")
def test_zero_grad() -> None:
    gradients = {}
    for zero_grad in ("set_to_none", "zeros", "never"):
        model = nn.Linear(3, 1)
        trainer, _ = made(
            model=model, optimizer=sgd(model.parameters(), lr=0.0), batch_size=10, steps=3, zero_grad=zero_grad
        )
        held = []
        trainer._loggers.loggers[0].step = lambda report, seconds, m=model, h=held: h.append(m.weight.grad)
        trainer.fit()
        gradients[zero_grad] = held
    assert torch.allclose(gradients["never"][-1], 3 * gradients["zeros"][-1], rtol=1e-5)
    assert torch.equal(gradients["zeros"][-1], gradients["set_to_none"][-1])
    assert len({id(gradient) for gradient in gradients["zeros"]}) == 1
    assert len({id(gradient) for gradient in gradients["set_to_none"]}) == 3


@tries("clip_norm", "clip_value", "clip_adaptive", "norm_order")
def test_clips_and_the_order_of_the_norm() -> None:
    trainer, hears = made()
    trainer.fit()
    assert all(norm > 0.01 and factor is None for norm, factor, _ in hears.norms)
    trainer, hears = made(clip_norm=0.01)
    trainer.fit()
    for norm, factor, _ in hears.norms:
        assert norm * factor == pytest.approx(0.01)
    trainer, _ = made(clip_value=0.003, steps=1)
    trainer.fit()
    assert trainer.model.weight.grad.abs().max() == pytest.approx(0.003)
    model = nn.Linear(3, 1)
    before = model.weight.detach().norm().item()
    made(model=model, clip_adaptive=0.01, steps=1)[0].fit()
    assert model.weight.grad.norm() == pytest.approx(0.01 * before, rel=1e-5)
    norms = {}
    for kind in (1, 2.0, math.inf, "inf"):
        trainer, hears = made(norm_order=kind, steps=1, clip_norm=1e6)
        trainer.fit()
        gradient = torch.cat([parameter.grad.flatten() for parameter in trainer.model.parameters()])
        norms[kind] = hears.norms[0][0]
        assert norms[kind] == pytest.approx(gradient.norm(float(kind)).item())
    assert norms[1] > norms[2.0] > norms[math.inf] == norms["inf"]
    with pytest.raises(ConfigError, match="clip_norm and clip_value are both set"):
        made(clip_norm=1.0, clip_value=1.0)
    for kind in (0, -1, math.nan, "two"):
        with pytest.raises(ConfigError, match="norm_order=.* is not possible"):
            made(norm_order=kind)


@tries("nonfinite", "skips_in_a_row")
def test_nonfinite_and_skips_in_a_row() -> None:
    trainer, _ = made(Sees(math.nan), skips_in_a_row=3)
    before = bits(contents.model_state(trainer.model))
    with pytest.raises(DivergedError, match="3 steps in a row were skipped"):
        trainer.fit()
    assert (trainer.step.clocks.windows, trainer.step.clocks.steps) == (3, 0)
    assert bits(contents.model_state(trainer.model)) == before
    with pytest.raises(DivergedError, match="step 1 was not taken"):
        made(Sees(math.nan), nonfinite="raise")[0].fit()
    assert made(Sees(math.nan), nonfinite="allow")[0].fit().clocks["steps"] == 5


@tries("coefficients")
def test_coefficients() -> None:
    def objective(model, batch):
        return {"a": (model(batch[0]) - batch[1]).square().mean(), "b": model.weight.square().sum()}

    found = []
    for coefficients in ({}, {"b": 0.0}, {"b": 7.0}):
        trainer, _ = made(objective, coefficients=coefficients, evaluation_data=rows(4), steps=1)
        stop = trainer.fit()
        assert stop.metrics["loss"] == pytest.approx(stop.metrics["a"] + coefficients.get("b", 1.0) * stop.metrics["b"])
        found.append(bits(contents.model_state(trainer.model)))
    assert found[0] != found[1] != found[2]


@tries("shuffle", "drop_last", "workers")
def test_shuffle_drop_last_and_workers() -> None:
    inputs = rows(10)[0][:, 0].tolist()
    sees = Sees()
    made(sees, shuffle=False, steps=5)[0].fit()
    assert flat(sees.batches) == inputs
    sees = Sees()
    made(sees, drop_last=True, batch_size=4, steps=4)[0].fit()
    assert [len(batch) for batch in sees.batches] == [4] * 4
    processes = set()

    class Items(torch.utils.data.Dataset):
        def __len__(self):
            return 10

        def __getitem__(self, row):
            worker = torch.utils.data.get_worker_info()
            return torch.tensor([float(-1 if worker is None else worker.id), row, 0.0]), torch.zeros(1)

    for workers in (0, 2):
        sees = Sees()
        made(sees, data=Items(), workers=workers, steps=5)[0].fit()
        processes.add(tuple(sorted(set(flat(sees.batches)))))
    assert processes == {(-1.0,), (0.0, 1.0)}


@tries("evaluation_batch_size", "evaluate_every", "evaluate_clock", "grad_mode")
def test_evaluation() -> None:
    for mode, expected in (("no_grad", (False, False)), ("inference_mode", (False, True)), ("enabled", (True, False))):
        sees = Sees()
        trainer, hears = made(
            sees,
            evaluation_data=rows(7),
            evaluation_batch_size=5,
            evaluate_every=2,
            evaluate_clock="windows",
            grad_mode=mode,
        )
        trainer.fit()
        assert hears.evaluations == [2, 4, 5]
        assert sees.evaluated == [5, 2] * 3
        assert set(sees.modes) == {expected}


@tries("activation_checkpointing", "segments", "segment_modules", "verify_recompute")
def test_activation_checkpointing() -> None:
    counts = {}

    class Counted(nn.Linear):
        def forward(self, x):
            counts["forwards"] += 1
            return super().forward(x)

    for settings, forwards in (
        ({}, 4),
        ({"activation_checkpointing": "none"}, 4),
        ({"activation_checkpointing": "segments"}, 8),
        ({"activation_checkpointing": "segments", "segments": 4}, 8),
        ({"activation_checkpointing": "segments", "segment_modules": ["1", "2"]}, 6),
    ):
        counts["forwards"] = 0
        model = nn.Sequential(Counted(3, 4), Counted(4, 4), Counted(4, 4), Counted(4, 1))
        trainer, _ = made(model=model, steps=1, **settings)
        trainer.fit()
        assert counts["forwards"] == forwards, settings
        if "segments" in settings:
            assert len(trainer.step._segments.cuts[0].parts) == 4

    class Counting(nn.Linear):
        def forward(self, x):
            counts["forwards"] += 1
            return super().forward(x) * counts["forwards"]

    model = nn.Sequential(Counting(3, 4), nn.Tanh(), nn.Linear(4, 1))
    trainer, _ = made(model=model, steps=1, activation_checkpointing="segments", segments=1, verify_recompute=True)
    with pytest.raises(GradientError, match="comes out otherwise than in forward, first by mul"):
        trainer.fit()


@tries("epochs", "rows", "time")
def test_epochs_rows_and_time() -> None:
    assert made(steps=None, epochs=3)[0].fit().reason == "3 epochs done"
    assert made(steps=None, rows=7)[0].fit().clocks["rows"] == 8
    assert made(steps=None, time=0.01)[0].fit().reason == "0.01 seconds are over"


@tries("patience", "best_metric", "best_mode")
def test_patience_best_metric_and_best_mode() -> None:
    values = [3.0, 1.0, 5.0, 2.0, 4.0, 4.0, 4.0, 4.0]
    for mode, best, evaluations in (("min", 1.0, 4), ("max", 5.0, 5)):
        left = iter(values)

        def metric(model, batch, left=left):
            return {"mine": Sum(torch.tensor(next(left)), 1)}

        trainer, hears = made(
            steps=None,
            epochs=8,
            evaluation_data=rows(2),
            metrics=metric,
            patience=2,
            best_metric="mine",
            best_mode=mode,
        )
        stop = trainer.fit()
        assert stop.best[:2] == ("mine", best)
        assert stop.reason == "no new best in 2 evaluations"
        assert len(hears.evaluations) == evaluations


@tries("log_every", "log_clock")
def test_log_every_and_log_clock() -> None:
    trainer, hears = made(log_every=2)
    trainer.fit()
    assert hears.steps == [1, 2, 4, 5]
    trainer, hears = made(log_every=6, log_clock="rows")
    trainer.fit()
    assert hears.steps == [1, 3, 5]


@tries("log_axis", "layer_norms", "histograms")
def test_what_tensorboard_shows(tmp_path) -> None:
    shown = {"tensorboard": True, "log_axis": "rows", "layer_norms": 2, "histograms": 4}
    made(folder=tmp_path, evaluation_data=rows(4), **shown)[0].fit()
    found = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    assert [event.step for event in found.Scalars("loss/total")] == [2, 4, 6, 8, 10]
    assert [event.step for event in found.Scalars("eval/loss")] == [10]
    assert [event.step for event in found.Scalars("gradient_norm/weight")] == [2, 4, 8]
    assert [event.step for event in found.Tensors("parameters/bias")] == [2, 8]
    whole = zip(*(found.Scalars(f"gradient_norm/{name}") for name in ("weight", "bias")), strict=True)
    norms = {event.step: event.value for event in found.Scalars("gradient/norm")}
    for weight, bias in whole:
        assert math.hypot(weight.value, bias.value) == pytest.approx(norms[weight.step], rel=1e-5)


@tries("heat_map")
def test_the_heat_map(tmp_path) -> None:
    for name, settings in {"on": {}, "off": {"heat_map": False}, "no_audit": {"audit": False}}.items():
        made(folder=tmp_path / name, tensorboard=True, **settings)[0].fit()
        shown = EventAccumulator(str(tmp_path / name)).Reload().Tags()["tensors"]
        assert ("gradient/by_layer" in shown) == (name != "off") == (tmp_path / name / "gradient_norms.png").exists()


@tries("console", "tensorboard", "metrics_file")
def test_the_loggers_that_are_asked_for(tmp_path, capsys) -> None:
    made(folder=tmp_path / "none")[0].fit()
    assert not capsys.readouterr().err + capsys.readouterr().out
    assert not [path for path in (tmp_path / "none").iterdir() if path.name not in ("checkpoints", "model.safetensors")]
    made(folder=tmp_path / "metrics", metrics_file=True)[0].fit()
    assert len((tmp_path / "metrics" / "metrics.jsonl").read_text().splitlines()) == 5
    assert json.loads((tmp_path / "metrics" / "metrics.jsonl").read_text().splitlines()[0])["steps"] == 1
    made(folder=tmp_path / "board", tensorboard=True)[0].fit()
    assert list((tmp_path / "board").glob("events.out.tfevents*"))
    made(console=True)[0].fit()
    said = capsys.readouterr()
    assert "window 2 rows" in said.out + said.err


@tries("checkpoint_every", "checkpoint_clock", "checkpoint_last", "checkpoint_best")
def test_checkpoints(tmp_path) -> None:
    trainer, _ = made(folder=tmp_path / "every", checkpoint_every=2, checkpoint_clock="windows")
    saved = []
    save = trainer.state.save
    trainer.state.save = lambda name: saved.append(trainer.step.clocks.windows) or save(name)
    trainer.fit()
    assert saved == [2, 4, 5]
    # It stops at step 5, which is where the last evaluation is, and the best.
    for name, settings, there, best in (
        ("both", {}, ["step-000005"], "step-000005"),
        ("no last", {"checkpoint_last": False}, ["step-000005"], "step-000005"),
        ("no best", {"checkpoint_best": False}, ["step-000005"], None),
        ("none", {"checkpoint_best": False, "checkpoint_last": False}, [], None),
    ):
        made(folder=tmp_path / name, evaluation_data=rows(4), metrics=error, **settings)[0].fit()
        assert [one.path.name for one in listed(tmp_path / name)] == there
        found = folder.best(tmp_path / name)
        assert (found and found.name) == best
        assert {path.name for path in (tmp_path / name).iterdir()} == {"model.safetensors"} | (
            {"checkpoints"} if there else set()
        )


@tries("checkpoint_keep_last", "checkpoint_keep_best", "checkpoint_keep_every")
def test_checkpoints_that_stay(tmp_path) -> None:
    every = {"checkpoint_every": 1, "checkpoint_clock": "steps", "steps": 8, "checkpoint_best": False}
    for name, settings, steps in (
        ("default", {}, [7, 8]),
        ("all", {"checkpoint_keep_last": None}, [1, 2, 3, 4, 5, 6, 7, 8]),
        ("one", {"checkpoint_keep_last": 1}, [8]),
        ("every", {"checkpoint_keep_last": 1, "checkpoint_keep_every": 3}, [3, 6, 8]),
    ):
        made(folder=tmp_path / name, **every, **settings)[0].fit()
        assert [one.manifest.clocks["steps"] for one in listed(tmp_path / name)] == steps, name
    falling = {**every, "checkpoint_best": True, "checkpoint_every": None, "checkpoint_last": False}
    falling |= {"evaluation_data": rows(4), "evaluate_every": 1, "evaluate_clock": "steps", "checkpoint_keep_last": 1}
    for count in (0, 1, 3):
        trainer, hears = made(folder=tmp_path / f"best {count}", **falling, checkpoint_keep_best=count)
        trainer.fit()
        bests = [step for step, is_best in enumerate(hears.bests, start=1) if is_best]
        assert len(bests) > 3
        there = [one.manifest.clocks["steps"] for one in listed(tmp_path / f"best {count}")]
        assert there == bests[-max(count, 1) :], count


@tries("checkpoint_background", "checkpoint_on_error")
def test_a_checkpoint_is_written_on_a_thread_and_its_failure_stops_the_run_or_not(tmp_path, monkeypatch) -> None:
    threads = []
    write = store.write
    monkeypatch.setattr(store, "write", lambda *words: threads.append(threading.current_thread().name) or write(*words))
    for background in (True, False):
        made(folder=tmp_path / str(background), checkpoint_background=background)[0].fit()
    assert threads == ["checkpoint", "MainThread"]

    def full(path, taken, label):
        if label.clocks["steps"] == 2:
            raise store.failed(path, OSError(28, "No space left on device"), taken.size)
        return write(path, taken, label)

    monkeypatch.setattr(store, "write", full)
    every = {"checkpoint_every": 1, "checkpoint_clock": "steps"}
    for background in (True, False):
        settings = {**every, "checkpoint_background": background}
        trainer = made(folder=tmp_path / f"stop {background}", **settings)[0]
        with pytest.raises(CheckpointError, match="step-000002 could not be written .* it needs .* bytes"):
            trainer.fit()
        assert trainer.step.clocks.steps < 5
        trainer = made(folder=tmp_path / f"warn {background}", checkpoint_on_error="warn", **settings)[0]
        with pytest.warns(TrainerWarning, match="step-000002 could not be .* Training goes on"):
            trainer.fit()
        assert [one.manifest.clocks["steps"] for one in listed(tmp_path / f"warn {background}")] == [4, 5]


@tries("noise_scale")
def test_the_noise_scale(tmp_path) -> None:
    data = tuple(torch.cat([tensor] * 20) for tensor in rows(6))
    settings = {**QUIET, "batch_size": 4, "accumulation_steps": 3, "epochs": 2, "log_every": 5, "noise_scale": 2}
    watched = {"tensorboard": True, "metrics_file": True, "folder": tmp_path}
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    stop = Trainer(model, MSE, sgd(model.parameters(), lr=1e-3), data=data, seed=0, **{**settings, **watched}).fit()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    found = [line["measured"]["gradient/noise_scale"] for line in lines if line.get("measured")]
    assert found
    assert all(value > 0 for value in found)
    shown = EventAccumulator(str(tmp_path)).Reload().Scalars("gradient/noise_scale")
    assert [event.value for event in shown] == pytest.approx(found)
    assert any(words.startswith("noise scale ") for words in stop.health)
    with pytest.raises(ConfigError, match="here a window is one micro-batch: set gradient.accumulation_steps to 2"):
        Trainer(model, MSE, sgd(model.parameters(), lr=1e-3), data=data, noise_scale=2, **QUIET)


@tries("term_gradients")
def test_the_gradients_of_terms(tmp_path, capsys) -> None:
    def objective(model, batch):
        return {"up": (model(batch[0]) - 9.0).square().mean(), "down": (model(batch[0]) + 9.0).square().mean()}

    watched = {"tensorboard": True, "metrics_file": True, "console": True, "folder": tmp_path, "log_every": 2}
    found = []
    for settings in ({"term_gradients": 2, **watched}, {}):
        torch.manual_seed(0)
        model = nn.Linear(3, 1)
        optimizer = sgd(model.parameters(), lr=1e-3)
        trainer = Trainer(model, objective, optimizer, data=rows(24), seed=0, **{**QUIET, "steps": 9, **settings})
        stop = trainer.fit()
        found.append((bits(contents.model_state(model)), stop.health))
    assert found[0][0] == found[1][0]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["event"] == "step" and "measured" in line]
    assert [line["steps"] for line in steps] == [1, 2, 4, 6, 8]
    assert all(set(line["measured"]) == {"terms/up/norm", "terms/down/norm", "terms/down·up/cosine"} for line in steps)
    shown = EventAccumulator(str(tmp_path)).Reload().Scalars("terms/down·up/cosine")
    assert [event.value for event in shown] == pytest.approx([one["measured"]["terms/down·up/cosine"] for one in steps])
    said = [line["text"] for line in lines if line["event"] == "found" and "against each other" in line["text"]]
    assert len(said) == 1 and "the terms 'down' and 'up' pull against each other" in said[0]
    assert f"found: {said[0]}" in capsys.readouterr().out
    assert any("terms 'down' and 'up' against each other (cosine -" in words for words in found[0][1])
    with pytest.raises(ConfigError, match="names none: return"):
        Trainer(model, MSE, optimizer, data=rows(6), term_gradients=2, **QUIET)


@tries("source_gradients")
def test_the_gradients_of_sources(tmp_path) -> None:
    class Rows(Dataset):
        def __len__(self):
            return 24

        def __getitem__(self, row):
            return {"x": rows(24)[0][row], "source": "web" if row % 3 else "book"}

    def objective(model, batch):
        return model(batch["x"]).square().mean()

    model = nn.Linear(3, 1)
    optimizer = sgd(model.parameters(), lr=1e-3)
    settings = {**QUIET, "metrics_file": True, "folder": tmp_path, "log_every": 2, "steps": 4}
    Trainer(model, objective, optimizer, data=Rows(), source_gradients=2, **settings).fit()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    tags = [set(line["measured"]) for line in lines if line.get("measured")]
    assert tags == [{"sources/web/norm", "sources/book/norm", "sources/book·web/cosine"}] * 3
    with pytest.raises(ConfigError, match="nothing looks at them: set diagnose.source_gradients"):
        Trainer(model, objective, optimizer, data=Rows(), sources=lambda batch: "all", **QUIET)


@tries("update_ratio")
def test_the_update_ratio(tmp_path) -> None:
    stop = made(folder=tmp_path, tensorboard=True, update_ratio=2, log_every=2)[0].fit()
    found = EventAccumulator(str(tmp_path)).Reload()
    for tag in ("optimizer/update_ratio", "update_ratio/weight"):
        events = found.Scalars(tag)
        assert [event.step for event in events] == [1, 2, 4]
        assert all(0 < event.value < 1 for event in events)
    assert stop.health[1].startswith("a step moves the parameters by ")


class Roots(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return (x * self.w).sqrt().sum(-1, keepdim=True)  # NaN where x is negative, as some row in each window is


@tries("capture")
@pytest.mark.parametrize(("capture", "count"), [("none", 0), ("nonfinite", 3), ("all", 3)])
def test_captured_windows(tmp_path, capture, count) -> None:
    model = Roots()
    settings = {**QUIET, "batch_size": 6, "epochs": 5, "capture": capture, "folder": tmp_path}
    Trainer(model, MSE, sgd(model.parameters(), lr=0.1), data=rows(6), **settings).fit()
    assert len(captured(tmp_path)) == count


@tries("capture_at", "capture_most", "capture_mib")
@pytest.mark.parametrize(
    ("settings", "windows"),
    [
        ({"capture_at": 3, "capture": "none"}, [3]),
        ({"capture_most": 2, "nonfinite": "skip"}, [1, 2]),
        ({"capture_mib": 1e-6}, []),
    ],
)
def test_which_windows_are_captured(tmp_path, settings, windows) -> None:
    model = nn.Linear(3, 1) if "capture_at" in settings else Roots()
    settings = {**QUIET, "batch_size": 6, "epochs": 5, "folder": tmp_path, **settings}
    Trainer(model, MSE, sgd(model.parameters(), lr=0.1), data=rows(6), **settings).fit()
    assert [int(path.name.removeprefix("window-")) for path in captured(tmp_path)] == windows


@tries("audit")
@pytest.mark.parametrize("audit", [True, False])
def test_the_audit(tmp_path, capsys, audit) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"used": nn.Linear(3, 1), "forgotten": nn.Linear(3, 1)})
    step = {"data": rows(6), "steps": 3, **QUIET, "console": True, "metrics_file": True, "tensorboard": True}
    optimizer = sgd(model.parameters(), lr=0.1)
    stop = Trainer(model, lambda m, pair: MSE(m["used"], pair), optimizer, folder=tmp_path, audit=audit, **step).fit()
    said = "no gradient reached 'forgotten.weight', 'forgotten.bias': no operation of the forward used it."
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["text"], line["steps"]) for line in lines if line["event"] == "found"] == [(said, 1)] * audit
    shown = capsys.readouterr().out
    assert (f"found: {said}" in shown) == audit
    assert ("  gradient health: not well: first step\n    first step: no gradient reached" in shown) == audit
    assert [line[:10] for line in stop.health] == (["not well: ", "first step", "median nor"] if audit else [])
    found = EventAccumulator(str(tmp_path)).Reload()
    assert ("found/text_summary" in found.Tags()["tensors"]) == audit


@tries("grace")
@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="signals of POSIX")
def test_grace(tmp_path) -> None:
    def hangs(model, batch):
        signal.raise_signal(signal.SIGTERM)
        time.sleep(20)

    for grace in (0.1, 1.0):
        torch.manual_seed(0)
        model = nn.Linear(3, 1)
        trainer = Trainer(
            model, hangs, sgd(model.parameters(), lr=0.1), data=rows(4), steps=1, folder=tmp_path, grace=grace, **QUIET
        )
        began = time.monotonic()
        with pytest.raises(SystemExit):
            trainer.fit()
        assert grace <= time.monotonic() - began < 10


@tries("check")
def test_check_first_step() -> None:
    trainer, hears = made(check="first_step")
    trainer.fit()
    plain, _ = made()
    plain.fit()
    assert trainer.step.clocks.steps == 5
    assert all(torch.equal(a, b) for a, b in zip(trainer.model.parameters(), plain.model.parameters(), strict=True))
    mixes = lambda model, micro_batch: model(micro_batch[0]).mean() ** 2  # noqa: E731
    trainer, hears = made(mixes, check="first_step", accumulation_steps=2)
    with pytest.raises(WrongGradientError, match="WRONG GRADIENT: accumulation_steps in the objective"):
        trainer.fit()
    assert hears.steps == []


class Hangs(Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, row: int):
        time.sleep(60)


@tries("timeout")
def test_timeout() -> None:
    model = nn.Linear(3, 1)
    optimizer = sgd(model.parameters(), lr=0.1)
    trainer = Trainer(model, MSE, optimizer, data=Hangs(), steps=1, workers=1, timeout=1.5, **QUIET)
    with pytest.raises(DataError, match=r"data\.timeout=1\.5"):
        trainer.fit()


def several(rank, world, **settings):
    trainer, hears = made(distributed="ddp", **settings)
    compared = []
    trainer._ranks.compare = lambda: compared.append(trainer.step.clocks.windows)
    trainer.fit()
    return hears.started.window if rank == 0 else None, compared, trainer.step.ranks.world_size


@tries("distributed", "compare_every", "compare_clock")
def test_distributed_and_when_ranks_are_compared() -> None:
    found = over_ranks(several, compare_every=2)
    assert "2 ranks × 2 rows" in found[0][0]
    assert [(compared, world) for _, compared, world in found] == [([2, 4], 2)] * 2
    found = over_ranks(several, compare_every=6, compare_clock="rows")
    assert [compared for _, compared, _ in found] == [[2, 4, 5]] * 2


@tries("distributed_timeout")
def test_how_long_a_rank_waits_for_the_others() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    alone = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in alone.items():
            patch.setenv(name, value)
        with pytest.raises(TrainerError, match="did not find one another within 1 s"):
            made(distributed="ddp", distributed_timeout=1.0)


def test_every_keyword_has_its_test() -> None:
    assert set(flat_names()) == TRIED
