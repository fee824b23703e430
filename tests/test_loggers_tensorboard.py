import math
import re
import subprocess
import sys
import time
from pathlib import Path

import logged
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

from trainer.errors import ConfigError, TrainerError
from trainer.loggers.tensorboard import TensorBoard


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
        "clock/micro_batches": lambda window: 2 * window,
        "clock/windows": lambda window: window,
        "clock/epochs": lambda window: window // 10,
        "clock/steps": lambda window: window,
        "clock/rows": lambda window: 64 * window,
        "clock/tokens": lambda window: 0,
    }.items():
        events = [(event.step, event.value) for event in found.Scalars(tag)]
        assert events == [(window, single(value(window))) for window in range(1, 121)], tag
    assert [event.value for event in found.Scalars("time/steps_per_second")] == pytest.approx([10.0] * 120, rel=1e-4)
    assert [event.value for event in found.Scalars("time/rows_per_second")] == pytest.approx([640.0] * 120, rel=1e-4)
    assert "loss/loss" not in found.Tags()["scalars"]


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
    assert scalars(tmp_path, "gradient/skips") == [(1, 0.0), (2, 1.0), (2, 3.0)]
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


def test_the_axis_is_the_clock_that_was_asked_for(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path)
    board.start(logged.start(step_clock="rows"))
    board.step(logged.report(2), 0.1)
    board.stop(logged.stop(2))
    assert scalars(tmp_path, "loss/total") == [(128, 0.25)]
    with pytest.raises(ConfigError, match="the clock 'hours'"):
        board.start(logged.start(3, step_clock="hours"))
    board.stop(logged.stop(3))


def test_the_config_shows_as_text_and_the_charts_have_a_layout(tmp_path: Path) -> None:
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
    layout = layout_pb2.Layout.FromString(found.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    assert found.summary_metadata["custom_scalars__config__"].plugin_data.plugin_name == "custom_scalars"
    patterns = [list(chart.multiline.tag) for chart in layout.category[0].chart]
    written = ["loss/total", "eval/loss", "gradient/norm", "gradient/clip_factor"]
    assert [tag for tag in written if any(re.match(pattern, tag) for chart in patterns for pattern in chart)] == written
    assert [tag for tag in written if any(re.match(pattern, tag) for pattern in patterns[0])] == written[:2]


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
    with pytest.raises(ConfigError, match="cannot be made"):
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
