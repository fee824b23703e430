"""What the verbs do once the config is checked. This is where torch is first imported."""

import math
import sys
from pathlib import Path

from trainer.config.build import build
from trainer.config.door import Door
from trainer.config.schema import RunConfig
from trainer.errors import ConfigError
from trainer.loggers.events import Stop

STOPPED = 75


def train(config: RunConfig, door: Door, folder: Path) -> tuple[float, int]:
    """Train into the folder. Returns the metric that `best` names, and the exit code."""
    words = config.words
    trainer = build(config, door, folder)
    if words.init is not None:
        trainer.load(_existing("init", words.init))
    resume = words.resume or ("auto" if words.run is not None else "never")
    stop = trainer.fit(resume=resume if resume in ("auto", "never") else _existing("resume", resume))
    return _metric(config, stop), 0


def evaluate(config: RunConfig, door: Door) -> tuple[float, int]:
    """Print the metrics of a checkpoint, or of a fresh model. Nothing is trained and nothing is written."""
    path = _checkpoint(config)
    trainer = build(config, door)
    if path is not None:
        trainer.load(path)
    metrics = trainer.evaluate()
    what = str(path) if path is not None else "a fresh model"
    lines = [f"{config.words.recipe or 'evaluation'}: {what}", *(f"  {name} {value:.6g}" for name, value in metrics.items())]
    sys.stdout.write("\n".join(lines) + "\n")
    return metrics.get(config.settings.best.metric, math.nan), 0


def _metric(config: RunConfig, stop: Stop) -> float:
    return float(stop.metrics.get(config.settings.best.metric, math.nan))


def _existing(key: str, name: str) -> Path:
    path = Path(name)
    if not path.exists():
        raise ConfigError(f"{key}={name}: there is no such file.")
    return path


def _checkpoint(config: RunConfig) -> Path | None:
    words = config.words
    if words.init is not None:
        return _existing("init", words.init)
    if words.run is None:
        return None
    folder = Path("outputs") / (words.recipe or "run") / words.run
    if not folder.is_dir():
        raise ConfigError(f"run={words.run}: there is no folder {folder.as_posix()}: train it first, or give init=PATH.")
    return folder
