"""The one door for `_target_`: whose code a config may call, and of which kind.

A name is judged before anything is imported: its top-level package must be trusted, or lie in the recipe's own folder.
What it turns out to be is judged before it is called. Hydra's own instantiate calls `torch.load` and `open`; this
does not.
"""

import dataclasses
import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from trainer.config.arguments import fits
from trainer.errors import ConfigError, TrainerError, did_you_mean

ROOMS = (
    "trainer.recipes", "trainer.optim", "trainer.data", "trainer.gradient.objective", "trainer.gradient.model_loss",
    "trainer.gradient.transforms",
    "trainer.loggers",
)  # fmt: skip
"""What of this package a config may name. Not all of it: `trainer.cli.main` could be told whom to trust."""

_WORDS = ("_target_", "_args_", "_partial_")


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a place takes of torch: names that begin with one of `rooms`, and there subclasses of `base`."""

    what: str
    rooms: tuple[str, ...]
    bases: tuple[str, ...]


KINDS = {
    "model": Kind("a subclass of torch.nn.Module", ("torch.nn.",), ("torch.nn.Module",)),
    "objective": Kind("a loss of torch.nn or torch.nn.functional", ("torch.nn.",), ("torch.nn.Module",)),
    "optimizer": Kind("a subclass of torch.optim.Optimizer", ("torch.optim.",), ("torch.optim.Optimizer",)),
    "source": Kind("a subclass of torch.utils.data.Dataset", ("torch.utils.data.",), ("torch.utils.data.Dataset",)),
    "schedule": Kind(
        "a subclass of torch.optim.lr_scheduler.LRScheduler",
        ("torch.optim.lr_scheduler.",),
        ("torch.optim.lr_scheduler.LRScheduler",),
    ),
    "argument": Kind(
        "a module, an optimizer or a dataset class",
        ("torch.nn.", "torch.optim.", "torch.utils.data."),
        ("torch.nn.Module", "torch.optim.Optimizer", "torch.utils.data.Dataset"),
    ),
    "other": Kind("nothing", (), ()),
}
"""The kinds of places. `argument` is a `_target_` inside another one's arguments; `other` takes nothing of torch."""


def folders_of(config_dir: Path | None) -> tuple[Path, ...]:
    """The recipe's own folders, whose modules are trusted."""
    return (config_dir, config_dir / "recipe") if config_dir is not None else ()


