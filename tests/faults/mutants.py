"""Mutants of a file, made by rule, and which tests kill them.

Rules: drop a statement, swap two neighbours, move a whole number by one, turn a comparison, `and` into `or`, `+` into
`-`, and take a `not` away. A mutant is killed when a test fails with it. One that lives shows a line that no test
needs.
"""

import ast
import copy
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
TARGETS = {
    "trainer/step.py": ["tests/test_step.py", "tests/test_step_state.py", "tests/test_skips.py"],
    "trainer/gradient/open_window.py": ["tests/test_open_window.py", "tests/test_step.py", "tests/test_step_state.py"],
    "trainer/data/windows.py": ["tests/test_windows.py"],
    "trainer/checkpoint/store.py": ["tests/test_store.py", "tests/faults/test_store_operations.py"],
    "trainer/checkpoint/disk.py": ["tests/test_store.py", "tests/faults/test_store_operations.py"],
}
_TURNED = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq}
_TURNED |= {ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In}


@dataclass
class Mutant:
    file: str
    line: int
    what: str
    source: str

    def __str__(self) -> str:
        return f"{self.file}, line {self.line}: {self.what}"


def mutants(file: str) -> Iterator[Mutant]:
    """All that the rules make of a file."""
    text = (ROOT / file).read_text(encoding="utf-8")
    tree = ast.parse(text)
    for index, node in enumerate(ast.walk(tree)):
        for change, (what, line) in _changes(node).items():
            mutated = copy.deepcopy(tree)
            inside = next(one for number, one in enumerate(ast.walk(mutated)) if number == index)
            _make(inside, change)
            source = ast.unparse(ast.fix_missing_locations(mutated))
            yield Mutant(file, line, what, source)


def _changes(node: ast.AST) -> dict[tuple, tuple[str, int]]:
    found: dict[tuple, tuple[str, int]] = {}
    if isinstance(node, ast.FunctionDef | ast.If | ast.For | ast.While | ast.With | ast.Try):
        for name in ("body", "orelse", "finalbody"):
            body = getattr(node, name, None)
            if not isinstance(body, list):
                continue
            for at, one in enumerate(body):
                if not _is_text(one) and not isinstance(one, ast.FunctionDef | ast.Raise | ast.Delete):
                    found[("drop", name, at)] = (f"dropped `{_short(one)}`", one.lineno)
                if at and not _is_text(body[at - 1]) and not _ends(body[at - 1]):
                    found[("swap", name, at)] = (f"`{_short(one)}` before `{_short(body[at - 1])}`", one.lineno)
    if isinstance(node, ast.Constant) and type(node.value) is int:
        found[("by one",)] = (f"{node.value} became {node.value + 1}", node.lineno)
    if isinstance(node, ast.Compare) and type(node.ops[0]) in _TURNED:
        found[("turn",)] = (f"turned `{_short(node)}`", node.lineno)
    if isinstance(node, ast.BoolOp):
        found[("other",)] = (f"and for or in `{_short(node)}`", node.lineno)
    if isinstance(node, ast.BinOp) and type(node.op) in (ast.Add, ast.Mult):
        found[("less",)] = (f"another sign in `{_short(node)}`", node.lineno)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        found[("not",)] = (f"no not in `{_short(node)}`", node.lineno)
    return found


def _make(node, change: tuple) -> None:
    kind, *where = change
    if kind == "drop":
        name, at = where
        getattr(node, name)[at] = ast.Pass()
    elif kind == "swap":
        name, at = where
        body = getattr(node, name)
        body[at - 1], body[at] = body[at], body[at - 1]
    elif kind == "by one":
        node.value += 1
    elif kind == "turn":
        node.ops[0] = _TURNED[type(node.ops[0])]()
    elif kind == "other":
        node.op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
    elif kind == "less":
        node.op = ast.Sub() if isinstance(node.op, ast.Add) else ast.Div()
    else:
        node.op = ast.UAdd()
        node.operand = ast.Call(ast.Name("bool", ast.Load()), [node.operand], [])


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _ends(node: ast.stmt) -> bool:
    return isinstance(node, ast.Return | ast.Raise | ast.Continue | ast.Break)


def _short(node: ast.AST) -> str:
    text = " ".join(ast.unparse(node).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


class _Finder:
    """Gives one module its mutated source."""

    def __init__(self, name: str, mutant: Mutant) -> None:
        self._name, self._mutant = name, mutant

    def find_spec(self, name: str, path: object = None, target: object = None):
        from importlib.machinery import ModuleSpec

        if name != self._name:
            return None
        spec = ModuleSpec(name, self, origin=str(ROOT / self._mutant.file))
        spec.has_location = True
        return spec

    def create_module(self, spec: object) -> None:
        return None

    def exec_module(self, module) -> None:
        exec(compile(self._mutant.source, str(ROOT / self._mutant.file), "exec"), module.__dict__)


def lives(mutant: Mutant, tests: list[str], seconds: float = 120.0) -> bool:
    """Whether all tests pass with it; one that hangs is killed by that. Forked, so torch is not imported again."""
    name = mutant.file.removesuffix(".py").replace("/", ".")
    assert name not in sys.modules, f"{name} is imported already: a mutant would not be seen"
    child = os.fork()
    if child == 0:
        sink = os.open(os.devnull, os.O_WRONLY)
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        signal.alarm(int(seconds))
        sys.meta_path.insert(0, _Finder(name, mutant))
        try:
            import pytest

            os.chdir(ROOT)
            code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "--no-header", *tests])
        except BaseException:
            code = 1
        os._exit(0 if code == 0 else 1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
