"""A captured window's own config, with the changes of the command line: what its model and objective are rebuilt from.

Who may be trusted is said on the command line only, never by what lies in a file.
"""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from trainer.config import schema
from trainer.config.schema import RunConfig
from trainer.errors import ConfigError, did_you_mean

_ALONE: dict[str, Any] = {"trust": [], "accept": [], "init": None, "resume": None, "distributed": "none"}
"""What a config says of its run, and a window that is run again by itself does not take over."""


def config_of(saved: Mapping[str, Any], overrides: Sequence[str], path: Path) -> RunConfig:
    """The config that a window was caught with, checked. Raises ConfigError where no model can be made of it."""
    for name in ("model", "objective"):
        node = saved.get(name)
        if not isinstance(node, Mapping) or not isinstance(node.get("_target_"), str):
            raise ConfigError(
                f"{path.as_posix()} was captured by a Trainer or a Step made in Python, whose {name} this command "
                f'cannot make: call trainer.replay("{path.as_posix()}", model, objective).'
            )
    values = {**copy.deepcopy(dict(saved)), **_ALONE}
    for word in overrides:
        _change(values, word)
    return schema.read(values)


def _change(values: dict[str, Any], word: str) -> None:
    try:
        override = OverridesParser.create().parse_override(word)
    except HydraException as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"'{word}' cannot be read ({reason}): write key=value behind the path.") from None
    if override.is_sweep_override() or override.is_delete() or override.package is not None:
        raise ConfigError(f"'{word}': a captured window is run again with key=value, and no sweep, group or ~key.")
    *sections, last = override.key_or_group.split(".")
    inside: Any = values
    for section in sections:
        inside = _inside(inside, section, override.key_or_group)
    if not override.is_add():
        _inside(inside, last, override.key_or_group)
    inside[last] = override.value()


def _inside(tree: Any, name: str, key: str) -> Any:
    if not isinstance(tree, dict):
        raise ConfigError(f"there is no setting '{key}' in the config that the window was captured with.")
    if name not in tree:
        raise ConfigError(f"there is no setting '{key}': {did_you_mean(name, tree)}")
    return tree[name]
