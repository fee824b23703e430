"""What the verbs do once the config is checked. This is where torch is first imported."""

import json
import math
import sys
from pathlib import Path

from trainer.config.build import build
from trainer.config.door import Door
from trainer.config.schema import RunConfig
from trainer.errors import ConfigError, WrongGradientError


def train(config: RunConfig, door: Door, folder: Path, go_on: str) -> float:
    """Train into the folder; `go_on` are the words that go on with it. Returns the metric that `best` names."""
    words = config.words
    trainer = build(config, door, folder)
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
    trainer = build(config, door)
    if path is not None:
        trainer.load(path)
    metrics = trainer.evaluate()
    what = str(path) if path is not None else "a fresh model"
    lines = [f"  {name} {value:.6g}\n" for name, value in metrics.items()]
    sys.stdout.write("".join([f"{config.words.recipe or 'evaluation'}: {what}\n", *lines]))
    return metrics.get(config.settings.best.metric, math.nan)


def check(config: RunConfig, door: Door, as_json: bool) -> int:
    """Print the certificate of the first window's gradient, as the config has it computed. Returns the exit code."""
    path = _checkpoint(config)
    trainer = build(config, door)
    if path is not None:
        trainer.load(path)
    certificate = trainer.certify()
    if as_json:
        sys.stdout.write(json.dumps({"recipe": config.words.recipe, **certificate.as_dict()}) + "\n")
    else:
        what = "one window's gradient as it is configured, against the reference"
        sys.stdout.write(f"{config.words.recipe or 'check'}: {what}\n{certificate}\n")
    return 0 if certificate.passed else WrongGradientError.exit_code


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
