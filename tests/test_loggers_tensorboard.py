import io
import math
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import logged
import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import api_pb2, metadata
from tensorboard.util.tensor_util import make_ndarray

from trainer.diagnose.history import History
from trainer.errors import CheckpointError, ConfigError, TrainerError
from trainer.loggers import screen
from trainer.loggers.events import Found
from trainer.loggers.heat_map import NO_GRADIENT, colours, draw
from trainer.loggers.tensorboard import HEAT_MAP, TensorBoard


def read(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0}).Reload()


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in read(folder).Scalars(tag)]


def single(value: float) -> float:
    return float(np.float32(value))


def run(folder: Path, first: int, last: int, *, offset: float = 0.0, stopped: bool = True) -> TensorBoard:
    board = TensorBoard(folder)
    board.start(logged.start(first))
    for window in range(first + 1, last + 1):
        board.step(logged.report(window, 1 / window + offset), 0.1 * (window - first))
    board.flush()
    if stopped:
        board.stop(logged.stop(last))
    return board


def test_all_that_a_step_has_is_read_back_exactly(tmp_path: Path) -> None:
    run(tmp_path, 0, 120)
    found = read(tmp_path)
    for tag, value in {
        "loss/total": lambda window: 1 / window,
        "gradient/norm": lambda window: 1.5,
        "gradient/clip_factor": lambda window: 0.75,
        "gradient/skips": lambda window: 0,
        "optimizer/lr": lambda window: 1e-3,
        "time/micro_batches": lambda window: 2 * window,
        "time/rows": lambda window: 64 * window,
    }.items():
        events = [(event.step, event.value) for event in found.Scalars(tag)]
        assert events == [(window, single(value(window))) for window in range(1, 121)], tag
    assert [event.value for event in found.Scalars("time/steps_per_second")] == pytest.approx([10.0] * 120, rel=1e-4)
    assert [event.value for event in found.Scalars("time/rows_per_second")] == pytest.approx([640.0] * 120, rel=1e-4)
    assert [(event.step, event.value) for event in found.Scalars("time/epochs")] == [
        (window, float(window // 10)) for window in range(10, 121)
    ]
    assert all(0 < event.value < 1 << 20 for event in found.Scalars("memory/process"))
    tags = found.Tags()["scalars"]
    # The loss again, the axis again, the same count as the axis, a count of nothing.
    assert not {"loss/loss", "time/steps", "time/windows", "time/tokens"} & set(tags)
    # TensorBoard's first look, and the five metrics that it shows of a sweep.
    assert min(tags) == "gradient/clip_factor"


def test_terms_evaluation_and_skips(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path)
    board.start(logged.start())
    board.step(logged.report(1, terms={"fit": 0.5, "energy": 0.25}), 0.1)
    board.evaluate(logged.evaluated(1, {"loss": 0.125, "accuracy": 0.97}), None)
    board.skip(logged.skipped(2, "the loss is not finite."))
    board.step(logged.report(3, skips=1), 0.9)
    board.stop(logged.stop(5, clocks=logged.clocks(5, skips=3)))
    assert scalars(tmp_path, "loss/total") == [(1, 0.75), (2, 0.25)]
    assert scalars(tmp_path, "loss/fit") == [(1, 0.5)]
    assert scalars(tmp_path, "loss/energy") == [(1, 0.25)]
    assert scalars(tmp_path, "eval/loss") == [(1, 0.125)]
    assert scalars(tmp_path, "eval/accuracy") == [(1, single(0.97))]
    # The first skip rises where it was; the last two were not heard of.
    assert scalars(tmp_path, "gradient/skips") == [(1, 0.0), (1, 1.0), (2, 1.0), (2, 3.0)]
    said = read(tmp_path).Tensors("skipped/text_summary")
    assert [(one.step, one.tensor_proto.string_val[0].decode()) for one in said] == [
        (1, "window 2 was skipped: the loss is not finite.")
    ]
    # 0.8 s went by between the two, 0.5 s of it in evaluation.
    assert scalars(tmp_path, "time/steps_per_second")[1] == (2, pytest.approx(1 / 0.3))


def test_what_is_not_there_has_no_tag(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path)
    board.start(logged.start())
    report = logged.report(1)
    report._grad_norm = report._clip_factor = None
    board.step(report, 0.0)
    board.stop(logged.stop(1))
    tags = set(read(tmp_path).Tags()["scalars"])
    assert tags & {"gradient/norm", "gradient/clip_factor", "time/steps_per_second", "gradient/nonfinite"} == set()
    assert {"loss/total", "gradient/skips"} <= tags


def test_a_value_that_is_not_finite_is_a_gap_and_is_counted(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path)
    board.start(logged.start())
    for window, loss in enumerate([0.5, math.nan, math.inf, 1e39, -3e38, 3e38], 1):
        board.step(logged.report(window, loss), 0.1 * window)
    report = logged.report(7)
    report._grad_norm = torch.tensor(-math.inf)
    board.step(report, 0.7)
    board.evaluate(logged.evaluated(7, {"loss": math.nan}), None)
    board.stop(logged.stop(7))
    assert scalars(tmp_path, "loss/total") == [(1, 0.5), (5, single(-3e38)), (6, single(3e38)), (7, 0.25)]
    assert [step for step, _ in scalars(tmp_path, "gradient/norm")] == [1, 2, 3, 4, 5, 6]
    counts = scalars(tmp_path, "gradient/nonfinite")
    assert counts == [(2, 1.0), (3, 2.0), (4, 3.0), (5, 3.0), (6, 3.0), (7, 4.0), (7, 5.0)]
    assert board.nonfinite == 5


def test_what_a_clip_factor_does_not_tell_has_tags_of_its_own(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path)
    board.start(logged.start())
    for window in (1, 2):
        report = logged.report(window)
        report._norm_after = torch.tensor(0.5)
        report._groups = {"1": (torch.tensor(2.0), torch.tensor(1.0))}
        board.step(report, float(window))
    board.stop(logged.stop(2))
    assert scalars(tmp_path, "gradient/norm_after") == [(1, 0.375), (2, 0.375)]
    assert scalars(tmp_path, "gradient/norm_group_1") == [(1, 2.0), (2, 2.0)]


def test_the_axis_is_the_clock_that_was_asked_for(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path)
    board.start(logged.start(step_clock="rows"))
    board.step(logged.report(2), 0.1)
    board.stop(logged.stop(2))
    assert scalars(tmp_path, "loss/total") == [(128, 0.25)]
    assert scalars(tmp_path, "time/steps") == [(128, 2.0)]
    with pytest.raises(ConfigError, match="the clock 'hours'"):
        board.start(logged.start(3, step_clock="hours"))
    board.stop(logged.stop(3))


def test_a_clock_that_parts_from_the_axis_shows_from_then_on(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path)
    board.start(logged.start())
    for window, skips in ((1, 0), (2, 1), (3, 1)):
        board.step(logged.report(window, skips=skips), 0.1 * window)
    board.stop(logged.stop(3, clocks=logged.clocks(3, 1)))
    assert scalars(tmp_path, "time/windows") == [(1, 2.0), (2, 3.0)]


def test_the_config_shows_as_text(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path)
    config = {
        "seed": 1,
        "gradient": {"clip_norm": None, "terms": ("a", "b")},
        "where": Path("outputs/x"),
        "text": "\u00e4",
    }
    board.start(logged.start(config=config))
    board.stop(logged.stop(0))
    found = read(tmp_path)
    text = found.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    expected = "seed: 1\ngradient:\n  clip_norm: null\n  terms:\n  - a\n  - b\nwhere: outputs/x\ntext: \u00e4\n"
    assert text == f"```yaml\n{expected}```"
    assert found.summary_metadata["config/text_summary"].plugin_data.plugin_name == "text"


def charts(folder: Path) -> dict[str, list[str]]:
    found = read(folder)
    layout = layout_pb2.Layout.FromString(found.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    assert found.summary_metadata["custom_scalars__config__"].plugin_data.plugin_name == "custom_scalars"
    return {chart.title: list(chart.multiline.tag) for category in layout.category for chart in category.chart}


def test_every_chart_of_the_layout_has_its_tags(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path, layer_norms=1)
    board.start(logged.start())
    board.look(parameters(), logged.report(1))
    board.step(logged.report(1), 0.1)
    board.evaluate(logged.evaluated(1, {"loss": 0.5, "accuracy": 0.9}), None)
    board.stop(logged.stop(1))
    tags = read(tmp_path).Tags()["scalars"]
    found = charts(tmp_path)
    matched = {
        title: [tag for tag in tags if any(re.match(pattern, tag) for pattern in patterns)]
        for title, patterns in found.items()
    }
    assert all(matched.values())
    assert sorted(matched["loss: training against evaluation"]) == ["eval/loss", "loss/total"]
    assert matched["evaluation: metrics"] == ["eval/accuracy"]


def test_a_chart_that_would_stay_empty_is_not_there(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path)
    board.start(logged.start())
    report = logged.report(1)
    report._clip_factor = None
    board.step(report, 0.1)
    board.stop(logged.stop(1))
    titles = set(charts(tmp_path))
    assert "norm" in titles
    assert not titles & {"clip factor", "norm by parameter", "noise scale, in rows", "the same by parameter"}
    board = TensorBoard(tmp_path / "more")
    board.start(logged.start(measured=("gradient/noise_scale", "update_ratio/")))
    board.step(report, 0.1)
    board.stop(logged.stop(1))
    assert set(charts(tmp_path / "more")) - titles == {"noise scale, in rows", "the same by parameter"}


def session(folder: Path) -> tuple[dict[str, Any], int | None]:
    """The hyperparameters and the end's status, as TensorBoard's own plugin reads them."""
    content = {tag: facts.plugin_data.content for tag, facts in read(folder).summary_metadata.items()}
    start = metadata.parse_session_start_info_plugin_data(content[metadata.SESSION_START_INFO_TAG])
    values = {name: getattr(value, value.WhichOneof("kind")) for name, value in start.hparams.items()}
    if metadata.SESSION_END_INFO_TAG not in content:
        return values, None
    return values, metadata.parse_session_end_info_plugin_data(content[metadata.SESSION_END_INFO_TAG]).status


def test_a_run_of_a_sweep_tells_its_hyperparameters_and_how_it_ended(tmp_path: Path) -> None:
    config = {
        "recipe": "digits",
        "seed": 3,
        "optimizer": {"_target_": "trainer.optim.adamw", "lr": 1e-3, "betas": [0.9, 0.95]},
        "data": {"shuffle": True, "source": {"_target_": "mine.rows", "_partial_": True}},
        "gradient": {"clip_norm": None},
        "loggers": {"every": 50},
    }
    board = TensorBoard(tmp_path / "0")
    board.start(logged.start(config=config))
    board.flush()
    expected = {
        "seed": 3.0,
        "optimizer": "trainer.optim.adamw",
        "optimizer.lr": 1e-3,
        "optimizer.betas": "[0.9, 0.95]",
        "data.shuffle": True,
        "data.source": "mine.rows",
        "gradient.clip_norm": "null",
    }
    assert session(tmp_path / "0") == (expected, None)
    board.stop(logged.stop(1))
    assert session(tmp_path / "0") == (expected, api_pb2.STATUS_SUCCESS)
    board = TensorBoard(tmp_path / "1")
    board.start(logged.start(config=config))
    board.stop(logged.stop(1, reason="stopped by Ctrl-C"))
    assert session(tmp_path / "1")[1] == api_pb2.STATUS_FAILURE


def parameters() -> dict[str, torch.Tensor]:
    weight = torch.tensor([3.0, 4.0], requires_grad=True)
    weight.grad = torch.tensor([0.6, 0.8])
    frozen = torch.full((4,), 0.5)
    return {"0.weight": weight, "1.bias": frozen}


def test_norms_and_histograms_come_when_they_are_due(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path, histograms=4, layer_norms=2)
    board.start(logged.start())
    for window in range(1, 10):
        board.look(parameters(), logged.report(window))
    board.stop(logged.stop(9))
    assert scalars(tmp_path, "gradient_norm/0.weight") == [(step, 1.0) for step in (1, 2, 4, 6, 8)]
    assert scalars(tmp_path, "parameter_norm/0.weight") == [(step, 5.0) for step in (1, 2, 4, 6, 8)]
    assert scalars(tmp_path, "parameter_norm/1.bias") == [(step, 1.0) for step in (1, 2, 4, 6, 8)]
    found = read(tmp_path)
    assert "gradient_norm/1.bias" not in found.Tags()["scalars"]
    tags = [
        tag for tag in found.Tags()["tensors"] if found.summary_metadata[tag].plugin_data.plugin_name == "histograms"
    ]
    assert sorted(tags) == ["gradients/0.weight", "parameters/0.weight", "parameters/1.bias"]
    events = found.Tensors("parameters/0.weight")
    assert [event.step for event in events] == [1, 4, 8]
    buckets = make_ndarray(events[0].tensor_proto)
    assert buckets.shape == (30, 3) and buckets.dtype == np.float64
    assert (buckets[0, 0], buckets[-1, 1], buckets[:, 2].sum()) == (3.0, 4.0, 2.0)


def grown(board: TensorBoard, history: History, first: int, last: int) -> None:
    for window in range(first, last + 1):
        report = logged.report(window)
        history.look(parameters(), report)
        board.step(report, 0.1 * window)


def images(folder: Path) -> list[tuple[int, np.ndarray]]:
    """Each heat map's step and pixels, as TensorBoard reads them."""
    found = read(folder)
    assert found.summary_metadata[HEAT_MAP].plugin_data.plugin_name == "images"
    decoded = []
    for event in found.Tensors(HEAT_MAP):
        width, height, png = event.tensor_proto.string_val
        pixels = np.asarray(Image.open(io.BytesIO(png)))
        assert pixels.shape == (int(height), int(width), 3)
        decoded.append((event.step, pixels))
    return decoded


def test_the_heat_map_comes_at_the_end_and_as_a_file(tmp_path: Path) -> None:
    history, board = History(), TensorBoard(tmp_path)
    board.start(logged.start(history=history))
    grown(board, history, 1, 9)
    board.stop(logged.stop(9, health=["well"]))
    ((step, pixels),) = images(tmp_path)
    assert step == 9
    assert (pixels == np.asarray(Image.open(tmp_path / "gradient_norms.png"))).all()
    # 1.0 in `0.weight`, which was clipped to 0.75 of itself, and no gradient in `1.bias`.
    assert (pixels == colours(np.array([1 / 0.75]))[0]).all(axis=2).sum() > 1000
    assert (pixels == NO_GRADIENT).all(axis=2).sum() > 1000


def test_the_heat_map_comes_ever_more_seldom_and_at_once_with_a_finding(tmp_path, monkeypatch) -> None:
    now = [0.0]
    monkeypatch.setattr(screen, "perf_counter", lambda: now[0])
    history, board = History(), TensorBoard(tmp_path)
    board.start(logged.start(history=history))
    for window in range(1, 301):
        now[0] = float(window)
        grown(board, history, window, window)
    board.flush()
    steps = [step for step, _ in images(tmp_path)]
    assert steps == [10, 20, 35, 58, 92, 143, 219]
    board.found(Found("something", logged.clocks(300)))
    grown(board, history, 301, 302)
    board.stop(logged.stop(302))
    assert [step for step, _ in images(tmp_path)] == [*steps, 301, 302]


def test_the_health_of_the_gradient_is_a_text_and_stands_above_the_heat_map(tmp_path: Path) -> None:
    history, board = History(), TensorBoard(tmp_path)
    board.start(logged.start(history=history))
    grown(board, history, 1, 3)
    board.stop(logged.stop(3, health=["not well: skipped", "skipped: 1 of 3 windows"]))
    (said,) = read(tmp_path).Tensors("gradient health/text_summary")
    assert said.tensor_proto.string_val == [b"- not well: skipped\n- skipped: 1 of 3 windows"]
    ((_, pixels),) = images(tmp_path)
    png, _, _ = draw(history, "not well: skipped")
    assert (pixels == np.asarray(Image.open(io.BytesIO(png)))).all()


def test_where_no_gradient_was_looked_at_there_is_no_heat_map(tmp_path: Path) -> None:
    for history in (None, History()):
        board = TensorBoard(tmp_path)
        board.start(logged.start(history=history))
        board.step(logged.report(1), 0.1)
        board.stop(logged.stop(1))
    assert not (tmp_path / "gradient_norms.png").exists()
    assert read(tmp_path).Tags()["tensors"] == ["custom_scalars__config__"]


def test_what_nobody_asked_for_is_not_looked_at(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path)
    board.start(logged.start())
    board.look({"w": "not even a tensor"}, logged.report(1))  # type: ignore[dict-item]
    board.stop(logged.stop(1))
    assert read(tmp_path).Tags()["scalars"] == []


def test_a_gradient_that_is_not_finite_is_a_gap_in_its_charts(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path, histograms=1, layer_norms=1)
    board.start(logged.start())
    held = parameters()
    assert held["0.weight"].grad is not None
    for window, value in ((1, 0.8), (2, math.nan), (3, 0.8)):
        held["0.weight"].grad[1] = value
        board.look(held, logged.report(window))
    board.stop(logged.stop(3))
    assert scalars(tmp_path, "gradient_norm/0.weight") == [(1, 1.0), (3, 1.0)]
    assert [event.step for event in read(tmp_path).Tensors("gradients/0.weight")] == [1, 3]
    assert [event.step for event in read(tmp_path).Tensors("parameters/0.weight")] == [1, 2, 3]
    assert scalars(tmp_path, "gradient/nonfinite") == [(2, 1.0), (3, 1.0)]


def test_resume_forgets_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    run(tmp_path, 0, 9)
    run(tmp_path, 4, 6, offset=100.0)
    expected = [(window, single(1 / window + (100.0 if window > 4 else 0.0))) for window in range(1, 7)]
    assert scalars(tmp_path, "loss/total") == expected
    run(tmp_path, 2, 3, offset=200.0)
    assert scalars(tmp_path, "loss/total") == [(1, 1.0), (2, 0.5), (3, single(1 / 3 + 200.0))]


def test_a_file_torn_by_a_kill_is_read_up_to_the_tear_and_gone_on_from(tmp_path: Path) -> None:
    board = run(tmp_path, 0, 9)
    assert board.path is not None
    board.path.write_bytes(board.path.read_bytes()[:-7])
    run(tmp_path, 4, 6, offset=100.0)
    assert [step for step, _ in scalars(tmp_path, "loss/total")] == [1, 2, 3, 4, 5, 6]


def test_a_new_run_in_an_old_folder_replaces_it(tmp_path: Path) -> None:
    run(tmp_path, 0, 9)
    run(tmp_path, 0, 2, offset=100.0)
    assert scalars(tmp_path, "loss/total") == [(1, 101.0), (2, 100.5)]


def test_a_new_file_sorts_last_even_after_a_clock_that_was_ahead(tmp_path: Path) -> None:
    ahead = int(time.time()) + 5000
    (tmp_path / f"events.out.tfevents.{ahead}.1.somewhere").write_bytes(b"")
    names = [run(tmp_path, 0, 1).path for _ in range(3)]
    assert sorted(tmp_path.iterdir())[1:] == names


def test_records_are_on_disk_when_flushed_or_evaluated(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path)
    board.start(logged.start())
    assert board.path is not None
    size = board.path.stat().st_size
    board.step(logged.report(1), 0.1)
    assert board.path.stat().st_size == size
    board.evaluate(logged.evaluated(1, {"loss": 0.5}), None)
    assert scalars(tmp_path, "loss/total") == [(1, 0.25)]
    board.step(logged.report(2), 0.2)
    board.flush()
    assert len(scalars(tmp_path, "loss/total")) == 2
    board.stop(logged.stop(2))


def test_a_folder_that_is_a_file_and_a_step_before_the_start_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be made"):
        TensorBoard(tmp_path / "file").start(logged.start())
    with pytest.raises(TrainerError, match=r"call start\(\.\.\.\) first"):
        TensorBoard(tmp_path).step(logged.report(1), 0.1)


def test_it_is_light_to_import_and_starts_no_thread(tmp_path: Path) -> None:
    code = f"""
import sys, threading
sys.path.insert(0, {str(Path(logged.__file__).parent)!r})
import logged
from trainer.loggers.tensorboard import TensorBoard
board = TensorBoard({str(tmp_path)!r})
board.start(logged.start(config={{"seed": 1}}))
board.step(logged.report(1), 0.1)
board.stop(logged.stop(1))
heavy = ("torch.utils.tensorboard", "tensorflow", "fsspec", "absl", "tensorboard.summary")
print([name for name in heavy if name in sys.modules], threading.active_count())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "[] 1\n")
