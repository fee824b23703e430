import json
import math
from pathlib import Path
from typing import Any

import logged
import pytest
import torch

from trainer.errors import ConfigError, TrainerError
from trainer.loggers.metrics import Metrics, cut


def lines(path: Path) -> list[dict[str, Any]]:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_every_event_is_a_line_that_reads_back_exactly(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "run")
    metrics.start(logged.start())
    metrics.step(logged.report(1, 1 / 3), 0.125)
    metrics.skip(logged.skipped(2, "the loss is not finite."))
    metrics.evaluate(logged.evaluated(2, {"loss": 0.1, "accuracy": 0.97}, best=True), None)
    metrics.stop(logged.stop(2))
    step, skip, evaluation = lines(metrics.path)
    assert step == {
        "event": "step",
        **logged.clocks(1),
        "loss": 1 / 3,
        "terms": {"loss": 1 / 3},
        "weight": 64.0,
        "grad_norm": 1.5,
        "grad_norm_after": 1.5 * 0.75,
        "clip_factor": 0.75,
        "window": {
            "micro_batches": 2,
            "rows": 64,
            "tokens": 0,
            "divisor": 64.0,
            "backward_calls": 0,
            "reductions": 0,
        },
        "loss_scale": None,
        "lr": 1e-3,
        "skipped": False,
        "reason": None,
        "seconds": 0.125,
    }
    assert skip["event"] == "skip"
    assert (skip["windows"], skip["steps"]) == (2, 1)
    assert (skip["skipped"], skip["reason"]) == (True, "the loss is not finite.")
    assert evaluation == {
        "event": "evaluation",
        **logged.clocks(2),
        "metrics": {"loss": 0.1, "accuracy": 0.97},
        "evaluated_rows": 360,
        "grad_mode": "no_grad",
        "best": True,
        "seconds": 0.5,
    }


def test_what_is_not_finite_is_null_with_a_note(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path)
    metrics.start(logged.start())
    report = logged.report(1, terms={"fit": math.inf, "energy": -math.inf})
    report._grad_norm = torch.tensor(math.nan)
    metrics.step(report, 0.1)
    metrics.evaluate(logged.evaluated(1, {"loss": math.nan, "accuracy": 1.0}), None)
    metrics.stop(logged.stop(1))
    step, evaluation = lines(metrics.path)
    assert (step["loss"], step["grad_norm"], step["weight"]) == (None, None, 64.0)
    assert step["terms"] == {"fit": None, "energy": None}
    nan = {"loss": "nan", "grad_norm": "nan", "grad_norm_after": "nan"}
    assert step["nonfinite"] == nan | {"terms.fit": "inf", "terms.energy": "-inf"}
    assert evaluation["metrics"] == {"loss": None, "accuracy": 1.0}
    assert evaluation["nonfinite"] == {"metrics.loss": "nan"}


def written(folder: Path, windows: int) -> Path:
    metrics = Metrics(folder)
    metrics.start(logged.start())
    for window in range(1, windows + 1):
        metrics.step(logged.report(window), float(window))
    metrics.stop(logged.stop(windows))
    return metrics.path


def test_resume_cuts_to_the_checkpoint_and_goes_on(tmp_path: Path) -> None:
    path = written(tmp_path, 7)
    whole = path.read_bytes().splitlines(keepends=True)
    metrics = Metrics(tmp_path)
    metrics.start(logged.start(4, resumed_from=tmp_path))
    assert path.read_bytes() == b"".join(whole[:4])
    for window in (5, 6, 7):
        metrics.step(logged.report(window), float(window))
    metrics.stop(logged.stop(7))
    assert path.read_bytes() == b"".join(whole)
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_flush_is_enough_for_a_checkpoint(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path)
    metrics.start(logged.start())
    metrics.step(logged.report(1), 0.1)
    assert lines(metrics.path) == []
    metrics.flush()
    assert len(lines(metrics.path)) == 1
    metrics.stop(logged.stop(1))


def test_a_torn_last_line_is_dropped_wherever_it_was_torn(tmp_path: Path) -> None:
    path = written(tmp_path, 3)
    whole = path.read_bytes()
    kept = b"".join(whole.splitlines(keepends=True)[:2])
    for size in range(len(kept) + 1, len(whole) - 1, 7):
        path.write_bytes(whole[:size])
        cut(path, 3)
        assert path.read_bytes() == kept
    path.write_bytes(whole[:-1])  # only the end of the line is missing
    cut(path, 3)
    assert path.read_bytes() == whole


def test_nothing_to_cut_leaves_the_file_untouched(tmp_path: Path) -> None:
    path = written(tmp_path, 3)
    before = path.stat()
    cut(path, 3)
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    cut(tmp_path / "missing.jsonl", 3)
    assert not (tmp_path / "missing.jsonl").exists()


def test_a_foreign_line_is_named_and_kept(tmp_path: Path) -> None:
    path = written(tmp_path, 2)
    damaged = b"my notes\n" + path.read_bytes()
    path.write_bytes(damaged)
    with pytest.raises(ConfigError, match=r"metrics\.jsonl, line 1 is not"):
        Metrics(tmp_path).start(logged.start(1))
    assert path.read_bytes() == damaged


def test_a_new_run_in_an_old_folder_puts_the_old_lines_aside(tmp_path: Path) -> None:
    path = written(tmp_path, 3)
    old = path.read_bytes()
    metrics = Metrics(tmp_path)
    metrics.start(logged.start())
    metrics.stop(logged.stop(0))
    assert path.read_bytes() == b""
    assert (tmp_path / "metrics.previous.jsonl").read_bytes() == old


def test_a_step_before_the_start_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainerError, match="is not open"):
        Metrics(tmp_path).step(logged.report(1), 0.1)
    Metrics(tmp_path).stop(logged.stop(0))


def test_groups_that_are_clipped_each_by_itself_are_in_the_line(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path)
    metrics.start(logged.start())
    report = logged.report(1)
    report._groups = {"0": (torch.tensor(3.0), torch.tensor(0.5)), "others": (1.0, 1.0)}
    metrics.step(report, 0.1)
    metrics.stop(logged.stop(1))
    (step,) = lines(metrics.path)
    assert step["groups"] == {
        "0": {"grad_norm": 3.0, "clip_factor": 0.5},
        "others": {"grad_norm": 1.0, "clip_factor": 1.0},
    }
