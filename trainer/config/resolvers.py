"""The words in ${} that the root config and the sweeps use: where a run lies, and which way its metric is better."""

from datetime import datetime
from pathlib import Path

from omegaconf import OmegaConf


def register() -> None:
    """Tell OmegaConf. Called again it changes nothing. Each process that composes a config needs it."""
    OmegaConf.register_new_resolver("run_folder", _run_folder, replace=True, use_cache=True)
    OmegaConf.register_new_resolver("sweep_folder", _sweep_folder, replace=True, use_cache=True)
    OmegaConf.register_new_resolver("direction", _direction, replace=True)


def _run_folder(outputs: str, recipe: str | None, run: str | None) -> str:
    root = Path(outputs) / (recipe or "run")
    return (root / str(run)).as_posix() if run is not None else _new(root, "").as_posix()


def _sweep_folder(outputs: str, recipe: str | None) -> str:
    return _new(Path(outputs) / (recipe or "several"), "sweep-").as_posix()


def _direction(mode: str) -> str:
    """Optuna's word for best.mode."""
    return {"min": "minimize", "max": "maximize"}.get(str(mode), str(mode))


def _new(root: Path, prefix: str) -> Path:
    """A folder named by the time (no colon: Windows has none in names) that does not exist yet."""
    name = f"{prefix}{datetime.now():%Y-%m-%d_%H-%M-%S}"
    number = 2
    folder = root / name
    while folder.exists():
        folder, number = root / f"{name}-{number}", number + 1
    return folder
