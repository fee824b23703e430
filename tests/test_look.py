"""scripts/look, as far as it goes without a browser."""

import os
import stat
import subprocess
import sys
import urllib.request
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType

import logged
import pytest

from trainer.loggers.tensorboard import TensorBoard

LOOK = Path(__file__).resolve().parent.parent / "scripts" / "look"


def call(*words: str | Path, path: str | None = None) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ} if path is None else {**os.environ, "PATH": path}
    return subprocess.run(
        [sys.executable, str(LOOK), *map(str, words)], capture_output=True, text=True, timeout=120, env=environment
    )


@pytest.fixture
def run(tmp_path: Path) -> Path:
    board = TensorBoard(tmp_path / "sweep" / "0")
    board.start(logged.start(config={"seed": 1}))
    board.step(logged.report(1), 0.1)
    board.stop(logged.stop(1))
    return tmp_path / "sweep"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", list(sys.path))  # the script puts its folder on it
    loader = SourceFileLoader("look", str(LOOK))
    spec = spec_from_loader("look", loader)
    assert spec is not None
    module = module_from_spec(spec)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    loader.exec_module(module)
    return module


def pretender(folder: Path, code: str) -> Path:
    """A program that is taken for a browser."""
    program = folder / "browser"
    program.write_text(f"#!{sys.executable}\n{code}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return program


def test_wrong_words_are_refused() -> None:
    done = call()
    assert (done.returncode, done.stdout) == (2, "")
    assert "the following arguments are required: folder, pictures" in done.stderr
    done = call("runs", "pictures", "--pages", "graphs")
    assert done.returncode == 2 and "invalid choice: 'graphs'" in done.stderr
    done = call("runs", "pictures", "--size", "large")
    assert done.returncode == 2 and "large is no size: write it as 1400x900." in done.stderr


def test_a_folder_without_a_run_and_a_missing_browser_get_a_sentence(run: Path, tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    for folder in (tmp_path / "nowhere", tmp_path / "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        done = call(folder, pictures)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == (
            f"{folder} holds no run: name a folder with TensorBoard's event files in it or below it.\n"
        )
    done = call(run, pictures, path=str(tmp_path / "empty"))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("No browser was found (looked for chromium, ")
    assert "apt install chromium" in done.stderr and done.stderr.count("\n") == 1
    done = call(run, pictures, "--browser", "no-such-browser")
    assert done.returncode == 1
    assert done.stderr.startswith("The browser no-such-browser was not found: install one")
    assert not pictures.exists()


def test_a_browser_that_ends_at_once_gets_a_sentence_and_nothing_stays_behind(run: Path, tmp_path: Path) -> None:
    program = pretender(tmp_path, "raise SystemExit(3)")
    done = call(run, tmp_path / "pictures", "--browser", program)
    assert done.returncode == 1
    assert done.stderr.strip() in (f"{program} ended.", f"{program} did not start, or ended.")
    assert list((tmp_path / "pictures").iterdir()) == []


def test_a_real_tensorboard_is_there_for_as_long_as_it_is_looked_at(run: Path, script: ModuleType) -> None:
    with script.tensorboard(sys.executable, run) as address:
        assert address.startswith("http://127.0.0.1:")
        assert {"timeseries", "custom_scalars", "hparams", "text"} <= script.wait_for_data(address)
        assert script.get(f"{address}data/runs") == ["0"]
    with pytest.raises(urllib.request.URLError):  # type: ignore[attr-defined]
        script.get(f"{address}data/runs")


def test_a_picture_is_taken_once_the_page_stands_still(tmp_path: Path, script: ModuleType) -> None:
    # Speaks the protocol as a browser does: events in between, a refusal, and a page that changes at first.
    code = """
import base64, json, os
came, taken = b"", 0
def say(message):
    os.write(4, json.dumps(message).encode() + b"\\0")
while True:
    while b"\\0" not in came:
        came += os.read(3, 1 << 16)
    text, _, came = came.partition(b"\\0")
    asked = json.loads(text)
    answers = {"Target.createTarget": {"targetId": "t"}, "Target.attachToTarget": {"sessionId": "s"}}
    answer = {"id": asked["id"], "result": answers.get(asked["method"], {})}
    if asked["method"] == "Page.captureScreenshot":
        taken += 1
        say({"method": "Page.loadEventFired"})
        answer["result"] = {"data": base64.b64encode(b"picture %d" % min(taken, 7)).decode()}
        if taken == 2:
            answer = {"id": asked["id"], "error": {"message": "Not attached to an active page"}}
    say(answer)
    if asked["method"] == "Browser.close":
        break
"""
    with script.Browser(str(pretender(tmp_path, code)), (800, 600)) as browser:
        assert browser.picture("http://127.0.0.1/#timeseries") == b"picture 7"
        number = browser._number
    # Nine pictures, one of them refused, and five other messages: closing came after them.
    assert number >= 3 + 9
    assert browser._process.returncode == 0
    assert not Path(browser._folder.name).exists()
