"""Makes .venv, or brings it up to date: the pins of constraints.txt and this project, editable. Not a command.

A .venv counts as finished only by its state file, written last. Whoever works on it holds a lock, and so do the pip
processes that it starts: they inherit it, so that even after a kill nobody else begins while one is still writing.
"""

import collections
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import IO

import environment

ROOT = Path(environment.ROOT)
VENV = Path(environment.VENV)
STATE = Path(environment.STATE)
LOG = VENV / "set-up.log"
NO_VENV = (
    "A virtual environment could not be made.",
    "A Python that comes in parts may lack this one (Debian and Ubuntu: apt install python3-venv); then",
)
NO_PACKAGES = (
    "The pinned packages could not be installed.",
    "Check the network and the space on the disk, then",
)
LOCK = ROOT / ".venv.lock"
DOWNLOAD = re.compile(r"\s*Downloading (?:\S*/)?(\S+) \((\d+(?:\.\d+)? (kB|MB|GB))\)")
LARGE_MB = 20.0


class SetUpError(Exception):
    """Says what failed and what to do."""


def make(wanted: bytes) -> int:
    """Make .venv what `wanted` (environment.wanted_state) describes. Returns an exit code, 0 when it is."""
    before = signal.signal(signal.SIGTERM, _leave)
    try:
        with _locked() as lock:
            if not environment.is_made(wanted):
                _make(wanted, lock)
        return 0
    except SetUpError as error:
        _say(str(error))
        return 1
    except OSError as error:
        _say(f"Set-up failed: {error}. Put that right and run the same command again.")
        return 1
    except KeyboardInterrupt:
        _say("Set-up stopped. The same command starts it again.")
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _make(wanted: bytes, lock: int) -> None:
    started = time.monotonic()
    python = ".".join(str(part) for part in sys.version_info[:3])
    reason = _why_anew(wanted)
    if reason is None:
        _say("pyproject.toml or constraints.txt changed: bringing .venv up to date, which takes seconds to minutes.")
        STATE.write_bytes(b"")
    else:
        _say(f"{reason} .venv with Python {python} and the versions of constraints.txt: 1 to 10 minutes, mostly torch.")
        _clear()
    with LOG.open("w", encoding="utf-8") as log:
        if reason is not None:
            base = getattr(sys, "_base_executable", None) or sys.executable  # not a .venv that is about to be replaced
            _call([base, "-m", "venv", str(VENV)], log, lock, NO_VENV)
        pip = [environment.path_of("python"), "-m", "pip", "install", "--constraint", "constraints.txt"]
        builders = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["build-system"]["requires"]
        if builders:
            _call([*pip, *builders], log, lock, NO_PACKAGES)
        # Without isolation, so that what builds is pinned too: this project, and packages that come as source only.
        _call([*pip, "--no-build-isolation", "--editable", ".[dev]"], log, lock, NO_PACKAGES)
    finished = STATE.with_suffix(".new")
    finished.write_bytes(wanted)
    finished.replace(STATE)
    _say(f"Set up in {time.monotonic() - started:.0f} s. From now on this command starts at once.")


def _why_anew(wanted: bytes) -> str | None:
    """How to begin the sentence that says why .venv is made from nothing, or None where an update will do."""
    if not VENV.exists() or not any(VENV.iterdir()):
        return "Making"
    if not STATE.exists():
        raise SetUpError(
            f"{VENV} was not made by this script, so it is left as it is: move it away and run the same command again, "
            "or use it yourself after `pip install --editable .` in it."
        )
    if not STATE.read_bytes() or not Path(environment.path_of("python")).exists():
        return "The last set-up did not finish: making"
    root, python, *_ = STATE.read_bytes().split(b"\n", 2)
    wanted_root, wanted_python, *_ = wanted.split(b"\n", 2)
    if root != wanted_root:
        return "The project was moved or copied here, which a virtual environment does not survive: making"
    if python != wanted_python:
        return f"The last .venv was for {python.decode(errors='replace')}: making"
    return None


def _clear() -> None:
    """Leave .venv with nothing but the empty state file, which marks it as made by this script and not finished."""
    VENV.mkdir(exist_ok=True)
    STATE.write_bytes(b"")
    for entry in VENV.iterdir():
        if entry == STATE:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _call(command: list[str], log: IO[str], lock: int, failure: tuple[str, str]) -> None:
    """Run one command of the set-up: its output to the log, its progress to the screen, SetUpError if it fails."""
    hidden = ("PYTHONPATH", "PYTHONHOME")  # pip would take what lies there for installed in .venv
    variables = {name: value for name, value in os.environ.items() if name not in hidden}
    variables |= {
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "PIP_NO_INPUT": "1",
        "PIP_ROOT_USER_ACTION": "ignore",
        "PYTHONIOENCODING": "utf-8",
        "PYTHONNOUSERSITE": "1",
    }
    errors: list[str] = []
    last: collections.deque[str] = collections.deque(maxlen=5)
    progress = _Progress()
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=variables,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        pass_fds=() if os.name == "nt" else (lock,),
        process_group=None if os.name == "nt" else 0,
    ) as process:
        try:
            for line in process.stdout or ():
                log.write(line)
                log.flush()
                progress.show(line)
                if line.strip():
                    last.append(line.strip())
                if line.startswith("ERROR"):
                    errors.append(line.strip())
        except BaseException:
            _kill(process)
            raise
        finally:
            progress.clear()
    if process.returncode != 0:
        what, advice = failure
        for line in errors[:5] or last:
            _say(f"  {line[:300]}")
        raise SetUpError(f"{what} {advice} run the same command again: it starts anew. All that was said is in {LOG}.")


def _kill(process: subprocess.Popen[str]) -> None:
    """End a command with all that it has started: they must not go on writing into .venv."""
    if sys.platform == "win32":
        process.kill()
    else:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # it has ended already
            os.killpg(process.pid, signal.SIGKILL)


class _Progress:
    """pip's progress in one line that is written over, or where there is no screen in a line for each large thing."""

    def __init__(self) -> None:
        self._screen = sys.stderr.isatty()
        self._found = 0

    def show(self, line: str) -> None:
        """Show what a line of pip's output says, if it says something worth showing."""
        words = line.split()
        large = False
        if line.startswith("Collecting "):
            self._found += 1
            text = f"package {self._found}: {words[1]}"
        elif download := DOWNLOAD.match(line):
            name, size, unit = download.groups()
            large = unit == "GB" or (unit == "MB" and float(size.split()[0]) >= LARGE_MB)
            text = f"downloading {name} ({size})"
        elif line.startswith("Installing collected packages:"):
            large = len(words) > 20
            text = f"installing {len(words) - 3} package{'s' if len(words) > 4 else ''}"
        else:
            return
        if self._screen:
            width = shutil.get_terminal_size().columns - 1
            sys.stderr.write("\r" + f"  {text}"[:width].ljust(width))
            sys.stderr.flush()
        elif large:
            _say(f"  {text}")

    def clear(self) -> None:
        """Take the line off the screen."""
        if self._screen:
            sys.stderr.write("\r" + " " * (shutil.get_terminal_size().columns - 1) + "\r")
            sys.stderr.flush()


@contextlib.contextmanager
def _locked() -> Iterator[int]:
    """Hold the lock on .venv; yields its descriptor. Waits, and says so, while another process holds it."""
    with LOCK.open("a+b") as file:
        told = False
        while not _try_lock(file.fileno()):
            if not told:
                _say("Another process is setting .venv up: waiting for it.")
                told = True
            time.sleep(0.2)
        yield file.fileno()


def _try_lock(descriptor: int) -> bool:
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
