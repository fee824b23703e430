"""The command `trainer VERB [overrides]`: takes the verb, lets Hydra compose the rest, and answers with an exit code.

A wrong word is one sentence on stderr and exit code 2, before torch is imported.
"""

import os
import shlex
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer import torchrun
from trainer.config import help
from trainer.errors import ConfigError, Stopped, TrainerError, TrainerWarning, did_you_mean

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from trainer.config.schema import Words

INTERRUPTED = 130
BROKEN_PIPE = 141
USERS_OWN = 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit code: 0 done, 1 the user's own exception, else that of the error's class."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a letter is no reason to end
    shown = warnings.showwarning
    warnings.showwarning = partial(_show_warning, shown)
    try:
        code = _main(words)
        sys.stdout.flush()
    except TrainerError as error:
        say(error)
        code = error.exit_code
    except Stopped as stop:
        if torchrun.is_first():
            print(f"{stop.reason}.", file=sys.stderr)
        code = stop.exit_code
    except KeyboardInterrupt:
        if torchrun.is_first():
            print("stopped by Ctrl-C.", file=sys.stderr)
        code = INTERRUPTED
    except BrokenPipeError:
        # Nobody reads any more. Without this, Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = BROKEN_PIPE
    finally:
        warnings.showwarning = shown
    return code


def _show_warning(shown: Callable[..., None], message: Warning | str, category: type[Warning], *place: Any) -> None:
    """Our own warnings are a sentence like our errors; those of others stay as they are."""
    if issubclass(category, TrainerWarning):
        say(message, "warning: ")
    else:
        shown(message, category, *place)


def say(error: BaseException | str, before: str = "") -> None:
    """One sentence on stderr."""
    print(torchrun.prefix() + before + " ".join(str(error).split()), file=sys.stderr)


def _main(words: list[str]) -> int:
    if not words or words[0] in ("--help", "-h", "help"):
        print(help.overview())
        return 0
    if words[0] == "--version":
        from trainer import __version__

        print(__version__)
        return 0
    if words[0] in ("--completion", "--complete"):
        from trainer.config import completion

        if words[0] == "--complete":
            print("".join(f"{line}\n" for line in completion.lines(words[1:])), end="")
        else:
            print(completion.script(words[1] if len(words) > 1 else "(no shell)"), end="")
        return 0
    if words[0] in ("--shell-completion", "-sc", "--hydra-help", "--info", "-i"):
        words = ["train", *words]
    verb, *rest = words
    if verb not in help.VERBS:
        if "=" in verb or verb.startswith("-"):
            raise ConfigError(f"the verb is missing before '{verb}': write trainer train {' '.join(words)}")
        raise ConfigError(f"there is no verb '{verb}': {did_you_mean(verb, help.VERBS)}")
    parser = help.parser(verb)
    options = parser.parse_intermixed_args(rest)
    if options.help:
        print(help.about(verb, options.config_dir))
        return 0
    if verb == "recipes":
        if options.overrides:
            raise ConfigError(f"recipes takes no '{options.overrides[0]}': it lists all recipes.")
        if options.config_dir is not None and not options.config_dir.is_dir():
            raise ConfigError(f"--config-dir {options.config_dir}: there is no such folder.")
        print("\n".join(help.table(help.recipe_lines(options.config_dir))))
        return 0
    if verb == "state":
        from trainer.config import by_path

        return by_path.state(options.overrides, options.json)
    if verb == "replay" and options.overrides and "=" not in options.overrides[0]:
        from trainer.config import by_path

        return by_path.replay(options)
    return _with_hydra(verb, parser, options)


def _with_hydra(verb: str, parser: Any, options: Any) -> int:
    chosen = [
        f"--{name.replace('_', '-')}"
        for name in ("run", "multirun", "cfg", "info", "shell_completion")
        if getattr(options, name)
    ]
    if len(chosen) > 1:
        raise ConfigError(f"{' and '.join(chosen)} do not go together: give one of them.")
    for flag in ("resolve", "package"):
        if getattr(options, flag) and not options.cfg:
            raise ConfigError(f"--{flag} goes with --cfg: add --cfg job.")
    from trainer.config import hydra_app, sweep

    name = options.config_name or "train"
    with hydra_app.opened(options.config_dir) as (hydra, loader):
        if options.hydra_help:
            hydra.hydra_help(config_name=name, args_parser=parser, args=options)
        elif options.cfg:
            hydra_app.show(loader, name, options)
        elif options.info:
            hydra_app.inform(hydra, name, options)
        elif options.shell_completion:
            hydra_app.complete(hydra, name, options.overrides, tuple(help.VERBS))
        else:
            flags = {name: getattr(options, name) for name in help.FLAGS.get(verb, ())}
            jobs = Jobs(verb, options.config_dir, options.config_name, flags)
            loader.check = jobs.check
            if hydra_app.sweeps(loader, name, options.overrides, options.multirun):
                if torchrun.world_here() > 1:
                    raise ConfigError("a sweep runs its jobs in one process: give torchrun the words of one job.")
                config, done = hydra_app.multirun(hydra, name, options.overrides, jobs.run)
                best = config.best
                print("\n".join(sweep.summary(done, config.hydra.sweep.dir, best.metric, best.mode)))
                return jobs.code or sweep.code(done)
            overrides = [
                *options.overrides,
                *(hydra_app.WRITE_NOTHING if verb != "train" or not torchrun.is_first() else ()),
            ]
            config = hydra_app.compose(loader, name, overrides)
            jobs.check(config)
            hydra_app.run(loader, config, jobs.run)
            return jobs.code
    return 0


