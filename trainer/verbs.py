"""What the verbs do once the config is checked. This is where torch is first imported."""

import math
import sys
from contextlib import AbstractContextManager
from json import dumps as encode
from pathlib import Path

from trainer import torchrun
from trainer.config.build import build
from trainer.config.door import Door
from trainer.config.schema import RunConfig
from trainer.distributed.launch import joined
from trainer.distributed.ranks import Ranks
from trainer.errors import ConfigError, WrongGradientError
from trainer.loggers.files import make_folder
from trainer.loggers.tensorboard import write_graph


def train(config: RunConfig, door: Door, folder: Path, go_on: str) -> float:
    """Train into the folder; `go_on` are the words that go on with it. Returns the metric that `best` names."""
    words = config.words
    with _ranks(config) as ranks:
        trainer = build(config, door, Path(ranks.gather(folder.as_posix())[0]))
        trainer.go_on = go_on
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
    trainer = build(config, door)
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
    drawn = build(config, door).graph(every_node=all)
    sys.stdout.write(f"{drawn.title}\n")
    if out is not None:
        sys.stdout.write(f"  {drawn.save(out)}\n")
    else:
        folder = Path("outputs") / (config.words.recipe or "run") / "graph"
        make_folder(folder)
        path = drawn.save(folder / "graph.svg")
        write_graph(folder, drawn.picture)
        sys.stdout.write(f"  {path}\n  and for TensorBoard's GRAPHS tab: tensorboard --logdir {folder.as_posix()}\n")
    return float(len(drawn.picture.boxes))


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
