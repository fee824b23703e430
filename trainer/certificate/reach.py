"""What lies inside an object that a run may change: attributes, closures, the globals that a function reads.

Of installed packages (torch and a few more apart) the objects are looked into, their code and its globals are not.
"""

import functools
import sys
import sysconfig
import types
from pathlib import Path
from typing import Any

from torch import nn

# Code that is the library's: what lies inside it is no state of the user's.
_LIBRARIES = ("torch", "numpy", "builtins", "typing", "collections", "functools", "threading", "logging", "trainer")
_STANDARD = tuple(sysconfig.get_path(one) for one in ("stdlib", "platstdlib"))


class Names:
    """The globals that a function reads."""

    def __init__(self, function: types.FunctionType) -> None:
        names = set(function.__code__.co_names)
        for constant in function.__code__.co_consts:
            if isinstance(constant, types.CodeType):
                names |= set(constant.co_names)
        self._globals = function.__globals__
        self._names = sorted(name for name in names if name in self._globals)

    def now(self) -> dict[str, Any]:
        return {name: self._globals[name] for name in self._names if name in self._globals}

    def put_back(self, contents: dict[str, Any]) -> None:
        self._globals.update(contents)


def inside(value: Any, path: str) -> list[tuple[str, Any]]:
    """Objects that can be reached from this one, each with the path to it."""
    if isinstance(value, types.FunctionType):
        return [] if _is_library(value.__module__) else _of_function(value, path, not is_installed(value.__module__))
    if isinstance(value, types.MethodType):
        return [(path, value.__self__), (path, value.__func__)]
    if isinstance(value, type):
        if is_installed(value.__module__):
            return []
        return [(join(path, key), item) for key, item in vars(value).items() if not key.startswith("__")]
    if isinstance(value, staticmethod | classmethod):
        return [(path, value.__func__)]
    if isinstance(value, property):
        return [(path, value.fget)]
    kind = type(value)
    found: list[tuple[str, Any]] = []
    if hasattr(value, "func") and hasattr(value, "keywords"):
        found += [(path, value.func), (path, value.args), (path, value.keywords)]
    known = isinstance(value, nn.Module) or not _is_library(kind.__module__) or _is_ours(kind)
    if not known:
        return found
    if hasattr(value, "__dict__"):
        found.append((path, vars(value)))
    for cls in kind.__mro__:
        slots = cls.__dict__.get("__slots__", ())
        names = [slots] if isinstance(slots, str) else slots
        found += [(join(path, name), getattr(value, name)) for name in names if hasattr(value, name)]
    found += [(path, cls) for cls in kind.__mro__ if not is_installed(cls.__module__)]
    return found


def _of_function(function: types.FunctionType, path: str, with_names: bool) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = [(path, item) for item in function.__defaults__ or ()]
    found += [(path, item) for item in (function.__kwdefaults__ or {}).values()]
    if function.__dict__:
        found.append((path, function.__dict__))
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    found += [(join(path, name), cell) for name, cell in cells]
    return [*found, (path, Names(function))] if with_names else found


@functools.cache
def is_installed(module: str | None) -> bool:
    """Whether code is the standard library's or that of an installed package."""
    if _is_library(module):
        return True
    file = getattr(sys.modules.get((module or "").split(".")[0]), "__file__", None)
    if file is None:  # a notebook's own names
        return False
    return file.startswith(_STANDARD) or not {"site-packages", "dist-packages"}.isdisjoint(Path(file).parts)


def _is_library(module: str | None) -> bool:
    return (module or "builtins").split(".")[0] in _LIBRARIES


def _is_ours(kind: type) -> bool:
    """Objectives of this package hold the user's loss; nothing else of the package is looked into."""
    return kind.__module__.startswith(("trainer.recipes.", "trainer.gradient.objective", "trainer.gradient.model_loss"))


def join(path: str, key: Any) -> str:
    if key in ("_parameters", "_buffers", "_modules", "__dict__"):
        return path
    return f"{path}.{key}" if path else str(key)
