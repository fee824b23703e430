"""scripts/train and scripts/test, run as they are on a small project of its own that needs no network and no torch."""

import ast
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
COMMANDS = sorted(path for path in SCRIPTS.iterdir() if path.is_file() and not path.suffix)

PYPROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]
[project]
name = "probe"
version = "0"
dependencies = []
[tool.pytest.ini_options]
testpaths = ["tests"]
"""

# A build backend in a few lines: an editable wheel that has the command `trainer` and finds this project and pytest.
BACKEND = """
import pathlib, time, tomllib, zipfile
def build_editable(folder, config_settings=None, metadata_directory=None):
    here = pathlib.Path(__file__).parent
    if (here / "slow").exists():
        (here / "begun").touch()
        while (here / "slow").exists():
            time.sleep(0.02)
    needs = tomllib.loads((here / "pyproject.toml").read_text())["project"]["dependencies"]
    needed = "".join(f"Requires-Dist: {name}\\n" for name in needs)
    info = {
        "METADATA": "Metadata-Version: 2.1\\nName: probe\\nVersion: 0\\n" + needed,
        "WHEEL": "Wheel-Version: 1.0\\nGenerator: probe\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n",
        "entry_points.txt": "[console_scripts]\\ntrainer = probe:main\\n",
    }
    with zipfile.ZipFile(pathlib.Path(folder) / "probe-0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("probe.pth", f"{here}\\n" + (here / "where-pytest-is").read_text())
        for name, text in info.items():
            wheel.writestr(f"probe-0.dist-info/{name}", text)
        names = ["probe.pth", *(f"probe-0.dist-info/{name}" for name in [*info, "RECORD"])]
        wheel.writestr("probe-0.dist-info/RECORD", "".join(f"{name},,\\n" for name in names))
    return "probe-0-py3-none-any.whl"
"""

# What `trainer` does there: it tells how it was started and leaves with the exit code in its last argument.
PROBE = """
import os, sys
def main():
    print(f"started {os.getpid()} in {os.getcwd()} with {sys.argv[1:]}")
    return int(sys.argv[-1])
"""

TEST = """
import os
def test_right(): print(f"tested in {os.getcwd()}")
def test_wrong(): raise ValueError
"""


def start(script: Path, *arguments: str, cwd: Path) -> "subprocess.Popen[str]":
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "PYTEST"))}
    environment |= {
        "PIP_NO_INDEX": "1",
        "PIP_CONFIG_FILE": os.devnull,
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "PYTEST_PLUGINS": "xdist.plugin",
    }
    return subprocess.Popen(
        [sys.executable, str(script), *arguments],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(script: Path, *arguments: str, cwd: Path) -> tuple[int, str, str]:
    process = start(script, *arguments, cwd=cwd)
    output, errors = process.communicate(timeout=180)
    return process.returncode, output, errors


def wait_for(path: Path) -> None:
    end = time.monotonic() + 180
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.02)


def first_line(process: "subprocess.Popen[str]") -> str:
    return process.stderr.readline() if process.stderr else ""


def make_project(folder: Path) -> Path:
    (folder / "tests").mkdir(parents=True)
    shutil.copytree(SCRIPTS, folder / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "pyproject.toml").write_text(PYPROJECT)
    (folder / "constraints.txt").write_text("# nothing is pinned\n")
    (folder / "backend.py").write_text(BACKEND)
    (folder / "probe.py").write_text(PROBE)
    (folder / "tests" / "test_it.py").write_text(TEST)
    (folder / "where-pytest-is").write_text(str(Path(pytest.__file__).parent.parent))
    return folder


def site_packages(project: Path) -> Path:
    return next(path for path in (project / ".venv").rglob("site-packages"))


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project on which both commands were started at the same moment while it had no .venv."""
    folder = make_project(tmp_path_factory.mktemp("a folder") / "project")
    first = start(folder / "scripts" / "train", "recipe=x", "5", cwd=folder)
    second = start(folder / "scripts" / "test", "-k", "right", cwd=folder)
    output, errors = first.communicate(timeout=180)
    assert first.returncode == 5, errors
    assert "with ['train', 'recipe=x', '5']" in output
    output, others = second.communicate(timeout=180)
    assert second.returncode == 0, others
    assert "1 passed" in output
    assert (errors + others).count("Making .venv") == 1
    assert (errors + others).count("Set up in") == 1
    assert "Another process is setting .venv up" in errors + others
    return folder


@pytest.fixture
def no_pip(project: Path) -> Iterator[None]:
    """While it lasts, the project's .venv has no pip, so whatever calls pip fails."""
    pip = site_packages(project) / "pip"
    pip.rename(pip.with_name("away"))
    yield
    pip.with_name("away").rename(pip)


def test_a_second_start_makes_nothing_and_passes_everything_on(project: Path, no_pip: None, tmp_path: Path) -> None:
    process = start(project / "scripts" / "train", "a=b", "--flag", "c d", "3", cwd=tmp_path)
    output, errors = process.communicate(timeout=180)
    assert process.returncode == 3
    assert errors == ""
    assert f"in {tmp_path.resolve()} with ['train', 'a=b', '--flag', 'c d', '3']" in output
    if os.name != "nt":
        assert f"started {process.pid} " in output  # the same process: signals and the exit code are the program's own


def test_tests_run_from_any_folder(project: Path, no_pip: None, tmp_path: Path) -> None:
    code, output, _ = run(project / "scripts" / "test", cwd=tmp_path)
    assert code == 1
    assert "1 failed, 1 passed" in output
    code, output, _ = run(project / "scripts" / "test", "tests/test_it.py", "-k", "right", "-s", cwd=tmp_path)
    assert code == 0
    assert f"tested in {project.resolve()}" in output
    assert "1 passed, 1 deselected" in output


def test_a_changed_pin_brings_the_venv_up_to_date(project: Path) -> None:
    kept = site_packages(project) / "added-by-the-user"
    kept.touch()
    (project / "constraints.txt").write_text("# still nothing\n")
    code, output, errors = run(project / "scripts" / "train", "0", cwd=project)
    assert code == 0
    assert "constraints.txt changed: bringing .venv up to date" in errors
    assert "with ['train', '0']" in output
    assert kept.exists()
    assert run(project / "scripts" / "train", "0", cwd=project)[2] == ""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM")
def test_a_copied_folder_gets_a_new_venv_and_a_set_up_can_be_stopped(project: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(project, copy, symlinks=True)
    (copy / ".venv" / "set-up.log").unlink()  # it appears again once the old .venv is cleared
    process = start(copy / "scripts" / "train", "0", cwd=copy)
    assert first_line(process).startswith("The project was moved or copied here")
    wait_for(copy / ".venv" / "set-up.log")
    process.terminate()
    output, _ = process.communicate(timeout=180)
    assert (process.returncode, output) == (128 + signal.SIGTERM, "")
    assert (copy / ".venv" / "set-up-state").read_bytes() == b""


def test_a_venv_of_the_users_own_is_left_alone(tmp_path: Path) -> None:
    folder = make_project(tmp_path / "project")
    own = folder / ".venv" / "pyvenv.cfg"
    own.parent.mkdir()
    own.write_text("home = elsewhere\n")
    code, output, errors = run(folder / "scripts" / "train", "0", cwd=folder)
    assert (code, output) == (1, "")
    assert "was not made by this script" in errors
    assert [path.name for path in own.parent.iterdir()] == ["pyvenv.cfg"]


@pytest.mark.parametrize("command", ["train", "test"])
def test_a_python_that_is_too_old_gets_one_sentence(command: str, tmp_path: Path) -> None:
    folder = make_project(tmp_path / "project")
    script = folder / "scripts" / command
    as_old = f"import runpy, sys; sys.version_info = (3, 8, 1); runpy.run_path({str(script)!r}, run_name='__main__')"
    result = subprocess.run([sys.executable, "-c", as_old], capture_output=True, text=True, timeout=180)
    assert result.returncode == 1
    assert result.stderr.startswith("This needs Python 3.11 or newer, and ")
    assert "is Python 3.8.1" in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (folder / ".venv").exists()


@pytest.mark.parametrize("name", ["train", "test", "environment.py"])
def test_any_python_can_read_what_says_that_it_is_too_old(name: str) -> None:
    tree = ast.parse((SCRIPTS / name).read_text(encoding="utf-8"), feature_version=(3, 4))
    for node in ast.walk(tree):
        assert not isinstance(node, ast.JoinedStr | ast.AnnAssign)
        if isinstance(node, ast.FunctionDef):
            assert node.returns is None
            assert all(argument.annotation is None for argument in node.args.args)


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path.name)
def test_every_command_can_be_started_and_says_what_it_is_for(path: Path) -> None:
    assert os.access(path, os.X_OK)
    text = path.read_text(encoding="utf-8")
    assert text.startswith("#!/usr/bin/env python3\n")
    first = (ast.get_docstring(ast.parse(text)) or "").split("\n")[0]
    assert first.endswith(".")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no lock that a child process inherits")
def test_a_kill_and_a_failure_leave_no_venv_that_looks_finished(project: Path) -> None:
    """The last test with this project, which it leaves unfinished."""
    train = project / "scripts" / "train"
    (project / "slow").touch()
    (project / "constraints.txt").write_text("# nothing again\n")
    killed = start(train, "0", cwd=project)
    wait_for(project / "begun")
    killed.kill()
    output, errors = killed.communicate(timeout=180)
    assert (killed.returncode, output) == (-signal.SIGKILL, "")
    assert "bringing .venv up to date" in errors

    waiting = start(train, "4", cwd=project)
    assert first_line(waiting) == "Another process is setting .venv up: waiting for it.\n"  # the killed one's pip
    (project / "slow").unlink()
    output, errors = waiting.communicate(timeout=180)
    assert waiting.returncode == 4, errors
    assert "The last set-up did not finish" in errors
    assert "with ['train', '4']" in output

    (project / "pyproject.toml").write_text(PYPROJECT.replace("dependencies = []", 'dependencies = ["not-to-be-had"]'))
    code, output, errors = run(train, "0", cwd=project)
    assert (code, output) == (1, "")
    assert "No matching distribution found for not-to-be-had" in errors
    assert "could not be installed" in errors
    assert "run the same command again" in errors
    assert "Traceback" not in errors
    assert (project / ".venv" / "set-up-state").read_bytes() == b""  # as after the kill: not finished
