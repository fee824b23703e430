"""The run: window → step → report → loggers → evaluate → checkpoint → stop."""

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trainer import rng, summary
from trainer.checkpoint.run_state import BEST, LAST, RunState
from trainer.data.sources import Source, TensorSource, place, source_of
from trainer.data.windows import Window, windows
from trainer.due import Due
from trainer.errors import ConfigError, DivergedError
from trainer.evaluate import Evaluation, Metrics
from trainer.gradient.precision import width
from trainer.gradient.report import Report
from trainer.loggers.chosen import chosen
from trainer.loggers.events import Evaluated, Logger, Start, Stop
from trainer.settings import Settings, from_flat
from trainer.step import Step

# Data in memory up to this many bytes is moved to a device once instead of batch by batch.
_MOVED_WHOLE = 1 << 30


class Trainer:
    """A model, an objective, an optimizer and data, run until a limit.

    Args:
        model: an nn.Module or any object that holds leaf tensors.
        objective: maps (model, micro-batch) to a loss; see `Step`.
        optimizer: an optimizer, or a sequence of them over disjoint parameters.
        data: a tuple of tensors, a dataset, a DataLoader, or an iterable of micro-batches.
        evaluation_data: held-out data, of the same kinds.
        metrics: `metrics(model, micro_batch) -> {name: Sum}`, or torchmetrics objects by name.
        schedule: of the learning rates; see `Step`.
        folder: where logs and checkpoints go; without one nothing is written.
        loggers: objects with the five events of `trainer.loggers.events`, beside those that the settings ask for.
        count_rows: rows of a micro-batch, where the first dimension of its first tensor is not that.
        recipe: a name for the console and the logs.
        config: what the run was made from, kept with the logs and the checkpoints.
        settings: all toggles; or give them flat: `accumulation_steps=4, clip_norm=1.0, epochs=3, …`.
    """

    def __init__(
        self,
        model: Any,
        objective: Any,
        optimizer: Any,
        *,
        data: Any,
        evaluation_data: Any = None,
        metrics: Metrics | None = None,
        schedule: Any = None,
        folder: str | Path | None = None,
        loggers: Sequence[Logger] = (),
        count_rows: Callable[[Any], int] | None = None,
        recipe: str | None = None,
        config: dict[str, Any] | None = None,
        settings: Settings | None = None,
        **flat: Any,
    ) -> None:
        if settings is not None and flat:
            raise ConfigError(f"Trainer got settings= and also {', '.join(flat)}: give one or the other.")
        self.settings = settings or from_flat(flat)
        self.model = model
        self.folder = None if folder is None else Path(folder)
        self.recipe = recipe
        self.config = config or {}
        self._device, self._moves = _device_of(self.settings.device, model)
        self._width = width(self.settings.precision)
        if isinstance(model, nn.Module):
            model.to(self._device, self._width)
        if self.settings.tf32:
            torch.backends.cuda.matmul.allow_tf32 = True
        self.step = Step(
            model,
            objective,
            optimizer,
            schedule=schedule,
            activation_checkpointing=self.settings.activation_checkpointing,
            precision=self.settings.precision,
            count_rows=count_rows,
            gradient=self.settings.gradient,
        )
        self._source = self._placed(source_of(data, self.settings.data))
        self._held_out: Source | None = None
        if evaluation_data is not None:
            self._held_out = self._placed(source_of(evaluation_data, self.settings.data, evaluation=True))
        self._evaluation = Evaluation(
            objective,
            metrics,
            self.settings.evaluation.grad_mode,
            self.settings.gradient.coefficients,
            count_rows,
            self.settings.precision,
            self._device.type,
        )
        self._loggers: list[Logger] = [*chosen(self.settings.loggers, self.folder), *loggers]
        self.state = RunState(model, self.step, self.settings, self.folder, self.config)
        self.go_on: str | None = None
        self.last_report: Report | None = None
        self._metrics: dict[str, float] = {}
        self._began = 0.0

    def fit(self, resume: str | Path = "never") -> Stop:
        """Train until a limit is reached.

        Args:
            resume: `never`, `auto` (the folder's last checkpoint where there is one), or a checkpoint's path.

        Calling it again goes on from where it stopped.
        """
        limits = self.settings.limits
        if limits.epochs is limits.steps is limits.rows is limits.time is None:
            raise ConfigError("no limit is set, so the run would never end: set limits.epochs, steps, rows or time.")
        resumed = self.state.resume(resume)
        if self.settings.seed is not None and resumed is None and not self.step.clocks.windows:
            rng.seed_all(self.settings.seed)
        notes = self._set_train_mode()
        self._began = time.monotonic()
        start = self._start(resumed, notes)
        for logger in self._loggers:
            logger.start(start)
        try:
            reason = self._run()
        except BaseException as error:
            # A window that was cut off inside finish() may be half in the parameters: such a state is not kept.
            keep = not self.step.is_open and not isinstance(error, DivergedError)
            self._stop("stopped by Ctrl-C" if isinstance(error, KeyboardInterrupt) else f"stopped by {error!r}", keep)
            raise
        return self._stop(reason, keep=True)

    def evaluate(self) -> dict[str, float]:
        """Evaluate on the held-out data: the loss and the metrics by name. Nothing else changes."""
        found, _ = self._evaluate()
        return found

    def load(self, path: str | Path) -> None:
        """Put the parameters of a checkpoint, a `model.safetensors` or a run's folder into the model."""
        self.state.load_start(Path(path))

    # The run.

    def _run(self) -> str:
        clocks = self.step.clocks
        log = Due(self.settings.loggers.every, self.settings.loggers.clock, at_once=True)
        evaluate = Due(self.settings.evaluation.every if self._held_out else None, self.settings.evaluation.clock)
        save = Due(self.settings.checkpoint.every if self.folder else None, self.settings.checkpoint.clock)
        for due in (log, evaluate, save):
            due.start(clocks)
        ticks = [logger.tick for logger in self._loggers if hasattr(logger, "tick")]
        report: Report | None = None
        reason = self._reached()
        while reason is None:
            for window in self._windows():
                report = self.last_report = self.step(window)
                for tick in ticks:
                    tick()
                if report._skipped is True:
                    self._skipped(report)
                if log(clocks):
                    self._log(report)
                    report = None
                if evaluate(clocks):
                    self._evaluated()
                if save(clocks):
                    self.state.save(LAST)
                if (reason := self._reached()) is not None:
                    break
            else:
                self.state.next_epoch()
                if evaluate(clocks):
                    self._evaluated()
                if save(clocks):
                    self.state.save(LAST)
                reason = self._reached()
        if report is not None:
            self._log(report)
        if self._held_out is not None and self.state.evaluated_at != clocks.windows:
            self._evaluated()
        return reason

    def _windows(self) -> Iterator[Window]:
        """The rest of this epoch, window by window."""
        state = self.state
        batches = self._source.micro_batches(state.order_seed, self.step.clocks.epochs, state.position)
        if self._moves or (self._width is not None and not isinstance(self._source, TensorSource)):
            batches = (place(batch, self._device, self._width) for batch in batches)
        count = 0
        for window in windows(batches, self.settings.gradient.accumulation_steps):
            count += 1
            yield window
        if not count and not state.position:
            raise ConfigError("the data gave no micro-batch in a whole epoch: it is empty.")

    def _reached(self) -> str | None:
        """Which limit is reached, in words."""
        clocks, limits = self.step.clocks, self.settings.limits
        if limits.steps is not None and clocks.most("steps") >= limits.steps and clocks.read().steps >= limits.steps:
            return f"{limits.steps} steps done"
        if limits.rows is not None and clocks.most("rows") >= limits.rows and clocks.read().rows >= limits.rows:
            return f"{limits.rows} rows done"
        if limits.epochs is not None and clocks.epochs >= limits.epochs:
            return f"{limits.epochs} epochs done"
        if limits.time is not None and time.monotonic() - self._began >= limits.time:
            return f"{limits.time:g} seconds are over"
        if limits.patience is not None and self.state.evaluations_without_best >= limits.patience:
            return f"no new best in {limits.patience} evaluations"
        return None

    def _skipped(self, report: Report) -> None:
        """Tell the loggers, and stop a run that only skips. On a device it comes when the report is read anyway."""
        for logger in self._loggers:
            logger.skip(report)
        most = self.settings.limits.skips_in_a_row
        if most is not None and int(self.step.skips_in_a_row) >= most:
            raise DivergedError(
                f"{most} steps in a row were skipped, the last because {report.reason}: the run has diverged. The last "
                "checkpoint is kept; lower the learning rate, clip the gradient, or look at the data of this window."
            )

    def _log(self, report: Report) -> None:
        if report._skipped is not True and report.skipped:
            self._skipped(report)
        seconds = time.monotonic() - self._began
        for logger in self._loggers:
            logger.step(report, seconds)

    def _evaluate(self) -> tuple[dict[str, float], int]:
        if self._held_out is None:
            raise ConfigError("there is no evaluation data: give evaluation_data= (in a recipe: the Split's second part).")
        batches = self._held_out.micro_batches(0, 0, 0)
        if self._moves or (self._width is not None and not isinstance(self._held_out, TensorSource)):
            batches = (place(batch, self._device, self._width) for batch in batches)
        return self._evaluation(self.model, batches, self.step.optimizers)

    def _evaluated(self) -> None:
        began = time.monotonic()
        self._metrics, rows = self._evaluate()
        best = self.state.judge(self._metrics)
        clocks = self.step.clocks.as_dict()
        event = Evaluated(self._metrics, clocks, rows, time.monotonic() - began, self._evaluation.grad_mode, best)
        for logger in self._loggers:
            logger.evaluate(event, self.model)
        if best and self.folder is not None and self.settings.checkpoint.best:
            self.state.save(BEST)

    def _start(self, resumed: Path | None, notes: list[str]) -> Start:
        return Start(
            recipe=self.recipe,
            folder=self.folder,
            model=type(self.model).__name__,
            parameters=summary.parameter_count(self.step),
            device=str(self._device),
            precision=self.settings.precision,
            window=summary.window(self.settings, self._source, self.step),
            notes=[*notes, *summary.notes(self.step, self._source, self.settings)],
            config=self.config,
            total_windows=summary.total_windows(self.settings, self._source),
            clocks=self.step.clocks.as_dict(),
            resumed_from=resumed,
        )

    def _stop(self, reason: str, keep: bool) -> Stop:
        files = self.state.finish(keep)
        stop = Stop(
            reason=reason,
            clocks=self.step.clocks.as_dict(),
            skips=self.state.skips,
            seconds=time.monotonic() - self._began,
            metrics=self._metrics,
            best=self.state.best,
            files=files,
            go_on=self.go_on if "checkpoint" in files else None,
        )
        for logger in self._loggers:
            logger.stop(stop)
        return stop

    def _set_train_mode(self) -> list[str]:
        """A model that is wholly in eval is put in train; mixed modes are taken as meant."""
        if not isinstance(self.model, nn.Module) or any(module.training for module in self.model.modules()):
            return []
        self.model.train()
        return ["the model was wholly in eval mode: it was put in train mode."]

    def _placed(self, source: Source) -> Source:
        if isinstance(source, TensorSource):
            size = sum(tensor.numel() * tensor.element_size() for tensor in source.tensors)
            if not self._moves or size <= _MOVED_WHOLE:
                return source.placed(self._device, self._width)
        return source


def _device_of(wanted: str, model: Any) -> tuple[torch.device, bool]:
    """The device, and whether micro-batches have to be moved to it."""
    if not isinstance(model, nn.Module):
        return torch.device("cpu"), False
    if wanted != "auto":
        try:
            device = torch.device(wanted)
        except RuntimeError:
            raise ConfigError(f"device={wanted!r} is no device: choose auto, cpu, cuda, cuda:0 or mps.") from None
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ConfigError(f"device={wanted} is not here: torch sees no CUDA device. Choose device=cpu or auto.")
    elif torch.cuda.is_available():
        device = torch.device("cuda")
    elif torch.backends.mps.is_available():
        device = torch.device("mps")
    else:
        device = torch.device("cpu")
    return device, device.type != "cpu"

