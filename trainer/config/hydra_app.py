"""Composing and running through Hydra. All that is private of Hydra (1.3) is used in this file and nowhere else.

Hydra's own main is not: no released version of it parses a word on Python 3.14 (hydra issue 3121), and it reports
errors in its own way, with exit code 1. So the loader is a subclass that judges each file as it is merged and turns
Hydra's errors into one sentence, and `run` is what `hydra.main` does, without its reporting.
"""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from hydra import version
from hydra._internal.callbacks import Callbacks
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.config_store import ConfigStore
from hydra.core.default_element import GroupDefault
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.utils import run_job
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig, OmegaConf

from trainer.config import schema
from trainer.config.sentences import Known, already, explain
from trainer.errors import ConfigError, TrainerError

OVERLAYS = ("recipe", "experiment", "sweep", "debug")
WRITE_NOTHING = ("hydra.run.dir=.", "hydra.output_subdir=null")
_OF_HYDRA = ("mode", "run", "sweep")  # and sweeper.params: what a file that is not the user's own may say of Hydra


def register() -> None:
    """Tell Hydra the schema and the resolvers of the root config. Called again it changes nothing."""
    version.setbase("1.3")
    OmegaConf.register_new_resolver("run_folder", _run_folder, replace=True, use_cache=True)
    OmegaConf.register_new_resolver("sweep_folder", _sweep_folder, replace=True, use_cache=True)
    tree = schema.defaults()
    # A term's or a logger's name is the user's to choose: these two take new keys without a `+`.
    tree["gradient"]["coefficients"] = DictConfig({}, flags={"struct": False})
    tree["loggers"]["others"] = DictConfig({}, flags={"struct": False})
    ConfigStore.instance().store(name="schema", node=tree, provider="trainer")


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
            raise ConfigError(explain(error, overrides, self._known)) from None

    def load_sweep_config(self, master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        config = super().load_sweep_config(master_config, sweep_overrides)
        if self.check is not None:
            self.check(config)
        return config

    def _load_single_config(self, default: Any, repo: Any) -> Any:
        result = super()._load_single_config(default, repo)
        path = str(default.config_path)
        if default.primary or path.split("/")[0] in ("local", "hydra") or not isinstance(result.config, DictConfig):
            return result
        if "trust" in result.config and path != "schema":
            raise ConfigError(
                f"{path}.yaml says whom to trust, and only you can: take it out there and, if you trust its code, "
                "write trust=[PACKAGE] on the command line."
            )
        if result.provider in ("main", "command-line"):
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
        """An overlay's values for a group belong to the option that it takes: another one by hand does away with them."""
        root = repo.load_config(self._name)
        takes = {d.group: d.value for d in root.defaults_list if isinstance(d, GroupDefault)}
        by_hand = {o.key_or_group: o.value() for o in self._overrides if not o.is_sweep_override() and not o.is_delete()}
        for default in repo.load_config(path).defaults_list:
            if isinstance(default, GroupDefault) and default.override:
                takes[default.group.strip("/")] = default.value
        for group in [name for name in takes if name in config and name not in OVERLAYS]:
            # An overlay that takes no option (null) says the whole itself, and yields as well.
            if isinstance(by_hand.get(group), str) and by_hand[group] != takes[group] and self.get_group_options(group):
                if group == "data":
                    config.data.pop("source", None)
                else:
                    config.pop(group)

    def _known(self) -> Known:
        """The keys and groups that there are: what a wrong name is held against."""
        merged = OmegaConf.to_container(self._merged) if self._merged is not None else schema.defaults()
        groups = {name: self.get_group_options(name) for name in (*OVERLAYS, *self.list_groups("")) if name != "hydra"}
        return Known(merged if isinstance(merged, dict) else {}, groups)


def _leaves_hydra_alone(path: str, config: DictConfig) -> None:
    """Hydra calls what its own node names (launchers, callbacks, log handlers): a recipe must not name it."""
    node = config.get("hydra") or {}
    for key in node:
        if key not in _OF_HYDRA and not (key == "sweeper" and set(node[key]) <= {"params"}):
            raise ConfigError(
                f"{path}.yaml sets hydra.{key}, and of hydra it may only set {', '.join(_OF_HYDRA)} and sweeper.params: "
                "set it on the command line or in your own root config."
            )


@contextmanager
def opened(config_dir: Path | None) -> Iterator[tuple[Hydra, Loader]]:
    """Hydra over the shipped configs, with those of `config_dir` before them."""
    register()
    search_path = create_config_search_path("pkg://trainer.configs")
    if config_dir is not None:
        if not config_dir.is_dir():
            raise ConfigError(f"--config-dir {config_dir}: there is no such folder.")
        search_path.prepend("command-line", f"file://{config_dir.absolute()}", SearchPathQuery(provider="schema"))
        # Hydra puts it before the schema, that is behind the shipped ones: one's own file must win over a shipped one.
        entries = search_path.get_path()
        entries.insert(1, entries.pop([entry.provider for entry in entries].index("command-line")))
    loader = Loader(search_path)
    hydra = Hydra(task_name="trainer", config_loader=loader)
    GlobalHydra.instance().clear()
    GlobalHydra.instance().initialize(hydra)
    try:
        yield hydra, loader
    finally:
        GlobalHydra.instance().clear()


def compose(loader: Loader, name: str, overrides: Sequence[str]) -> DictConfig:
    """One job's whole config."""
    return loader.load_configuration(name, list(overrides), RunMode.RUN)


def composed(config: DictConfig) -> dict[str, Any]:
    """The job's part of a whole config as plain values, resolved."""
    HydraConfig.instance().set_config(config)
    return values(OmegaConf.masked_copy(config, [key for key in config if key != "hydra"]))


def values(job: DictConfig) -> dict[str, Any]:
    """A job's config as plain values, resolved. Raises ConfigError where something is missing or points nowhere."""
    try:
        resolved = OmegaConf.to_container(job, resolve=True, throw_on_missing=True)
    except Exception as error:  # OmegaConf has many, and what a resolver raises comes through
        raise ConfigError(explain(error, (), lambda: Known({}, {}))) from None
    return {str(key): value for key, value in dict(resolved).items()}  # type: ignore[arg-type]


def sweeps(loader: Loader, name: str, overrides: Sequence[str], multirun: bool) -> bool:
    """Whether to sweep: by the flag, or because a config says hydra.mode."""
    if multirun:
        return True
    if not any("hydra.mode" in word or word.lstrip("+").startswith(("sweep=", "experiment=")) for word in overrides):
        return False
    config = loader.load_configuration(name, list(overrides), RunMode.MULTIRUN, validate_sweep_overrides=False)
    return config.hydra.mode == RunMode.MULTIRUN


def run(loader: Loader, config: DictConfig, task: Callable[[DictConfig], Any]) -> None:
    """One job in its own folder, with Hydra's callbacks around it."""
    OmegaConf.set_readonly(config.hydra, False)  # HydraConfig made it so when the config was checked
    config.hydra.mode = RunMode.RUN
    callbacks = Callbacks(config)
    callbacks.on_run_start(config=config, config_name=config.hydra.job.config_name)
    context = HydraContext(config_loader=loader, callbacks=callbacks)
    job = run_job(
        task_function=task, config=config, job_dir_key="hydra.run.dir", job_subdir_key=None, hydra_context=context
    )
    callbacks.on_run_end(config=config, config_name=config.hydra.job.config_name, job_return=job)
    job.return_value  # raises what the job raised  # noqa: B018


def multirun(hydra: Hydra, name: str, overrides: Sequence[str], task: Callable[[DictConfig], Any]) -> None:
    """All jobs of a sweep, by the configured sweeper and launcher."""
    words = [word for word in overrides if not word.startswith("hydra.mode=")]
    hydra.multirun(config_name=name, task_function=task, overrides=[*words, "hydra.mode=MULTIRUN"])


def this_job() -> tuple[Path, int | None, list[str]]:
    """The folder of the job that runs now, its number in a sweep, and its overrides."""
    node = HydraConfig.get()
    number = None if OmegaConf.is_missing(node.job, "num") else int(node.job.num)
    return Path(node.runtime.output_dir), number, list(node.overrides.task)


def show(hydra: Hydra, loader: Loader, name: str, options: Any) -> None:
    """Print the config, as --cfg, --package and --resolve ask."""
    config = compose(loader, name, options.overrides)
    if options.package not in (None, "_global_"):
        HydraConfig.instance().set_config(config)
        if OmegaConf.select(hydra.get_sanitized_cfg(config.copy(), options.cfg), options.package) is None:
            raise ConfigError(f"--package {options.package}: there is no such part of the config.")
    hydra.show_cfg(name, list(options.overrides), options.cfg, options.package, options.resolve)


def inform(hydra: Hydra, name: str, options: Any) -> None:
    """Print what --info asks. Hydra prints it through logging, which would complain at length where nobody reads on."""
    before, logging.raiseExceptions = logging.raiseExceptions, False
    try:
        hydra.show_info(options.info, config_name=name, overrides=list(options.overrides))
    finally:
        logging.raiseExceptions = before


def complete(hydra: Hydra, name: str, words: Sequence[str], verbs: Sequence[str]) -> None:
    """Tab completion: Hydra's for what follows the verb, which it knows nothing of."""
    line = os.environ.get("COMP_LINE", "")
    if any(word.startswith("query=") for word in words) and line:
        program, _, rest = line.lstrip().partition(" ")
        verb, space, rest = rest.lstrip().partition(" ")
        if not space:
            print(" ".join(verbs))
            return
        os.environ["COMP_LINE"] = f"{program} {rest}"
    try:
        hydra.shell_completion(config_name=name, overrides=list(words))
    except ValueError as error:
        raise ConfigError(f"{error}: write trainer -sc install=bash (or zsh, fish).") from None


def _run_folder(outputs: str, recipe: str | None, run: str | None) -> str:
    root = Path(outputs) / (recipe or "run")
    return (root / str(run)).as_posix() if run is not None else _new(root, "").as_posix()


def _sweep_folder(outputs: str, recipe: str | None) -> str:
    return _new(Path(outputs) / (recipe or "several"), "sweep-").as_posix()


def _new(root: Path, prefix: str) -> Path:
    """A folder named by the time (no colon: Windows has none in names) that does not exist yet."""
    name = f"{prefix}{datetime.now():%Y-%m-%d_%H-%M-%S}"
    number = 2
    folder = root / name
    while folder.exists():
        folder, number = root / f"{name}-{number}", number + 1
    return folder