class Door:
    """Finds and calls what a config names.

    Args:
        trust: top-level packages that the user trusts.
        folders: the recipe's own folders, whose modules are trusted and importable.
    """

    def __init__(self, trust: Sequence[str] = (), folders: Sequence[Path] = ()) -> None:
        self.trust = tuple(trust)
        self.folders = tuple(str(folder.absolute()) for folder in folders)

    def judge(self, node: Any, key: str, kind: str) -> None:
        """Refuse a node, and whatever is nested in it, by its names alone. Nothing is imported. Raises ConfigError."""
        if isinstance(node, Mapping):
            if "_target_" in node:
                self._judge_name(node["_target_"], key, kind)
                for word in node:
                    if str(word).startswith("_") and str(word).endswith("_") and word not in _WORDS:
                        raise ConfigError(
                            f"{key}.{word} is not supported: beside _target_ there are _args_ and _partial_."
                        )
                if not isinstance(node.get("_partial_", False), bool):
                    raise ConfigError(f"{key}._partial_={node['_partial_']!r} is not possible: it is true or false.")
                if not isinstance(node.get("_args_", []), list):
                    raise ConfigError(f"{key}._args_={node['_args_']!r} is not possible: it is a list.")
            for word, value in node.items():
                self.judge(value, f"{key}.{word}", "argument")
        elif isinstance(node, list):
            for index, value in enumerate(node):
                self.judge(value, f"{key}.{index}", "argument")

    def _judge_name(self, name: Any, key: str, kind: str) -> None:
        parts = name.split(".") if isinstance(name, str) else []
        if len(parts) < 2 or not all(part.isidentifier() for part in parts):
            raise ConfigError(f"{key}._target_={name!r} is not a name: write package.module.Name.")
        top = parts[0]
        if top in self.trust:
            return
        if top == "trainer":
            if not name.startswith(tuple(f"{room}." for room in ROOMS)):
                raise ConfigError(
                    f"{key}._target_={name} is refused: of trainer, a config may name what is in {', '.join(ROOMS)}."
                )
        elif top == "torch":
            if not name.startswith(KINDS[kind].rooms or ("none of it",)):
                raise ConfigError(self._wrong_kind(name, key, kind))
        elif self._local(top) is None:
            raise ConfigError(
                f"{key}._target_={name} is refused, as it would run code of the package '{top}': if you trust it, "
                f"write {self._words(top)} on the command line."
            )

    def _wrong_kind(self, name: str, key: str, kind: str) -> str:
        return (
            f"{key}._target_={name} is refused: of torch, this place takes {KINDS[kind].what}; "
            f"if you trust this name all the same, write {self._words('torch')} on the command line."
        )

    def _words(self, top: str) -> str:
        return f"trust=[{','.join((*self.trust, top))}]"

    def _local(self, top: str) -> ModuleSpec | None:
        """Where the recipe's own folders have the module, without importing it."""
        if top in sys.stdlib_module_names:
            return None
        return PathFinder.find_spec(top, list(self.folders)) if self.folders else None

    def make(self, node: Mapping[str, Any], key: str, kind: str, *first: Any) -> Any:
        """Call what the node names, with `first` before its own arguments, which are made first where they are nodes.

        Raises ConfigError for what is refused, missing or does not fit; what the user's own code raises goes through.
        """
        self.judge(node, key, kind)
        target = self.find(node["_target_"], key, kind)
        positional = [*first, *(self._argument(value, f"{key}._args_") for value in node.get("_args_", ()))]
        keywords = {word: self._argument(value, f"{key}.{word}") for word, value in node.items() if word not in _WORDS}
        partial = bool(node.get("_partial_", False)) or (kind == "objective" and _is_loss_function(target))
        fits(target, node["_target_"], key, positional, keywords, partial)
        if partial:
            return functools.partial(target, *positional, **keywords) if positional or keywords else target
        try:
            return target(*positional, **keywords)
        except (TypeError, ValueError, RuntimeError, IndexError) as error:
            owner = _owner(target)
            if isinstance(error, TrainerError) or not owner.startswith(("torch.", *ROOMS[1:])):
                raise
            raise ConfigError(f"{key}: {node['_target_']} does not take these arguments: {error}") from error

    def _argument(self, value: Any, key: str) -> Any:
        if isinstance(value, Mapping):
            if "_target_" in value:
                return self.make(value, key, "argument")
            return {word: self._argument(inner, f"{key}.{word}") for word, inner in value.items()}
        return [self._argument(inner, key) for inner in value] if isinstance(value, list) else value

    def find(self, name: str, key: str, kind: str) -> Callable[..., Any]:
        """Import what a judged name means, and judge what it is. An exception of the user's own module goes through."""
        top, *rest = name.split(".")
        found: Any = self._import_top(top, key)
        module = top
        for part in rest:
            inner = getattr(found, part, None)
            if isinstance(found, ModuleType) and (inner is None or isinstance(inner, ModuleType)):
                inner = _submodule(f"{found.__name__}.{part}", inner)
                if inner is None:
                    names = [word for word in dir(found) if not word.startswith("_")]
                    raise ConfigError(f"{key}._target_={name}: {module} has no '{part}': {did_you_mean(part, names)}")
            elif inner is None:
                raise ConfigError(f"{key}._target_={name}: {module} has no '{part}'.")
            found, module = inner, f"{module}.{part}"
        if not callable(found):
            raise ConfigError(f"{key}._target_={name} is {type(found).__name__}, which cannot be called.")
        self._judge_thing(found, name, key, kind)
        return found  # type: ignore[no-any-return]

    def _import_top(self, top: str, key: str) -> ModuleType:
        for folder in reversed(self.folders):
            if folder not in sys.path:
                sys.path.insert(0, folder)
        try:
            module = importlib.import_module(top)
        except ModuleNotFoundError as error:
            if error.name != top:
                raise
            raise ConfigError(f"{key}: there is no package '{top}': install it, or look at the name.") from None
        if top not in (*self.trust, "trainer", "torch"):
            spec, ours = self._local(top), module.__spec__
            if spec is None or ours is None or spec.origin != ours.origin:
                raise ConfigError(
                    f"{key}: '{top}' is imported already from elsewhere than the recipe's folder: rename the module, "
                    f"or write {self._words(top)} on the command line if you trust that other one."
                )
        return module

    def _judge_thing(self, thing: Any, name: str, key: str, kind: str) -> None:
        """A trusted module also holds what it imported itself: what is called must be at home in a trusted place."""
        while isinstance(thing, functools.partial):
            thing = thing.func
        owner = _owner(thing)
        top = owner.split(".")[0]
        if top in self.trust or self._local(top) is not None or f"{owner}.".startswith(tuple(f"{r}." for r in ROOMS)):
            return
        if top == "torch":
            bases = tuple(_class(base) for base in KINDS[kind].bases)
            if isinstance(thing, type) and issubclass(thing, bases):
                return
            if kind in ("objective", "argument") and _is_loss_function(thing):
                return
            raise ConfigError(self._wrong_kind(name, key, kind))
        raise ConfigError(
            f"{key}._target_={name} is refused, as it comes from {owner}: if you trust it, "
            f"write {self._words(top)} on the command line."
        )


def _class(name: str) -> type:
    module, _, attribute = name.rpartition(".")
    found: type = getattr(importlib.import_module(module), attribute)
    return found


def _owner(thing: Any) -> str:
    """The module where a class or function was defined; for another object that of its class."""
    owner = getattr(thing, "__module__", None)
    if not isinstance(thing, type) and not inspect.isroutine(thing):
        owner = type(thing).__module__
    return owner or "builtins"


def _submodule(name: str, inner: Any) -> ModuleType | None:
    """The true submodule of that name: a module that only happens to be imported there is none."""
    if isinstance(inner, ModuleType):
        return inner if inner.__name__ == name else None
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        return None


def _is_loss_function(thing: Any) -> bool:
    name = getattr(thing, "__name__", "")
    return _owner(thing) == "torch.nn.functional" and (name.endswith(("_loss", "_div")) or "cross_entropy" in name)
