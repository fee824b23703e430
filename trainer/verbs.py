"""What the verbs do once the config is checked. This is where torch is first imported."""

import math
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from json import dumps as encode
from pathlib import Path
from typing import TYPE_CHECKING

from trainer import torchrun
from trainer.config.build import build, model_and_objective
from trainer.config.door import Door
from trainer.config.schema import RunConfig
from trainer.distributed.launch import joined
from trainer.distributed.ranks import Ranks
from trainer.errors import CheckpointError, ConfigError, WrongGradientError
from trainer.loggers.files import make_folder
from trainer.loggers.tensorboard import write_graph

if TYPE_CHECKING:
    from trainer.diagnose.capture import Captured
    from trainer.diagnose.replay import Replay


class _AtStart:
    """A logger that does something once the run is known to begin."""

    def __init__(self, act: Callable[[], None]) -> None:
        self._act = act

    def start(self, event: object) -> None:
        del event
        self._act()


def train(
    config: RunConfig,
    door: Door,
    folder: Path,
    go_on: str,
    again: Callable[[Path], str],
    record: Callable[[], None],
) -> float:
    """Train into the folder. Returns the metric that `best` names.

    Args:
        go_on: the words that go on with the run.
        again: those that run a captured window again.
        record: writes down what the run is made from, once it begins: one that is refused must not write over that.
    """
    words = config.words
    with _ranks(config) as ranks:
        trainer = build(config, door, Path(ranks.gather(folder.as_posix())[0]), [_AtStart(record)])
        trainer.go_on = go_on
        trainer.capturing.words = again
        if words.init is not None:
            trainer.load(words.init)
        resume = words.resume or ("auto" if words.run is not None else "never")
        stop = trainer.fit(resume, accept=words.accept)
        return stop.metrics.get(config.settings.best.metric, math.nan)


def evaluate(config: RunConfig, door: Door) -> float:
    """Print the metrics of a checkpoint, or of a fresh model. Nothing is trained and nothing is written.

    Returns the metric that `best` names.
    """
    path = _checkpoint(config)
    with _ranks(config):
        trainer = build(config, door)
        if path is not None:
            trainer.load(path)
        metrics = trainer.evaluate()
    what = str(path) if path is not None else "a fresh model"
    lines = [f"  {name} {value:.6g}\n" for name, value in metrics.items()]
    if torchrun.is_first():
        sys.stdout.write("".join([f"{config.words.recipe or 'evaluation'}: {what}\n", *lines]))
    return metrics.get(config.settings.best.metric, math.nan)


def check(
    config: RunConfig,
    door: Door,
    json: bool = False,
    gradcheck: list[str] | None = None,
    meant: list[str] | None = None,
) -> int:
    """Print the certificate of the first window's gradient, as the config has it computed. Returns the exit code."""
    path = _checkpoint(config)
    with _ranks(config):
        trainer = build(config, door)
        if path is not None:
            trainer.load(path)
        certificate = trainer.certify(gradcheck or (), meant or ())
    if not torchrun.is_first():
        pass
    elif json:
        sys.stdout.write(encode({"recipe": config.words.recipe, **certificate.as_dict()}) + "\n")
    else:
        what = "one window's gradient as it is configured, against the reference"
        sys.stdout.write(f"{config.words.recipe or 'check'}: {what}\n{certificate}\n")
    return 0 if certificate.passed else WrongGradientError.exit_code


def rows(config: RunConfig, door: Door, most: int = 20, json: bool = False) -> float:
    """Print the training rows with the largest gradients. Returns the largest norm."""
    path = _checkpoint(config)
    if path is None:
        raise ConfigError("rows looks at the data with a trained model: give run=NAME, or init=PATH.")
    with _ranks(config) as ranks:
        trainer = build(config, door)
        if ranks.rank:
            return math.nan  # the first rank looks at all rows
        trainer.load(path)
        found = trainer.largest_gradients(most)
    if json:
        sys.stdout.write(encode({"recipe": config.words.recipe, **found.as_dict()}) + "\n")
    else:
        sys.stdout.write(f"{config.words.recipe or 'rows'}: the rows with the largest gradients, by {path}\n{found}\n")
    return found.largest[0].norm if found.largest else math.nan


def graph(config: RunConfig, door: Door, out: Path | None = None, all: bool = False) -> float:
    """Draw the first micro-batch's graph, into a file or into the recipe's folder for TensorBoard too.

    Returns how many boxes it has.
    """
    with _ranks(config) as ranks:
        trainer = build(config, door)
        if ranks.rank:
            return math.nan  # one drawing is enough
        drawn = trainer.graph(every_node=all)
    sys.stdout.write(f"{drawn.title}\n")
    if out is not None:
        sys.stdout.write(f"  {drawn.save(out)}\n")
    else:
        folder = Path("outputs") / (config.words.recipe or "run") / "graph"
        try:
            make_folder(folder)
        except CheckpointError as error:
            raise CheckpointError(f"{str(error).partition('): ')[0]}): name a file elsewhere (--out FILE).") from None
        path = drawn.save(folder / "graph.svg")
        write_graph(folder, drawn.picture)
        sys.stdout.write(f"  {path}\n  and for TensorBoard's GRAPHS tab: tensorboard --logdir {folder.as_posix()}\n")
    return float(len(drawn.picture.boxes))


def replay(config: RunConfig, door: Door, json: bool = False) -> int:
    """Run the configured run's next window, or the first one that a run with this name has caught, and print what is
    not finite in it. Returns the exit code: 0 where all is finite, else that of a run that diverged."""
    from trainer.diagnose import capture

    words = config.words
    folder = Path("outputs") / (words.recipe or "run") / words.run if words.run is not None else None
    if folder is not None and words.init is None and capture.captured(folder):
        return again(capture.load(folder), config, door, json)
    path = _checkpoint(config)
    with _ranks(config):
        trainer = build(config, door)
        if path is not None:
            trainer.load(path)
        return _told(trainer.replay(), json)


def again(caught: "Captured", config: RunConfig, door: Door, json: bool = False) -> int:
    """Run a captured window again with the model and the objective of a config. Prints and returns the same."""
    from trainer import rng
    from trainer.diagnose.replay import replay

    settings = config.settings
    caught = replace(caught, precision=settings.precision, gradient=asdict(settings.gradient))
    if settings.precision != "fp16":
        caught = replace(caught, loss_scale=1.0)
    with rng.preserved():
        model, objective = model_and_objective(config, door)
        return _told(replay(caught, model, objective), json)


def _told(found: "Replay", json: bool) -> int:
    if torchrun.is_first():
        sys.stdout.write(f"{encode(found.as_dict()) if json else found}\n")
    return found.exit_code


def _ranks(config: RunConfig) -> AbstractContextManager[Ranks]:
    settings = config.settings
    return joined(settings.distributed, settings.device, settings.ranks.timeout)


def _checkpoint(config: RunConfig) -> Path | None:
    words = config.words
    if words.init is not None:
        return Path(words.init)
    if words.run is None:
        return None
    folder = Path("outputs") / (words.recipe or "run") / words.run
    if not folder.is_dir():
        raise ConfigError(f"run={words.run}: there is no folder {folder.as_posix()}, train it first or give init=PATH.")
    return folder
