"""Hydra's loader with our rules. What is private of Hydra (1.3) is used here and in hydra_app.py, and nowhere else.

Each file is judged as it is merged, and Hydra's errors become one sentence.
"""

import os
import re
from collections.abc import Callable, Sequence
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.default_element import GroupDefault
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from trainer.config import resolvers, schema
from trainer.config.sentences import Known, already, explain
from trainer.errors import ConfigError, TrainerError

OVERLAYS = ("recipe", "experiment", "sweep", "debug")
_MACHINE = (("local/default", "train"),)  # the file of one's own machine, where the root config takes it
_OF_HYDRA = ("mode", "run", "sweep")  # and these: what a file that is not the user's own may say of Hydra
_OF_PLUGINS = {
    "sweeper": ("params", "n_trials", "n_jobs", "direction", "max_failure_rate"),
    "launcher": ("n_jobs", "timeout_min", "cpus_per_task", "gpus_per_node", "mem_gb", "partition", "array_parallelism"),
}


class Loader(ConfigLoaderImpl):
    """Hydra's loader with one more rule for each file, the recipe's name in the config, and errors as ConfigError."""

    check: Callable[[DictConfig], None] | None = None
    """Called with each job of a sweep before the first of them runs."""
    _name: str | None = None
    _overrides: Sequence[Override] = ()
    _merged: DictConfig | None = None

    def load_configuration(
        self,
        config_name: str | None,
        overrides: list[str],
        run_mode: RunMode,
        from_shell: bool = True,
        validate_sweep_overrides: bool = True,
    ) -> DictConfig:
        self._name, self._overrides, self._merged = config_name, (), None
        try:
            self._overrides = OverridesParser.create().parse_overrides(overrides)
            self._adds_are_new()
            config = super().load_configuration(config_name, overrides, run_mode, from_shell, validate_sweep_overrides)
            if "recipe" in config:
                config.recipe = config.hydra.runtime.choices.get("recipe")
            return config
        except TrainerError:
            raise
        except Exception as error:  # composing runs no code of the user's: whatever it raises is about the config
            if os.environ.get("HYDRA_FULL_ERROR") == "1":
                raise
            raise ConfigError(explain(error, overrides, self.known)) from None

    def load_sweep_config(self, master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        resolvers.register()  # a launcher may have brought us into another process
        config = super().load_sweep_config(master_config, sweep_overrides)
        if self.check is not None:
            self.check(config)
        return config

    def _load_single_config(self, default: Any, repo: Any) -> Any:
        result = super()._load_single_config(default, repo)
        path, shipped = str(default.config_path), result.provider not in ("main", "command-line")
        if path.startswith("hydra/") and not shipped and path.rpartition("/")[0] not in self._by_hand():
            raise ConfigError(f"{default.parent}.yaml takes {path}.yaml, and what Hydra calls only you can choose.")
        users = default.primary or path.startswith("hydra/") or (path, default.parent) in _MACHINE
        if users or not isinstance(result.config, DictConfig):
            return result
        if "trust" in result.config and path != "schema":
            raise ConfigError(
                f"{path}.yaml says whom to trust, and only you can: take it out there and, if you trust its code, "
                "write trust=[PACKAGE] on the command line."
            )
        if not shipped:
            if result.provider != "main":  # those are the package's own: its sweeps choose plugins
                _leaves_hydra_alone(path, result.config)
            if path.split("/")[0] in OVERLAYS:
                self._yield_to_choices(repo, path, result.config)
        return result

    def _compose_config_from_defaults_list(self, defaults: Any, repo: Any) -> DictConfig:
        self._merged = super()._compose_config_from_defaults_list(defaults, repo)
        return self._merged

    def _adds_are_new(self) -> None:
        """Hydra takes `+key` for a key that is there when its value is a list; for us it is the same mistake."""
        tree = schema.defaults()
        for override in self._overrides:
            node: Any = tree
            for part in override.key_or_group.split("."):
                node = node.get(part) if isinstance(node, dict) else None
            if override.is_add() and isinstance(node, list):
                raise ConfigError(already(override.key_or_group))

    def _yield_to_choices(self, repo: Any, path: str, config: DictConfig) -> None:
        """An overlay's values for a group belong to the option that it takes; another one by hand ends them."""
        root = repo.load_config(self._name)
        takes = {str(d.group): d.value for d in root.defaults_list if isinstance(d, GroupDefault)}
        by_hand = self._by_hand()
        for default in repo.load_config(path).defaults_list:
            if isinstance(default, GroupDefault) and default.override:
                takes[str(default.group).strip("/")] = default.value
        for group in [name for name in takes if name in config and name not in OVERLAYS]:
            # An overlay that takes no option (null) says the whole itself, and yields as well.
            if isinstance(by_hand.get(group), str) and by_hand[group] != takes[group] and self.get_group_options(group):
                if group == "data":
                    config.data.pop("source", None)
                else:
                    config.pop(group)

    def _by_hand(self) -> dict[str, Any]:
        """What the command line says, by key or group."""
        return {o.key_or_group: o.value() for o in self._overrides if not o.is_sweep_override() and not o.is_delete()}

    def known(self) -> Known:
        """The keys and groups that there are: what a wrong name is held against."""
        merged = OmegaConf.to_container(self._merged) if self._merged is not None else schema.defaults()
        groups = {name: self.get_group_options(name) for name in (*OVERLAYS, *self.list_groups("")) if name != "hydra"}
        return Known({str(key): value for key, value in dict(merged).items()}, groups)  # type: ignore[arg-type]


def _leaves_hydra_alone(path: str, config: DictConfig) -> None:
    """Hydra calls what its own node names (launchers, callbacks, log handlers): a recipe must not."""
    node = config.get("hydra") or {}
    for key in node:
        if key not in _OF_HYDRA and not _is_plain(node[key], _OF_PLUGINS.get(str(key), ())):
            plain = [f"{name}.{word}" for name, words in _OF_PLUGINS.items() for word in words]
            raise ConfigError(
                f"{path}.yaml sets hydra.{key}, where it may only set {', '.join((*_OF_HYDRA, *plain))} "
                "(plain values): set it on the command line or in your own root config."
            )
    # The sweeper's parameters become words like those of the command line, and must not say what only that may say.
    for word in OmegaConf.select(config, "hydra.sweeper.params") or ():
        if not re.fullmatch(r"\+{0,2}(?!trust\b|hydra\b)[A-Za-z_][\w./@:]*", str(word)):
            raise ConfigError(f"{path}.yaml sweeps over '{word}', which only you can say: do it on the command line.")


def _is_plain(node: Any, allowed: Sequence[str]) -> bool:
    """Whether a node has only these keys, with numbers and words: nothing Hydra would build, no pointer to such."""
    return isinstance(node, DictConfig) and all(
        key in allowed
        and (key == "params" or not (OmegaConf.is_interpolation(node, key) or OmegaConf.is_config(node._get_node(key))))
        for key in map(str, node)
    )
