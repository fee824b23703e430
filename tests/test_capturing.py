"""When a run's windows are caught, what is in them, and what keeps them small and the run alive."""

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import over_ranks
from runs import QUIET, rows
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from trainer import CheckpointError, DivergedError, Trainer, capture, replay, rng
from trainer.checkpoint import folder
from trainer.diagnose.capture import captured, load
from trainer.gradient.report import FREE_READS
from trainer.optim import sgd

BAD = 21
"""The row of the data that is planted, of 40."""


class Logs(nn.Module):
    """What comes in is positive but for the planted row; statistics in front that a NaN would spoil."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.norm, self.drop = nn.Parameter(torch.ones(3)), nn.BatchNorm1d(3), nn.Dropout(0.2)
        self.register_buffer("seen", torch.zeros(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1.0
        return self.norm(torch.log(x * self.w)) * self.drop(self.w)


def positive() -> tuple[Tensor, Tensor]:
    inputs, targets = rows(40)
    inputs = inputs.abs() + 0.5
    inputs[BAD] = -1.0
    return inputs, targets


class Objective:
    """Remembers torch's generator, and the buffers, as they were when each micro-batch came."""

    def __init__(self) -> None:
        self.before: list[dict[str, Any]] = []
        self.buffers: list[dict[str, Tensor]] = []

    def __call__(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        self.before.append(rng.capture())
        self.buffers.append({name: buffer.clone() for name, buffer in model.named_buffers()})
        return (model(batch[0]).sum(-1, keepdim=True) - batch[1]).square().mean()


class Hears:
    def __init__(self) -> None:
        self.texts: list[str] = []

    def found(self, event: Any) -> None:
        self.texts.append(event.text)


def run(folder: Path | None, data: Any = None, objective: Any = None, **settings: Any) -> tuple[Trainer, list[str]]:
    torch.manual_seed(0)
    model, hears = Logs(), Hears()
    settings = {"batch_size": 4, "accumulation_steps": 2, "epochs": 2, "seed": 3, "audit": False, **QUIET, **settings}
    objective = objective or Objective()
    optimizer = sgd(model.parameters(), lr=0.01)
    data = data if data is not None else positive()
    return Trainer(model, objective, optimizer, data=data, folder=folder, loggers=[hears], **settings), hears.texts


def test_a_window_that_is_not_finite_is_kept_and_said(tmp_path: Path) -> None:
    trainer, said = run(tmp_path)
    trainer.fit()
    first, second = captured(tmp_path)
    assert [f"window-{int(path.name[-6:]):06d}" for path in (first, second)] == [first.name, second.name]
    assert said == [
        f"window {int(path.name[-6:]):,} is kept as it was; what made it so is named by "
        f'trainer.replay("{path.as_posix()}", model, objective)'
        for path in (first, second)
    ]
    made = load(first)
    found = replay(tmp_path, trainer.model, trainer.step.objective)
    assert found.culprit is not None
    assert (found.culprit.what, found.data_rows) == ("log()", [BAD])
    assert made.why.startswith("the loss of micro-batch ")
    assert made.clocks["windows"] == int(first.name[-6:])
    assert not list((tmp_path / folder.CAPTURED).glob(".*"))
    assert str(found) == str(replay(tmp_path / folder.CAPTURED, trainer.model, trainer.step.objective))


class Draws(TensorDataset):
    """Items that draw from torch's and numpy's own generators as they are loaded."""

    def __getitem__(self, row: int) -> tuple[Tensor, ...]:
        inputs, targets = super().__getitem__(row)
        return inputs * (1.0 + 0.1 * torch.rand(())), targets


def kinds() -> dict[str, Any]:
    dataset = Draws(*positive())
    return {"tensors": positive(), "items": dataset, "loader": DataLoader(dataset, batch_size=4, shuffle=True)}


@pytest.mark.parametrize("kind", ["tensors", "items", "loader"])
@pytest.mark.parametrize("log_every", [1, 50])
def test_generators_and_buffers_are_those_before_the_windows_first_forward(
    kind: str, log_every: int, tmp_path: Path
) -> None:
    objective = Objective()
    trainer, _ = run(tmp_path, kinds()[kind], objective, log_every=log_every)
    trainer.fit()
    paths = captured(tmp_path)
    assert len(paths) == 2
    for path in paths:
        made = load(path)
        call = 2 * (made.clocks["windows"] - 1)
        before = objective.before[call]
        assert made.unknown == []
        assert made.generators is not None
        assert torch.equal(made.generators["torch"], before["torch"])
        assert torch.equal(made.generators["numpy"]["words"], before["numpy"]["words"])
        kept = {**made.model, **made.buffers}
        assert all(torch.equal(kept[name], buffer) for name, buffer in objective.buffers[call].items())
        assert set(made.buffers) == {"seen"}
        assert not torch.equal(before["torch"], objective.before[call + 1]["torch"])  # so it matters


def test_a_generator_that_nobody_has_held_is_said_to_be_unknown(tmp_path: Path) -> None:
    class Late(Objective):
        """Draws from Python's generator from one window on, when the run holds it no more."""

        def __call__(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            import random

            if len(self.before) > 2:
                random.random()
            return super().__call__(model, batch)

    trainer, _ = run(tmp_path, objective=Late(), log_every=1000)
    trainer.fit()
    assert load(captured(tmp_path)[-1]).unknown == ["python"]
    found = replay(captured(tmp_path)[-1], trainer.model, trainer.step.objective)
    assert "note: the state of the generator python was not known" in str(found)


def test_none_is_kept_without_a_folder_where_it_is_off_and_where_all_is_well(tmp_path: Path) -> None:
    for where, settings in ((None, {}), (tmp_path / "off", {"capture": "none"})):
        trainer, said = run(where, **settings)
        assert trainer.fit().skips == 2
        assert said == []
    inputs, targets = positive()
    trainer, said = run(tmp_path / "well", (inputs.abs(), targets))
    assert trainer.fit().skips == 0
    assert said == []
    assert captured(tmp_path / "off") == captured(tmp_path / "well") == []


def test_the_first_ones_of_a_run_are_kept(tmp_path: Path) -> None:
    trainer, said = run(tmp_path, epochs=5, capture_most=2)
    assert trainer.fit().skips == 5
    assert len(captured(tmp_path)) == 2
    assert len(said) == 2
    assert "(the last of 2: diagnose.capture_most)" in said[1]


def test_what_is_larger_than_allowed_is_said_once_and_not_written(tmp_path: Path) -> None:
    trainer, said = run(tmp_path, capture_mib=0.001)
    assert trainer.fit().skips == 2
    assert len(said) == 1
    assert said[0].endswith("not captured for trainer replay: it takes 0.0 MiB, and diagnose.capture_mib allows 0.001.")
    assert not (tmp_path / folder.CAPTURED).exists()


def test_a_folder_that_cannot_be_written_does_not_end_the_run(tmp_path: Path) -> None:
    (tmp_path / folder.CAPTURED).write_text("a file in the way")
    trainer, said = run(tmp_path)
    stop = trainer.fit()
    assert (stop.reason, stop.skips) == ("2 epochs done", 2)
    assert len(said) == 1
    assert "was not captured for trainer replay: " in said[0]
    assert "could not be written" in said[0]


@pytest.mark.skipif(sys.platform == "win32", reason="there is no limit to set")
def test_a_full_disk_does_not_end_the_run(tmp_path: Path) -> None:
    import resource

    trainer, said = run(tmp_path, checkpoint_last=False)
    trainer.step(trainer._feed.source.tensors and [positive()])  # the file limit is not to hit what torch loads first
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, hard))
    try:
        trainer, said = run(tmp_path, checkpoint_last=False)
        stop = trainer.fit()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert stop.skips == 2
    assert "could not be written" in said[0]
    assert list((tmp_path / folder.CAPTURED).iterdir()) == []


