"""What only a whole config can get wrong: keys that do not go together, and what a run cannot be without."""

import dataclasses
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from trainer import torchrun
from trainer.config.schema import RunConfig
from trainer.errors import ConfigError, did_you_mean

_ENDS = ("epochs", "steps", "rows", "time")
_LARGEST = 2**63 - 1
_NAME = re.compile(r"[^<>:\"/\\|?*\x00-\x1f]*[^<>:\"/\\|?*\x00-\x1f. ]")


def check(config: RunConfig, verb: str, recipes: Iterable[str]) -> None:
    """Raise ConfigError for the first thing that keeps the verb from running; `recipes` are those that exist."""
    words, settings = config.words, config.settings
    if words.recipe is None and config.nodes["model"] is None:
        raise ConfigError(f"there is no recipe: write recipe=NAME with one of: {', '.join(sorted(recipes))}.")
    for name in ("model", "objective", "optimizer", "source"):
        if config.nodes[name] is None:
            key = "data.source" if name == "source" else name
            raise ConfigError(f"{key} is missing: the recipe says it with a _target_.")
    if words.run is not None and not _NAME.fullmatch(words.run):
        raise ConfigError(f"run={words.run!r} is not possible: it becomes a folder, so it has to be a plain name.")
    _no_number_beyond_64_bits(dataclasses.asdict(settings), "")
    goes_on_from = words.resume if words.resume not in ("auto", "last", "never") else None
    if words.init is not None and goes_on_from is not None:
        raise ConfigError(
            "init and resume are both set: a run begins with a file's parameters or goes on from a checkpoint."
        )
    for key, file in (("init", words.init), ("resume", goes_on_from)):
        if file is not None and not Path(file).exists():
            near = f" {did_you_mean(file, ('auto', 'last', 'never'))[:-1]}, or" if key == "resume" else ""
            raise ConfigError(f"{key}={file}: there is no such file or folder:{near} name one that exists.")
    for package in words.trust:
        if not package.isidentifier():
            raise ConfigError(f"trust={package!r} is not possible: name a package without dots.")
    torchrun.check(settings.distributed, f"{torchrun.command(verb)} recipe={words.recipe} distributed=ddp")
    if verb != "train":
        return
    if all(getattr(settings.limits, name) is None for name in _ENDS):
        raise ConfigError(f"the run would never end: set one of {', '.join(f'limits.{name}' for name in _ENDS)}.")
    if settings.limits.patience is not None and settings.evaluation.every is None:
        raise ConfigError("limits.patience counts evaluations, and evaluation.every is null: set it to a number.")


def _no_number_beyond_64_bits(tree: Any, key: str) -> None:
    if isinstance(tree, dict):
        for name, value in tree.items():
            _no_number_beyond_64_bits(value, f"{key}.{name}" if key else name)
    elif isinstance(tree, int) and tree > _LARGEST:
        raise ConfigError(
            f"{key}={tree} is not possible: it is larger than 2^63 - 1, the largest whole number of torch."
        )
