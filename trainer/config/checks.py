"""What only a whole config can get wrong: keys that do not go together, and what a run cannot be without."""

import re
from collections.abc import Iterable

from trainer.config.schema import RunConfig
from trainer.errors import ConfigError

_ENDS = ("epochs", "steps", "rows", "time", "patience")
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
    for key, name in (("run", words.run), ("recipe", words.recipe)):
        if name is not None and not _NAME.fullmatch(name.replace("/", "")):
            raise ConfigError(f"{key}={name!r} is not possible: it becomes a folder, so it has to be a plain name.")
    if words.run is not None and "/" in words.run:
        raise ConfigError(f"run={words.run!r} is not possible: it becomes one folder, so it has no slash.")
    for package in words.trust:
        if not package.isidentifier():
            raise ConfigError(f"trust={package!r} is not possible: name a package without dots.")
    if verb != "train":
        return
    if all(getattr(settings.limits, name) is None for name in _ENDS):
        raise ConfigError(f"the run would never end: set one of {', '.join(f'limits.{name}' for name in _ENDS)}.")
    if settings.limits.patience is not None and settings.evaluation.every is None:
        raise ConfigError("limits.patience counts evaluations, and evaluation.every is null: set it to a number.")
    if words.init is not None and words.resume not in (None, "never"):
        raise ConfigError("init and resume are both set: a run begins with a file's parameters or goes on from a checkpoint.")