def test_what_a_file_of_numbers_cannot_hold_is_said(tmp_path: Path) -> None:
    class Batch:
        def __init__(self, pair: tuple[Tensor, Tensor]) -> None:
            self.pair = pair

    inputs, targets = positive()
    data = [Batch((inputs[start : start + 4], targets[start : start + 4])) for start in range(0, 40, 4)]
    objective = Objective()
    trainer, said = run(tmp_path, data, lambda m, batch: objective(m, batch.pair), count_rows=lambda batch: 4)
    assert trainer.fit().skips == 2
    assert len(said) == 1
    assert "the state at 'window/0' is Batch: a checkpoint holds tensors, numbers and texts only." in said[0]


def test_it_is_caught_before_a_run_is_stopped(tmp_path: Path) -> None:
    trainer, said = run(tmp_path, nonfinite="raise")
    with pytest.raises(DivergedError, match="nonfinite=raise"):
        trainer.fit()
    (path,) = captured(tmp_path)
    found = replay(path, trainer.model, trainer.step.objective)
    assert (found.culprit.what, found.data_rows) == ("log()", [BAD])
    assert len(said) == 1
    trainer, said = run(tmp_path / "in a row", skips_in_a_row=1)
    with pytest.raises(DivergedError, match="1 steps in a row"):
        trainer.fit()
    assert len(captured(tmp_path / "in a row")) == len(said) == 1


