import io
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import TracebackType

import logged
import pytest

from trainer.loggers import console
from trainer.loggers.console import Console

fcntl = pytest.importorskip("fcntl", reason="pseudo-terminals are a thing of Unix")
import pty  # noqa: E402
import struct  # noqa: E402
import termios  # noqa: E402


class Terminal:
    """A pseudo-terminal, so many columns wide: `stream` writes to it, `text` is all that it got."""

    def __init__(self, columns: int) -> None:
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.stream = os.fdopen(slave, "w", encoding="utf-8")
        self._got = b""
        self._reader = threading.Thread(target=self._read)

    def _read(self) -> None:
        try:
            while part := os.read(self._master, 65536):
                self._got += part
        except OSError:  # Linux's word for the other end being closed
            pass

    def __enter__(self) -> "Terminal":
        self._reader.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stream.close()
        self._reader.join()
        os.close(self._master)

    @property
    def text(self) -> str:
        return self._got.decode("utf-8")


@pytest.fixture(autouse=True)
def _terminal_without_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "")


def run(stream: io.TextIOBase | None, windows: int = 6, seconds: float = 0.02) -> None:
    screen = Console(stream)  # type: ignore[arg-type]
    screen.start(logged.start(total_windows=windows, notes=["rows are counted."], folder=Path("outputs/mine")))
    for window in range(1, windows + 1):
        screen.tick()
        screen.step(logged.report(window), window * seconds)
        time.sleep(seconds)
    screen.evaluate(logged.evaluated(windows, {"loss": 0.25, "accuracy": 0.97}, best=True, seconds=0.0), None)
    screen.skip(logged.skipped(windows, "the loss is not finite."))
    screen.stop(logged.stop(windows))


def test_a_pipe_gets_plain_lines() -> None:
    stream = io.StringIO()
    run(stream)
    assert stream.getvalue().splitlines() == [
        "digits: MLP, 12,345 parameters, on cpu in fp32",
        "window 2 \u00d7 32 rows = 64 rows, divided by rows",
        "writes to outputs/mine",
        "note: rows are counted.",
        "step 1 (17%): loss 0.25, norm 1.5, 3,200 rows/s",
        "evaluated at step 6: loss 0.25, accuracy 0.97, best so far",
        "skipped window 6, after step 5: the loss is not finite.",
        "stopped: 3 epochs done",
        "  6 steps, 0 skips, 2.0 s, 192 rows/s in training",
        "  last evaluation: loss 0.25, accuracy 0.97",
        "  best: accuracy 0.98 at step 10",
        "  model    outputs/model.safetensors",
        "  metrics  outputs/metrics.jsonl",
        "go on with a higher limit: trainer train recipe=digits run=mine",
    ]


def test_resume_says_from_where_and_rates_count_from_there() -> None:
    stream = io.StringIO()
    screen = Console(stream)
    screen.start(logged.start(100, recipe=None, resumed_from=Path("outputs/mine/checkpoint")))
    screen.evaluate(logged.evaluated(110, {"loss": 0.5}, seconds=1.0), None)
    screen.step(logged.report(110), 3.0)
    screen.stop(logged.stop(120, seconds=5.0, metrics={}, best=None, files={}, go_on=None))
    text = stream.getvalue()
    assert text.startswith("MLP, 12,345 parameters")
    assert "goes on at step 100, from outputs/mine/checkpoint\n" in text
    assert "step 110: loss 0.25, norm 1.5, 320 rows/s\n" in text
    assert text.endswith("stopped: 3 epochs done\n  120 steps, 0 skips, 5.0 s, 320 rows/s in training\n")


def test_a_fast_run_says_a_handful_of_step_lines_and_a_slow_one_still_some() -> None:
    stream = io.StringIO()
    screen = Console(stream)
    screen.start(logged.start())
    begin = time.perf_counter()
    count = 0
    while (seconds := time.perf_counter() - begin) < 2.3:
        count += 1
        screen.tick()
        screen.step(logged.report(count), seconds)
    assert count > 1000
    lines = [line for line in stream.getvalue().splitlines() if line.startswith("step")]
    assert len(lines) == 2  # at once, and after two seconds


