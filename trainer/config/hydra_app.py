"""Composing and running through Hydra. What is private of Hydra (1.3) is used here and in hydra_loader.py only.

Hydra's own main is not used: no released version of it parses a word on Python 3.14 (hydra issue 3121), and it reports
errors in its own way, with exit code 1. `run` is what `hydra.main` does, without its reporting.
"""

import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import isnan
from pathlib import Path
from typing import Any

from hydra import version
from hydra._internal.callbacks import Callbacks
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.core.utils import run_job
from hydra.errors import HydraException
from hydra.types import HydraContext, RunMode
from omegaconf import Container, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from trainer.config import resolvers, schema
from trainer.config.hydra_loader import Loader
from trainer.config.sentences import Known, explain
from trainer.config.sweep import Watched
from trainer.errors import CheckpointError, ConfigError

WRITE_NOTHING = ("hydra.run.dir=.", "hydra.output_subdir=null")
"""Overrides for a job that has no folder."""


def register() -> None:
    """Tell Hydra the schema and the resolvers of the root config. Called again it changes nothing."""
    version.setbase("1.3")
    resolvers.register()
    tree = schema.defaults()
    # A term's or a logger's name is the user's to choose: these two take new keys without a `+`.
    tree["gradient"]["coefficients"] = DictConfig({}, flags={"struct": False})
    tree["loggers"]["others"] = DictConfig({}, flags={"struct": False})
    ConfigStore.instance().store(name="schema", node=tree, provider="trainer")


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
    OmegaConf.set_readonly(config.hydra, False)  # set_config made it so, and the job's number is still to come
    return values(OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"]))


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
    return bool(config.hydra.mode == RunMode.MULTIRUN)


def run(loader: Loader, config: DictConfig, task: Callable[[DictConfig], Any]) -> None:
    """One job in its own folder, with Hydra's callbacks around it."""
    config.hydra.mode = RunMode.RUN
    with _hydras_errors():
        callbacks = Callbacks(config)
    callbacks.on_run_start(config=config, config_name=config.hydra.job.config_name)
    context = HydraContext(config_loader=loader, callbacks=callbacks)
    try:
        job = run_job(
            task_function=task, config=config, job_dir_key="hydra.run.dir", job_subdir_key=None, hydra_context=context
        )
    except OSError as error:  # the job itself lets none through: it is the folder that Hydra makes
        raise _no_folder("run", config.hydra.run.dir, error) from error
    callbacks.on_run_end(config=config, config_name=config.hydra.job.config_name, job_return=job)


def _no_folder(what: str, folder: str, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"the {what}'s folder {folder} cannot be written ({error.strerror or error}): start where there is room and "
        f"permission to write, or give hydra.{what}.dir=FOLDER."
    )


def multirun(
    hydra: Hydra, name: str, overrides: Sequence[str], task: Callable[[DictConfig], Any]
) -> tuple[DictConfig, list[tuple[Sequence[str], Any]]]:
    """All jobs of a sweep, by the configured sweeper and launcher. Returns its config, and each job's words and value.

    It is Hydra.multirun, but for the launcher: a sweeper like Optuna's keeps to itself what the jobs gave.
    """
    words = [*(word for word in overrides if not word.startswith("hydra.mode=")), "hydra.mode=MULTIRUN"]
    with _hydras_errors():
        config = hydra.compose_config(name, words, run_mode=RunMode.MULTIRUN, with_log_configuration=True)
        callbacks = Callbacks(config)
        context = HydraContext(config_loader=hydra.config_loader, callbacks=callbacks)
        callbacks.on_multirun_start(config=config, config_name=name)
        with _watched_launchers() as launchers:
            sweeper = Plugins.instance().instantiate_sweeper(config=config, hydra_context=context, task_function=task)
        jobs = launchers[0].jobs
        try:
            sweeper.sweep(arguments=list(config.hydra.overrides.task))
        except (ValueError, RuntimeError) as error:
            # Optuna looks for the best job where none has a value, and its grid sampler stumbles over a last one that
            # failed: the jobs that ran are to be seen all the same.
            if not any(isnan(value) for _, value in jobs):
                raise ConfigError(explain(error, words, lambda: Known({}, {}))) from error
            if not all(isnan(value) for _, value in jobs):
                print(f"the sweeper stopped: {' '.join(str(error).split())}", file=sys.stderr)
        except OSError as error:  # the jobs let none through
            raise _no_folder("sweep", config.hydra.sweep.dir, error) from error
        callbacks.on_multirun_end(config=config, config_name=name)
    return config, jobs


@contextmanager
def _watched_launchers() -> Iterator[list[Watched]]:
    """A sweeper that is made inside gets its launcher watched, wherever it keeps it."""
    plugins: Any = Plugins.instance()
    make, made = plugins.instantiate_launcher, []

    def watched(**arguments: Any) -> Watched:
        made.append(Watched(make(**arguments)))
        return made[-1]

    plugins.instantiate_launcher = watched
    try:
        yield made
    finally:
        del plugins.instantiate_launcher  # what is left in a singleton of Hydra's goes along to other processes


@contextmanager
def _hydras_errors() -> Iterator[None]:
    """What Hydra refuses to make of its own node (a launcher, a callback) is a mistake in the config like any other."""
    try:
        yield
    except (HydraException, OmegaConfBaseException, ImportError, RuntimeError) as error:
        if isinstance(error, ImportError | RuntimeError) and "plugin" not in str(error) and "class" not in str(error):
            raise
        raise ConfigError(explain(error, (), lambda: Known({}, {}))) from None


def this_job() -> tuple[Path, int | None, list[str]]:
    """The folder of the job that runs now, its number in a sweep, and its overrides."""
    node = HydraConfig.get()
    number = None if OmegaConf.is_missing(node.job, "num") else int(node.job.num)
    folder, here = Path(node.runtime.output_dir), Path.cwd()
    return folder.relative_to(here) if folder.is_relative_to(here) else folder, number, list(node.overrides.task)


def show(loader: Loader, name: str, options: Any) -> None:
    """Print the config, as --cfg, --package and --resolve ask. Parts are resolved where they stand in the whole."""
    config = compose(loader, name, options.overrides)
    HydraConfig.instance().set_config(config)
    package = options.package if options.package != "_global_" else None
    try:
        part = OmegaConf.select(config, package) if package else config
        if part is None or (options.cfg == "job" and f"{package}.".startswith("hydra.")):
            raise ConfigError(f"--package {package}: there is no such part of the config.")
        if not isinstance(part, Container):
            print(part)
            return
        OmegaConf.set_readonly(config.hydra, False)
        if options.resolve:
            OmegaConf.resolve(part if package else config.hydra if options.cfg == "hydra" else config)
        if not package:
            OmegaConf.set_struct(config, False)
            for key in [key for key in config if (key == "hydra") == (options.cfg == "job") and options.cfg != "all"]:
                del config[key]
        text = OmegaConf.to_yaml(part)
    except OmegaConfBaseException as error:
        raise ConfigError(explain(error, options.overrides, loader.known)) from None
    sys.stdout.write(f"# @package {package}\n{text}" if package else text)


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
        _, space, rest = rest.lstrip().partition(" ")
        if not space:
            print(" ".join(verbs))
            return
        os.environ["COMP_LINE"] = f"{program} {rest}"
    try:
        hydra.shell_completion(config_name=name, overrides=list(words))
    except ValueError as error:
        raise ConfigError(f"{error}: write trainer -sc install=bash (or zsh, fish).") from None
