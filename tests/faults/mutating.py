"""Runs the tests on each mutant of a file: in a forked child of one warm process, and only tests that reach its line.

Everything is imported and collected once. A child puts the mutant's code into the functions that are there, runs the
tests that execute its statement, the quickest first and before them those that killed a neighbour, and ends with the
first that fails. What lies outside of functions cannot be changed so: there a child loads the file anew, before
anything else of the package. Nothing of the package may be imported in the process that calls this.
"""

import gc
import json
import os
import pickle
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
import types
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from mmap import mmap
from pathlib import Path
from typing import Any

from mutants import ROOT, Mutant, unchanged

BUDGET = 20.0
"""Seconds of tests for one mutant, by what they take without it; a test that takes more than LONGEST is left out."""
LONGEST = 3.0
_ENDLESS = 20.0
_MEMORY = 6 << 30
_QUIET = ["-q", "-s", "-p", "no:cacheprovider", "--no-header", "--disable-warnings"]


@dataclass
class Known:
    """Of a test: the lines of the file that it executes, and how long it takes."""

    item: Any
    lines: set[int] = field(default_factory=set)
    seconds: float = 0.0


def killers(file: str, tests: Sequence[str], chosen: Sequence[Mutant], at_once: int) -> Iterator[tuple[Mutant, str]]:
    """Each mutant and the test that killed it; "" for one that lives."""
    assert _module(file) not in sys.modules, f"{file} is imported already: a mutant would not be seen"
    outside = [mutant for mutant in chosen if not mutant.is_inside]
    inside = [mutant for mutant in chosen if mutant.is_inside]
    for number, killer in _answers(lambda say: _warm(file, tests, inside, at_once, say)) if inside else ():
        if killer is None:
            outside.append(inside[number])
        else:
            yield inside[number], killer
    for mutant in outside:
        yield mutant, "" if _loaded_lives(mutant, tests) else "a file loaded anew"


def _answers(act: Callable[[Callable[[Any], None]], None]) -> Iterator[Any]:
    """What a forked process says, while it says it."""
    read, write = os.pipe()
    child = _forked(lambda: act(lambda told: os.write(write, json.dumps(told).encode() + b"\n")))
    os.close(write)
    with open(read, encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
        raise RuntimeError("the process that runs the mutants ended with an error")


def _forked(act: Callable[[], None]) -> int:
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.setsid()
            act()
            code = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        os._exit(code)
    return child


def _silent() -> None:
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 1)
    os.dup2(sink, 2)


def _warm(file: str, tests: Sequence[str], chosen: Sequence[Mutant], at_once: int, say: Callable[[Any], None]) -> None:
    """The warm process: collects the tests, learns which lines each reaches, and forks workers for the mutants."""
    import pytest

    class Mutating:
        def pytest_runtestloop(self, session: Any) -> bool:
            known = _watched(session.items, str(ROOT / file))
            gc.freeze()
            workers = [
                _forked(lambda: _work(known, list(enumerate(chosen))[one::at_once], say))  # noqa: B023
                for one in range(at_once)
            ]
            ended = [os.waitpid(worker, 0)[1] for worker in workers]
            assert not any(ended), "a worker ended with an error"
            return True

    os.chdir(ROOT)
    kept = os.dup(1)
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 1)
    code = pytest.main([*_QUIET, *tests], plugins=[Mutating()])
    os.dup2(kept, 1)
    if code not in (0, 5):
        raise RuntimeError(f"the tests could not be collected ({code})")


def _watched(items: Sequence[Any], path: str) -> list[Known]:
    """The tests that pass, the quickest first, with the lines of the file that each executes."""
    with tempfile.TemporaryFile() as told:

        def watch() -> None:
            _silent()
            found = []
            for number, item in enumerate(items):
                lines: set[int] = set()

                def inside(frame: Any, event: str, _: Any, lines: set[int] = lines) -> Any:
                    lines.add(frame.f_lineno)
                    return inside

                def called(frame: Any, event: str, _: Any, lines: set[int] = lines) -> Any:
                    if frame.f_code.co_filename != path:
                        return None
                    lines.add(frame.f_lineno)
                    return inside

                began = time.process_time()  # on a busy machine the clock on the wall tells little
                threading.settrace(called)
                sys.settrace(called)
                passes = _passes(item, items[number + 1] if number + 1 < len(items) else None)
                sys.settrace(None)
                threading.settrace(None)  # type: ignore[arg-type]
                found.append((passes, lines, time.process_time() - began))
            pickle.dump(found, told)
            told.flush()

        os.waitpid(_forked(watch), 0)
        told.seek(0)
        found = pickle.load(told)
    known = [Known(item, lines, seconds) for item, (passes, lines, seconds) in zip(items, found, strict=True) if passes]
    return sorted((one for one in known if one.seconds < LONGEST), key=lambda one: one.seconds)


def _passes(item: Any, following: Any) -> bool:
    before = item.session.testsfailed
    item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
    item.session.shouldfail = item.session.shouldstop = False
    return item.session.testsfailed == before


