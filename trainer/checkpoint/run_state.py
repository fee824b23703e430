"""Where a run stands: its place in the data, the best so far, and how all of it is saved and taken up again."""

import math
import secrets
from pathlib import Path
from typing import Any

from trainer import rng
from trainer.checkpoint import contents, store
from trainer.errors import CheckpointError, ConfigError, did_you_mean
from trainer.settings import Settings
from trainer.step import Step

LAST, BEST, MODEL = "last.safetensors", "best.safetensors", "model.safetensors"
# Of the attributes below, those that are saved as they are.
_OWN = (
    "epoch_began", "order_seed", "epoch_rng",
    "best", "evaluations_without_best", "metrics", "evaluated_at", "owes_evaluation",
)  # fmt: skip


class RunState:
    """The state of a run beside its step: position, best, and the files they lie in.

    Attributes:
        epoch_began: the micro_batches clock at the start of the epoch.
        order_seed: of the data's order; drawn once where the run has no seed.
        best: (metric, value, step) of the best evaluation so far.
        evaluations_without_best: evaluations since then.
        metrics: of the last evaluation.
        evaluated_at: the windows clock at the last evaluation.
        owes_evaluation: whether an evaluation was due that did not come to its end.
        epoch_rng: the generators at the epoch's start, where the data draws its order from them.
    """

    def __init__(self, model: Any, step: Step, settings: Settings, folder: Path | None, config: dict[str, Any]) -> None:
        self._model = model
        self._step = step
        self._settings = settings
        self._folder = folder
        self._config = config
        self.epoch_began = 0
        self.order_seed = settings.seed if settings.seed is not None else secrets.randbits(62)
        self.best: tuple[str, float, int] | None = None
        self.evaluations_without_best = 0
        self.metrics: dict[str, float] = {}
        self.evaluated_at = -1
        self.owes_evaluation = False
        self.epoch_rng: dict[str, Any] | None = None

    @property
    def position(self) -> int:
        """Micro-batches of the epoch that lie behind: a difference of clocks, so it cannot fall behind the step."""
        return self._step.clocks.micro_batches - self.epoch_began

    @property
    def skips(self) -> int:
        clocks = self._step.clocks.read()
        return clocks.windows - clocks.steps

    def next_epoch(self) -> None:
        self._step.clocks.epochs += 1
        self.epoch_began = self._step.clocks.micro_batches

    def judge(self, metrics: dict[str, float], due: bool = True) -> bool:
        """Take note of an evaluation; whether it is the best so far.

        One that was not due (at a stop) may be the best, but does not count as one without a new best: a run that goes
        on would else run out of patience sooner than one that was never stopped.
        """
        wanted = self._settings.best
        if wanted.metric not in metrics:
            raise ConfigError(
                f"best.metric={wanted.metric} is not among the metrics of the evaluation: "
                f"{did_you_mean(wanted.metric, metrics)}"
            )
        self.metrics, self.evaluated_at, self.owes_evaluation = metrics, self._step.clocks.windows, False
        value = metrics[wanted.metric]
        better = math.isfinite(value) and (
            self.best is None or (value < self.best[1] if wanted.mode == "min" else value > self.best[1])
        )
        if better:
            self.best = (wanted.metric, value, self._step.clocks.read().steps)
            self.evaluations_without_best = 0
        elif due:
            self.evaluations_without_best += 1
        return better

    def save(self, name: str) -> Path:
        """Write the whole state between two steps. Raises CheckpointError; what was saved before stays."""
        if self._folder is None:
            raise ConfigError("there is no folder to save into: give folder=.")
        path = self._folder / name
        store.save(
            path,
            {
                "model": contents.model_state(self._model),
                "optimizers": [contents.optimizer_state(optimizer) for optimizer in self._step.optimizers],
                "step": self._step.state_dict(),
                "rng": rng.capture(),
                **{name: getattr(self, name) for name in _OWN},
                "config": self._config,
            },
        )
        return path

    def resume(self, resume: str | Path) -> Path | None:
        """Take a saved state up; which file that was. `never`: none; `auto`: the folder's last where there is one."""
        if str(resume) == "never":
            return None
        if str(resume) == "auto":
            if self._folder is None:
                raise ConfigError('resume="auto" needs the folder that the run was saved in: give folder=.')
            path = self._folder / LAST
            if not path.exists():
                return None
        else:
            path = Path(resume)
            path = path / LAST if path.is_dir() else path
        self._load(path)
        return path

    def _load(self, path: Path) -> None:
        state = store.load(path)
        try:
            # All is checked before anything is changed.
            contents.check_model(self._model, state["model"], path)
            contents.check_optimizers(self._step.optimizers, state["optimizers"], path)
            known = {name: state[name] for name in _OWN}
            step, generators = state["step"], state["rng"]
            contents.load_model(self._model, state["model"], path)
            contents.load_optimizers(self._step.optimizers, state["optimizers"], path)
            self._step.load_state_dict(step)
            rng.restore(generators)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            what = f"has no {error}" if isinstance(error, KeyError) else f"does not hold what it should ({error})"
            raise CheckpointError(f"{path} {what}: it was not written whole, or by another version.") from None
        for name, value in known.items():
            setattr(self, name, value)

    def load_start(self, path: Path) -> None:
        """Only the parameters and buffers, of whatever run they are (`init=PATH`)."""
        contents.load_start(path, self._model)

    def finish(self) -> None:
        """Write the state and the model at the run's end. Raises CheckpointError."""
        if self._folder is None or not self._step.clocks.windows:
            return
        if self._settings.checkpoint.last:
            self.save(LAST)
        contents.save_finished_model(self._folder / MODEL, self._model, self._step.optimizers)

    def files(self) -> dict[str, Path]:
        """What lies in the folder."""
        if self._folder is None:
            return {}
        names = {"model": MODEL, "checkpoint": LAST, "best": BEST, "metrics": "metrics.jsonl"}
        files = {what: self._folder / name for what, name in names.items() if (self._folder / name).exists()}
        if next(self._folder.glob("events.out.tfevents.*"), None) is not None:
            files["tensorboard"] = self._folder
        return files