class Jobs:
    """The jobs of one command: one, or those of a sweep. One that fails is said at once and hides no other."""

    def __init__(
        self,
        verb: str,
        config_dir: Path | None,
        config_name: str | None = None,
        flags: Mapping[str, Any] | None = None,
    ) -> None:
        self.verb = verb
        self.flags = dict(flags or {})
        self.code = 0
        self.config_dir = config_dir
        named = ["--config-name", config_name] if config_name else []
        self._where = [*named, *(["--config-dir", str(config_dir)] if config_dir else [])]

    def check(self, config: "DictConfig") -> None:
        """Everything that can be said of a config before torch is imported. Raises ConfigError."""
        from trainer.config import hydra_app

        self._read(hydra_app.composed(config))

    def _read(self, values: dict[str, Any]) -> tuple[Any, Any]:
        from trainer.config import build, catalogue, checks, schema
        from trainer.config.door import Door, folders_of

        config = schema.read(values)
        checks.check(config, self.verb, catalogue.options("recipe", self.config_dir))
        door = Door(config.words.trust, folders_of(self.config_dir))
        build.judge(config, door)
        return config, door

    def run(self, composed: "DictConfig") -> float:
        """What Hydra calls for each job. Returns the metric that `best` names, Failed where there is none."""
        from trainer.checkpoint import lock
        from trainer.config import hydra_app, record
        from trainer.config.sweep import Failed

        folder, number, overrides = hydra_app.this_job()
        prefix = "" if number is None else f"job {number}: "
        if number is not None:
            print(f"{prefix}{shlex.join(overrides)}", flush=True)
            if any(word.startswith(("sweep=", "experiment=")) for word in overrides):
                overrides.append("hydra.mode=RUN")  # or the words that run this job again would sweep again
        try:
            config, door = self._read(hydra_app.values(composed))
            from trainer import verbs

            if self.verb in ("check", "replay"):
                code: int = getattr(verbs, self.verb)(config, door, **self.flags)
                self.code = self.code or code
                return float(code)
            if self.verb in ("graph", "rows"):
                looked: Callable[..., float] = getattr(verbs, self.verb)
                return looked(config, door, **self.flags)
            if self.verb == "eval":
                value = verbs.evaluate(config, door)
            else:
                go_on = self._go_on(config.words, folder, overrides)
                if torchrun.is_first():
                    with lock.held(folder):
                        pass  # a second run is told at once, before its data is made
                written = partial(record.write, folder, config.plain, [*_typed(), *overrides, *self._where], go_on)
                value = verbs.train(config, door, folder, go_on, partial(self._again, config.words), written)
            if number is not None:
                print(f"{prefix}{config.settings.best.metric} {value:g}", flush=True)
            return value
        except TrainerError as error:
            say(error, prefix)
            failed = Failed(str(error), error.exit_code)
        except BrokenPipeError:
            self.code = BROKEN_PIPE
            return Failed("nobody reads any more", BROKEN_PIPE)
        except Exception as error:
            from trainer.config.traceback import print_users

            if number is not None:
                print(f"{prefix}failed", file=sys.stderr)
            if torchrun.prefix():
                print(torchrun.prefix(), file=sys.stderr)
            print_users(error)
            failed = Failed(f"{type(error).__name__}: {error}", USERS_OWN)
        self.code = self.code or failed.code
        return failed

    def _again(self, words: "Words", path: Path) -> str:
        """The words that run a captured window again."""
        trust = [f"trust=[{','.join(words.trust)}]"] if words.trust else []
        command = "trainer" if "TRAINER_COMMAND" not in os.environ else f"{_near(Path(sys.executable))} -m trainer"
        return f"{command} {shlex.join(['replay', path.as_posix(), *trust, *self._where])}"

    def _go_on(self, words: "Words", folder: Path, overrides: list[str]) -> str:
        """The words that go on with this run. Its folder is found by its name where it lies in its usual place."""
        usual = Path("outputs") / (words.recipe or "run")
        own = [word for word in overrides if word.partition("=")[0] not in ("resume", "init", "accept")]
        if words.run is None:
            own.append(f"run={folder.name}" if folder.parent == usual else f"resume={folder.as_posix()}")
        return shlex.join([*_typed(), *own, *self._where])


def _near(path: Path) -> str:
    """A path as one would type it from here."""
    return path.relative_to(Path.cwd()).as_posix() if path.is_relative_to(Path.cwd()) else path.as_posix()


def _typed() -> list[str]:
    """The words for `trainer train` as they were typed: a script that calls it says so in the environment."""
    if torchrun.rank_here() is not None:
        return shlex.split(torchrun.command())
    return shlex.split(os.environ.get("TRAINER_COMMAND", "trainer train"))
