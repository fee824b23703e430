"""Where in the user's own code something happened: the file, the line and its text."""

import ast
import inspect
import linecache
import sys
import sysconfig
import textwrap
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType, TracebackType
from typing import Any

import torch

_PACKAGE = Path(__file__).resolve().parents[1]
_TORCH = Path(torch.__file__).resolve().parent
_STANDARD = Path(sysconfig.get_path("stdlib")).resolve()
_OWN: dict[str, bool] = {}


@dataclass(frozen=True, slots=True)
class Place:
    """A line of the user's code."""

    file: str
    line: int
    function: str

    @property
    def text(self) -> str:
        """The line itself; empty where the source is not there."""
        return linecache.getline(self.file, self.line).strip()

    def __str__(self) -> str:
        where = f"{_short(self.file)}:{self.line}"
        return f"{where} (`{self.text}`)" if self.text else where


def here(below: FrameType | CodeType | None = None) -> Place | None:
    """The innermost line of the user's code on the stack right now; only of what the frame `below`, or the innermost
    call of that code, has called."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame is not below and frame.f_code is not below:
        if _is_the_users(frame.f_code.co_filename):
            return Place(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name)
        frame = frame.f_back
    return None


def of(error: BaseException) -> Place | None:
    """The innermost line of the user's code that an exception came through."""
    found = None
    traceback: TracebackType | None = error.__traceback__
    while traceback is not None:
        code = traceback.tb_frame.f_code
        if _is_the_users(code.co_filename):
            found = Place(code.co_filename, traceback.tb_lineno, code.co_name)
        traceback = traceback.tb_next
    return found


def _is_the_users(file: str) -> bool:
    """Whether a file is neither torch's, the interpreter's nor ours. A notebook's cell is the user's."""
    known = _OWN.get(file)
    if known is None:
        known = _OWN[file] = _judge(file)
    return known


def _judge(file: str) -> bool:
    if file.startswith("<"):
        return file.startswith(("<ipython", "<stdin"))
    path = Path(file).resolve()
    if path.is_relative_to(_PACKAGE):
        return path.is_relative_to(_PACKAGE / "recipes")  # there in a wheel: written as a user would write them
    if path.is_relative_to(_TORCH):
        return False
    return not path.is_relative_to(_STANDARD) or "site-packages" in path.parts


def _short(file: str) -> str:
    """The path as one would type it from here, where it lies below."""
    path = Path(file)
    try:
        return path.resolve().relative_to(Path.cwd()).as_posix()
    except (ValueError, OSError):
        return path.as_posix()


def assigned(holder: Any, name: str, but_in: str = "") -> Place | None:
    """The line of the holder's class that sets its attribute: `self.name = …`. None where there is none, or several.

    Args:
        but_in: a method whose lines do not count.
    """
    found: set[Place] = set()
    for kind in type(holder).__mro__:
        try:
            file = inspect.getsourcefile(kind)
            lines, first = inspect.getsourcelines(kind)
            tree = ast.parse(textwrap.dedent("".join(lines)))
        except (OSError, TypeError, SyntaxError):
            continue
        if file is None or not _is_the_users(file):
            continue
        passed = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == but_in]
        left_out = {id(inner) for node in passed for inner in ast.walk(node)}
        for node in ast.walk(tree):
            if not isinstance(node, ast.Assign | ast.AnnAssign) or id(node) in left_out:
                continue
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(ast.unparse(part) == f"self.{name}" for target in targets for part in ast.walk(target)):
                found.add(Place(file, first + node.lineno - 1, kind.__name__))
    return found.pop() if len(found) == 1 else None