def _work(known: Sequence[Known], mutants: Sequence[tuple[int, Mutant]], say: Callable[[Any], None]) -> None:
    kills: dict[str, Counter[int]] = {}
    sound: set[int] = set()
    at = mmap(-1, 8)
    for number, mutant in mutants:
        fits = [one for one in known if any(mutant.lines[0] <= line <= mutant.lines[1] for line in one.lines)]
        of_place = kills.setdefault(mutant.place, Counter())
        order = sorted(fits, key=lambda one: -of_place[id(one)])
        while sum(one.seconds for one in order) > BUDGET:
            order.remove(max(order, key=lambda one: one.seconds))
        killer = _killer(mutant, order, at)
        while isinstance(killer, int) and id(order[killer]) not in sound:
            # Its first kill: with the file as it is, the same tests in the same order must pass.
            failing = _killer(unchanged(mutant), order[: killer + 1], at)
            if not isinstance(failing, int):
                sound.add(id(order[killer]))
            else:
                known = [one for one in known if one is not order[failing]]
                order.pop(failing)
                killer = _killer(mutant, order, at)
        if isinstance(killer, int):
            of_place[id(order[killer])] += 1
            say((number, order[killer].item.nodeid))
        else:
            say((number, killer))


def _killer(mutant: Mutant, order: Sequence[Known], at: mmap) -> int | str | None:
    """Which test fails with it; "" where none does, None where its code does not fit the functions that are there."""
    if not order:
        return ""
    there = Path(tempfile.mkdtemp(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))

    def act() -> None:
        _silent()
        resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY, _MEMORY))
        try:
            _graft(mutant)
        except ValueError:
            os._exit(3)
        order[0].item.config._tmp_path_factory._basetemp = there
        for number, one in enumerate(order):
            at[0:8] = (number + 1).to_bytes(8, "little")
            if not _passes(one.item, order[number + 1].item if number + 1 < len(order) else None):
                os._exit(2)

    at[0:8] = (1).to_bytes(8, "little")
    child, test, since = _forked(act), 1, time.monotonic()
    try:
        while True:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                break
            now = int.from_bytes(at[0:8], "little")
            if now != test:
                test, since = now, time.monotonic()
            if time.monotonic() - since > _ENDLESS + 10 * order[test - 1].seconds:
                os.killpg(child, signal.SIGKILL)
                _, status = os.waitpid(child, 0)
                break
            time.sleep(0.002)
    finally:
        shutil.rmtree(there, ignore_errors=True)
    code = os.waitstatus_to_exitcode(status)
    if code == 3:
        return None
    return "" if code == 0 else int.from_bytes(at[0:8], "little") - 1


def _module(file: str) -> str:
    return file.removesuffix(".py").replace("/", ".")


def _graft(mutant: Mutant) -> None:
    """Put the mutant's code into the functions of the module that is there. ValueError where it does not fit."""
    name = _module(mutant.file)
    made = types.ModuleType(name)
    exec(compile(mutant.tree(), str(ROOT / mutant.file), "exec"), made.__dict__)
    _put(vars(sys.modules[name]), vars(made), name)


def _put(old: Any, new: Any, module: str) -> None:
    if isinstance(old, dict | types.MappingProxyType):
        for name, one in new.items():
            if name in old and one is not old[name]:
                _put(old[name], one, module)
    elif isinstance(old, type) and old.__module__ == module:
        _put(vars(old), vars(new), module)
    elif isinstance(old, types.FunctionType) and old.__module__ == module:
        if hasattr(old, "__wrapped__"):
            _put(old.__wrapped__, new.__wrapped__, module)
        else:
            old.__code__ = new.__code__
    elif isinstance(old, classmethod | staticmethod):
        _put(old.__func__, new.__func__, module)
    elif isinstance(old, property):
        for one in ("fget", "fset"):
            _put(getattr(old, one), getattr(new, one), module)


class _Finder:
    """Gives one module its mutated source."""

    def __init__(self, mutant: Mutant) -> None:
        self._mutant = mutant

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name != _module(self._mutant.file):
            return None
        spec = ModuleSpec(name, self, origin=str(ROOT / self._mutant.file))  # type: ignore[arg-type]
        spec.has_location = True
        return spec

    def create_module(self, spec: object) -> None:
        return None

    def exec_module(self, module: types.ModuleType) -> None:
        exec(compile(self._mutant.tree(), str(ROOT / self._mutant.file), "exec"), module.__dict__)


def _loaded_lives(mutant: Mutant, tests: Sequence[str], seconds: float = 120.0) -> bool:
    """Whether all tests pass where the file is loaded as the mutant has it."""

    def act() -> None:
        import pytest

        _silent()
        sys.meta_path.insert(0, _Finder(mutant))  # type: ignore[arg-type]
        os.chdir(ROOT)
        if pytest.main([*_QUIET, "-x", *tests]) != 0:
            os._exit(2)

    child, until = _forked(act), time.monotonic() + seconds
    while time.monotonic() < until:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status) == 0
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False