def test_evaluations_come_all_unless_they_come_too_fast_to_read() -> None:
    stream = io.StringIO()
    screen = Console(stream)
    screen.start(logged.start())
    for window in range(1, 200):
        screen.evaluate(logged.evaluated(window, {"loss": 0.5}), None)
    lines = [line for line in stream.getvalue().splitlines() if line.startswith("evaluated")]
    assert len(lines) in (console.EVALUATIONS_AT_ONCE, console.EVALUATIONS_AT_ONCE + 1)
    time.sleep(1.05)
    screen.evaluate(logged.evaluated(200, {"loss": 0.5}), None)
    last = stream.getvalue().splitlines()[-1]
    assert last == f"evaluated at step 200: loss 0.5 ({199 - len(lines)} evaluations before it not shown)"


def test_skips_are_said_in_full_at_first_and_then_counted() -> None:
    stream = io.StringIO()
    screen = Console(stream)
    screen.start(logged.start())
    for window in range(1, 24):
        screen.skip(logged.skipped(window, f"reason {window}."))
    screen.stop(logged.stop(24))
    lines = [line for line in stream.getvalue().splitlines() if "skipped" in line]
    assert lines[:3] == [f"skipped window {window}, after step {window - 1}: reason {window}." for window in (1, 2, 3)]
    assert lines[3:] == ["\u2026 20 more skipped"]


def test_named_terms_are_shown_with_the_loss() -> None:
    stream = io.StringIO()
    screen = Console(stream)
    screen.start(logged.start())
    screen.step(logged.report(1, terms={"fit": 0.5, "energy": 0.25}), 1.0)
    assert "loss 0.75 (fit 0.5, energy 0.25), norm 1.5" in stream.getvalue()


def test_a_terminal_gets_a_bar_that_moves_a_few_times_a_second() -> None:
    with Terminal(100) as terminal:
        run(terminal.stream, windows=12, seconds=0.05)
    drawn = [part for part in terminal.text.split("\r") if "windows [" in part]
    assert 5 <= len(drawn) <= 14  # 0.6 s at ten a second, and what start, lines and end draw
    assert " 0/12 windows" in drawn[0]
    assert "12/12 windows" in drawn[-1]
    assert "loss 0.25, norm 1.5, " in drawn[-1]
    assert {len(part.rstrip("\n")) for part in drawn} <= {99, 100}  # as wide as the terminal, and no wider
    assert "\033[" not in terminal.text
    assert "\nstopped: 3 epochs done" in terminal.text


def test_a_bar_moves_without_any_report() -> None:
    with Terminal(80) as terminal:
        screen = Console(terminal.stream)
        screen.start(logged.start())
        for _ in range(4):
            time.sleep(0.11)
            screen.tick()
        screen.stop(logged.stop(4))
    assert [f"\r{count} windows [" in terminal.text for count in range(5)] == [True] * 5


@pytest.mark.parametrize("columns", [0, 1, 7, 30])
def test_a_narrow_terminal_breaks_nothing(columns: int) -> None:
    with Terminal(columns) as terminal:
        run(terminal.stream)
    assert "stopped: 3 epochs done" in terminal.text


def test_colours_are_there_on_a_terminal_only_and_never_with_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR")
    with Terminal(80) as terminal:
        run(terminal.stream)
    assert "\033[1mdigits\033[0m" in terminal.text
    stream = io.StringIO()
    run(stream)
    assert "\033" not in stream.getvalue()
    monkeypatch.setenv("TERM", "dumb")
    with Terminal(80) as terminal:
        run(terminal.stream)
    assert "\033" not in terminal.text
    assert "windows [" not in terminal.text


def test_a_terminal_that_hangs_up_breaks_nothing() -> None:
    master, slave = pty.openpty()
    stream = os.fdopen(slave, "w")
    screen = Console(stream)
    screen.start(logged.start())
    os.close(master)
    time.sleep(0.11)
    screen.tick()
    screen.step(logged.report(1), 0.1)
    screen.stop(logged.stop(1))
    with pytest.raises(OSError, match="Input/output error"):  # so it was gone indeed
        stream.close()