def test_the_window_of_a_step_that_is_asked_for(tmp_path: Path) -> None:
    objective = Objective()
    trainer, said = run(tmp_path, objective=objective, capture_at=2, capture="none")
    trainer.fit()
    (path,) = captured(tmp_path)
    made = load(path)
    assert made.clocks["steps"] == 1
    call = 2 * made.clocks["windows"]
    assert torch.equal(made.generators["torch"], objective.before[call]["torch"])
    assert all(torch.equal(made.model[name], objective.buffers[call][name]) for name in ("norm.running_mean",))
    assert replay(path, trainer.model, trainer.step.objective).finite
    assert len(said) == 1


def test_an_overflow_is_kept_where_that_is_asked_for(tmp_path: Path) -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(3, 1))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.w

    def objective(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return model(batch[0]).float().square().mean()

    for wanted, count in (("nonfinite", 0), ("all", 1)):
        model = Wide()
        where = tmp_path / wanted
        settings = {
            "precision": "fp16",
            "loss_scale": 2.0**17,
            "steps": 3,
            "batch_size": 8,
            "capture_most": 1,
            "seed": 0,
        }
        optimizer = sgd(model.parameters(), lr=1e-3)
        trainer = Trainer(
            model, objective, optimizer, data=positive(), folder=where, capture=wanted, **settings, **QUIET
        )
        stop = trainer.fit()
        assert stop.skips
        assert len(captured(where)) == count
    made = load(captured(where)[0])
    assert made.loss_scale == 2.0**17
    found = replay(made, model, objective)
    assert found.culprit is not None
    assert found.culprit.where == "backward"


@pytest.fixture
def no_read_is_free() -> Iterator[None]:
    FREE_READS.discard("cpu")
    yield
    FREE_READS.add("cpu")


@pytest.mark.usefixtures("no_read_is_free")
def test_on_a_device_it_is_kept_where_its_report_is_read(tmp_path: Path) -> None:
    for every, count in ((1, 2), (1000, 0)):
        where = tmp_path / str(every)
        trainer, _ = run(where, log_every=every, log_clock="windows")
        trainer.fit()
        assert len(captured(where)) == count
    where = tmp_path / "1"
    assert replay(where, trainer.model, trainer.step.objective).data_rows == [BAD]


def test_a_run_goes_on_beside_it_and_a_new_run_puts_it_aside(tmp_path: Path) -> None:
    trainer, _ = run(tmp_path, epochs=1)
    trainer.fit()
    (path,) = captured(tmp_path)
    trainer, _ = run(tmp_path, epochs=2)
    assert trainer.fit("auto").clocks["epochs"] == 2
    assert captured(tmp_path)[0] == path
    assert len(captured(tmp_path)) == 2
    trainer, _ = run(tmp_path, epochs=1)
    with pytest.raises(CheckpointError, match="window-.* is a captured window"):
        trainer.fit(path)
    fresh, _ = run(tmp_path, epochs=1)
    fresh.fit("never")
    assert captured(tmp_path) == [path]
    assert len(list((tmp_path / "captured.previous").iterdir())) == 2


@pytest.mark.parametrize("name", ["manifest.json", "state.json", "model.safetensors", "rest.safetensors"])
@pytest.mark.parametrize("how", ["flipped", "cut", "gone"])
def test_what_is_damaged_is_refused_by_name(name: str, how: str, tmp_path: Path) -> None:
    model, batch = nn.Linear(3, 1), rows(4)

    def objective(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (model(batch[0]) - batch[1]).square().mean()

    trainer = Trainer(model, objective, sgd(model.parameters(), lr=0.1), data=batch, steps=1, **QUIET)
    capture(trainer.step, [batch], tmp_path / "one", generators=rng.capture())
    assert replay(tmp_path / "one", model, objective).finite
    path = tmp_path / "one" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes({"flipped": bytes(content), "cut": bytes(content[:-9]), "gone": b""}[how])
    if how == "gone":
        path.unlink()
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        replay(tmp_path / "one", model, objective)


def test_what_is_no_caught_window_is_a_sentence(tmp_path: Path) -> None:
    trainer, _ = run(tmp_path, epochs=1)
    trainer.fit()
    with pytest.raises(CheckpointError, match="is a checkpoint and no captured window: those are in captured/"):
        load(tmp_path / "checkpoints" / "step-000004")
    shutil.rmtree(tmp_path / folder.CAPTURED)
    with pytest.raises(CheckpointError, match="holds no captured window"):
        load(tmp_path)
    with pytest.raises(CheckpointError, match="is not there"):
        load(tmp_path / "nowhere")


def test_a_named_tuple_and_a_mapping_come_back(tmp_path: Path) -> None:
    from collections import namedtuple

    Pair = namedtuple("Pair", "inputs targets")
    model = nn.Linear(3, 1)

    def objective(model: nn.Module, batch: Any) -> Tensor:
        return (model(batch.inputs) - batch.targets["y"]).square().mean()

    batch = Pair(torch.ones(2, 3), {"y": torch.zeros(2, 1), "words": ["a", "b"], "count": 2})
    trainer = Trainer(model, objective, sgd(model.parameters(), lr=0.1), data=[batch], steps=1, **QUIET)
    capture(trainer.step, [batch], tmp_path / "one", generators=rng.capture())
    (back,) = load(tmp_path / "one").micro_batches()
    assert (back._fields, back.targets["words"], back.targets["count"]) == (("inputs", "targets"), ["a", "b"], 2)
    assert replay(tmp_path / "one", model, objective).finite


def two_ranks(rank: int, world: int, where: str) -> tuple[list[str], str | None]:
    trainer, _ = run(Path(where), distributed="ddp", epochs=1, device="cpu")
    trainer.fit()
    own = [path for path in captured(Path(where)) if ("rank" in path.name) == bool(rank)]
    found = replay(own[0], trainer.model, trainer.step.objective)
    return [path.name for path in own], None if found.culprit is None else f"{found.culprit.what} {found.data_rows}"


def test_each_rank_keeps_its_own(tmp_path: Path) -> None:
    (left, of_left), (right, of_right) = over_ranks(two_ranks, str(tmp_path))
    assert len(left) == len(right) == 1
    assert right == [f"{left[0]}-rank-1"]
    assert {of_left, of_right} == {None, f"log() [{BAD}]"}


def test_the_metrics_tell_it_too(tmp_path: Path) -> None:
    trainer, said = run(tmp_path, metrics_file=True, epochs=1)
    trainer.fit()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["text"] for line in lines if line["event"] == "found"] == said


def test_a_run_that_comes_to_a_window_once_more_catches_it_once(tmp_path: Path) -> None:
    whole, texts = run(tmp_path / "whole")
    whole.fit()
    names = [path.name for path in captured(tmp_path / "whole")]
    assert len(names) == 2  # once an epoch
    first, _ = run(tmp_path / "cut", checkpoint_every=1, checkpoint_clock="windows", checkpoint_keep_last=None)
    first.fit()
    (old,) = [path for path in (tmp_path / "cut" / "checkpoints").iterdir() if path.name == "step-000001"]
    again, said = run(tmp_path / "cut")
    again.fit(resume=old)
    assert [path.name for path in captured(tmp_path / "cut")] == names
    assert [text.replace("/cut/", "/whole/") for text in said] == texts