def test_a_closed_stream_breaks_nothing() -> None:
    stream = io.StringIO()
    screen = Console(stream)
    screen.start(logged.start())
    stream.close()
    screen.step(logged.report(1), 0.1)
    screen.stop(logged.stop(1))


def test_events_before_the_start_are_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    screen = Console()
    screen.tick()
    screen.step(logged.report(1), 0.1)
    screen.skip(logged.skipped(1, "a reason."))
    screen.evaluate(logged.evaluated(1, {"loss": 1.0}), None)
    screen.stop(logged.stop(1))
    assert capsys.readouterr() == ("", "")


PROGRAM = f"""
import sys, time
sys.path.insert(0, {str(Path(logged.__file__).parent)!r})
import logged
from trainer.loggers.console import Console
screen = Console()
screen.start(logged.start(1))
for window in range(2, 40):
    time.sleep(0.01)
    screen.evaluate(logged.evaluated(window, {{"loss": 0.5}}), None)
screen.stop(logged.stop(40))
sys.stderr.write("reached the end")
"""


def test_a_closed_pipe_neither_ends_the_run_nor_changes_its_exit_code() -> None:
    # Only a buffered stream has something left at the end of the program that cannot be written.
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-c", PROGRAM]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=buffered) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b"reached the end"
    assert process.returncode == 0


def test_an_encoding_without_the_signs_breaks_nothing() -> None:
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, env=environment, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"reached the end")
    assert b"window 2 x 32 rows = 64 rows" in done.stdout


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a disk that is always full")
def test_a_full_disk_is_told() -> None:
    from trainer.errors import TrainerError

    stream = open("/dev/full", "w")  # noqa: SIM115 (closed below, where it fails)
    screen = Console(stream)
    with pytest.raises(TrainerError, match=r"messages cannot be written to /dev/full .*free some space"):
        screen.start(logged.start())
    screen.stop(logged.stop(0))
    with pytest.raises(OSError, match="No space"):
        stream.close()


class Cell(io.StringIO):
    """A cell's output as a kernel gives it: no terminal, and a file number that is that of the server's terminal."""

    def fileno(self) -> int:
        return 1


Cell.__module__ = "ipykernel.iostream"


def test_a_notebook_gets_a_bar_drawn_over_seldom_and_without_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setattr(console, "DRAW_EVERY_IN_A_NOTEBOOK", 60.0)
    stream = Cell()
    run(stream, windows=60)
    text = stream.getvalue()
    assert "60/60 windows [" in text and "loss 0.25" in text and "\x1b" not in text
    assert "stopped: 3 epochs done" in text and "best: accuracy 0.98 at step 10" in text
    drawn = [part for part in text.split("\r") if "windows [" in part]
    assert 2 <= len(drawn) <= 10  # in these 1.2 s a terminal gets twice as many
    assert all(len(part.splitlines()[0]) <= 79 for part in drawn)


def test_what_fit_gives_back_reads_in_one_line() -> None:
    assert repr(logged.stop(6)) == (
        "Stop(3 epochs done: 6 steps, 0 skips, 2.0 s, loss 0.25, accuracy 0.97, best accuracy 0.98 at step 10)"
    )


def test_the_health_of_the_gradient_is_one_line_where_it_is_good_and_one_for_each_trouble_where_not() -> None:
    def end(*health: str) -> list[str]:
        stream = io.StringIO()
        screen = Console(stream)
        screen.start(logged.start())
        screen.stop(logged.stop(5, health=list(health)))
        return [line for line in stream.getvalue().splitlines() if "  gradient" in line or line.startswith("    ")]

    assert end() == []
    assert end("good: median norm 1") == ["  gradient health: good: median norm 1"]
    assert end("not well: skipped", "skipped: 1 of 5 windows", "median norm 1") == [
        "  gradient health: not well: skipped",
        "    skipped: 1 of 5 windows",
        "    median norm 1",
    ]
