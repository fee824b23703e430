"""The run: window → step → report → loggers → evaluate → checkpoint → stop."""

import time
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from trainer import asked, modes, summary, torchrun
from trainer.capturing import Capturing
from trainer.checkpoint import changes
from trainer.checkpoint.run_state import BEST, LAST, RunState
from trainer.data.dealt import dealt
from trainer.data.sources import source_of
from trainer.device import device_of, placed
from trainer.diagnose.health import Health
from trainer.distributed.launch import ranks_for
from trainer.due import Due
from trainer.errors import CheckpointError, ConfigError, DivergedError, GradientError, Paused, Stopped, TrainerError
from trainer.evaluate import Metrics
from trainer.feed import Feed
from trainer.gradient.precision import width
from trainer.gradient.report import Report
from trainer.gradient.skips import Rule
from trainer.gradient.transforms.chain import Transform
from trainer.held_out import HeldOut
from trainer.limits import Limits
from trainer.loggers.chosen import chosen
from trainer.loggers.events import Evaluated, Stop
from trainer.loggers.together import Together
from trainer.ranks_of_run import RanksOfRun
from trainer.settings import Settings, from_flat
from trainer.signals import Signals
from trainer.step import Step

if TYPE_CHECKING:
    from trainer.certificate import Certificate
    from trainer.diagnose.graph import Graph
    from trainer.diagnose.per_sample import PerSample
    from trainer.diagnose.replay import Replay


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
        transforms, skip_if: what changes the gradient, and a rule of your own for steps not to take; see `Step`.
        folder: where logs and checkpoints go; without one nothing is written.
        loggers: objects with some of the five events of `trainer.loggers.events`, beside those of the settings.
        count_rows: rows of a micro-batch, where the first dimension of its first tensor is not that.
        sources: the source of a micro-batch's rows, one or one for each, for `source_gradients`.
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
        transforms: Sequence[Transform] = (),
        skip_if: Rule | None = None,
        folder: str | Path | None = None,
        loggers: Sequence[Any] = (),
        count_rows: Callable[[Any], int] | None = None,
        sources: Callable[[Any], Any] | None = None,
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
        ranks = ranks_for(self.settings.distributed, self.settings.device, self.settings.ranks.timeout)
        self._device = device_of(self.settings.device, model)
        dtype = width(self.settings.precision)
        if isinstance(model, nn.Module):
            model.to(self._device, dtype)
        if self.settings.tf32:
            torch.backends.cuda.matmul.allow_tf32 = True
        # What decides what the gradient is; the certificate makes steps of its own by it.
        self._of_gradient: dict[str, Any] = {
            "activation_checkpointing": self.settings.activation_checkpointing,
            "precision": self.settings.precision,
            "count_rows": count_rows,
            "gradient": self.settings.gradient,
        }
        self.step = Step(
            model,
            objective,
            optimizer,
            schedule=schedule,
            transforms=transforms,
            skip_if=skip_if,
            ranks=ranks,
            **self._of_gradient,
        )
        self._signals = Signals(self.settings.checkpoint.grace)
        self._held_out = HeldOut(
            evaluation_data, self.step, metrics, self.settings, self._device, self._signals, count_rows
        )
        goes_on = self.settings.checkpoint.on_error == "warn"
        own = chosen(self.settings.loggers, self.folder, goes_on)
        self._loggers = Together([] if ranks.rank else [*own, *loggers])
        self._health = Health(self.step, self._loggers.found, self.settings, sources)
        self._held_out.evaluation.found = self._health.found
        parts: dict[str, Any] = {"evaluation": self._held_out, "health": self._health}
        self._limits = Limits(self.step.clocks)
        self._ranks = parts["ranks"] = RanksOfRun(self.step, self.settings, self._signals, self._limits)
        if self._ranks:
            self._held_out.look = self._ranks.look
        self.state = RunState(model, self.step, self.settings, self.folder, self.config, parts)
        self.go_on: str | None = None
        self.last_report: Report | None = None
        self._data = data
        origin = source_of(data, self.settings.data)
        source = dealt(placed(origin, self._device, dtype), origin, ranks)
        window = self.settings.gradient.accumulation_steps
        self._feed = Feed(source, window, self.state, self.step.clocks, self.step.weigher, self._signals)
        made_from = changes.config_of(self.config, self.settings)
        self.capturing = Capturing(self.step, self._feed, self.settings, made_from, self.folder, self._health.found)

    def fit(self, resume: str | Path = "never", accept: Collection[str] = ()) -> Stop:
        """Train until a limit is reached; called again, go on from where it stopped.

        Args:
            resume: `never`, `auto` (the folder's last checkpoint where there is one), `last`, or a checkpoint's path.
            accept: changed settings that a resumed run may go on with; those that cannot matter need not be named.
        """
        # Without a folder nothing can be saved for later: signals then do what they always do.
        with self.state.opened(), self._signals if self.folder else nullcontext():
            return self._fit(resume, accept)

    def _fit(self, resume: str | Path, accept: Collection[str]) -> Stop:
        self._limits.start(self.settings.limits, self.state)
        resumed = self.state.resume(resume, accept)
        if self.step.is_torn:
            raise GradientError(
                "the last step was cut off while its parameters were being changed: go on from a checkpoint (resume=)."
            )
        if self.settings.seed is not None and resumed is None and not (self.step.clocks.windows or self.step.is_open):
            self._ranks.seed(self.settings.seed)
        self.state.order_seed = self._ranks.start(self.config, self.state.order_seed)
        notes = [*self.state.notes, *modes.set_train(self.model, self.step.optimizers), *self._health.notes()]
        self._feed.start()
        if self.settings.check is not None and not self.step.clocks.windows:
            self._health.before_first(partial(asked.certify_window, self.step, self._of_gradient))
        who: dict[str, Any] = {
            "recipe": self.recipe,
            "folder": self.folder,
            "config": self.config,
            "device": str(self._device),
        }
        who |= {"history": self._health.history, "measured": self._health.tags}
        start = summary.start(
            self.step, self._feed.source, self.settings, notes, resumed, self.state.evaluated_at, **who
        )
        try:
            self._loggers.start(start)
            reason = self._run()
        except BaseException as error:
            self._give_up(error)
            if isinstance(error, Paused):
                torchrun.tell_launcher()
                raise Stopped(self._signals.reason) from None
            raise
        self._signals.end()
        return self._stop(reason, self.state.finish)

    def evaluate(self) -> dict[str, float]:
        """Evaluate on the held-out data: the loss and the metrics by name. Nothing else changes."""
        return self._held_out.evaluate_anew()[0]

    def certify(self, gradcheck: Sequence[str] = (), meant: Sequence[str] = ()) -> "Certificate":
        """Hold the next window's gradient, as it is configured here, against the plain reference. Changes nothing.

        Args:
            gradcheck: modules whose backward is held against difference quotients, beside all custom Functions.
            meant: Functions whose backward is not the derivative of their forward on purpose, by name.
        """
        return asked.certify(self.step, self._feed, self._of_gradient, gradcheck, meant)

    def graph(self, every_node: bool = False) -> "Graph":
        """Draw the autograd graph of the next micro-batch (`trainer.graph`). Changes nothing."""
        return asked.graph(self.step, self._feed, every_node)

    def largest_gradients(self, most: int = 20) -> "PerSample":
        """The norm of every training row's gradient, and the rows with the largest (`trainer.per_sample`)."""
        in_order = replace(self.settings.data, shuffle=False, drop_last=False)
        rows = placed(source_of(self._data, in_order), self._device, width(self.settings.precision))
        return asked.largest_gradients(self.step, rows, most)

    def replay(self) -> "Replay":
        """Run the next window as it is configured here, and name what is not finite in it. Changes nothing."""
        return asked.replay(self.step, self._feed)

    def load(self, path: str | Path) -> None:
        """Put the parameters of a checkpoint, a `model.safetensors` or a run's folder into the model."""
        self.state.load_start(Path(path))

    # The run.

    def _run(self) -> str:
        clocks = self.step.clocks
        log = Due(self.settings.loggers.every, self.settings.loggers.clock, at_once=True)
        held_out = self._held_out.source is not None
        evaluate = Due(self.settings.evaluation.every if held_out else None, self.settings.evaluation.clock)
        save = Due(self.settings.checkpoint.every if self.folder else None, self.settings.checkpoint.clock)
        between = self._ranks.between if self._ranks else self._between
        for due in (log, evaluate, save):
            due.start(clocks)
        ticks, signals, limits = (
            [*self._loggers.ticks, *self.state.ticks, *self._ranks.ticks],
            self._signals,
            self._limits,
        )
        report: Report | None = None
        if self.state.owes_evaluation and held_out:
            self._evaluated()
        reason = limits.reached()
        if reason is None:
            self._held_out.evaluation.sums = None  # an evaluation at an end that is none any more
        while reason is None or self._feed.is_at_end():
            for window in self._feed.windows():
                report = self.last_report = self._health.step(window, log.is_near(clocks), between)
                for tick in ticks:
                    tick()
                if report._skipped is True:
                    self._skipped(report)
                if log(clocks) or limits.ends(self._feed.is_at_end):
                    self._log(report)  # the last line comes before what is evaluated and saved after it
                    report = None
                if evaluate(clocks):
                    self._evaluated()
                if save(clocks):
                    self._save(LAST)
                if reason := limits.reached():
                    break
                if signals.asked and not self._feed.is_at_end():
                    self._answer()
            if reason is None or self._feed.is_at_end():
                self.state.next_epoch()
                if report is not None and limits.reached():
                    self._log(report)
                    report = None
                if evaluate(clocks):
                    self._evaluated()
                if save(clocks):
                    self._save(LAST)
                reason = limits.reached()
                if signals.asked and reason is None:
                    self._answer()
        if report is not None:
            self._log(report)
        if held_out and self.state.evaluated_at != clocks.windows:
            self._evaluated(due=False)
        return reason

    # Asked by a signal.

    def _between(self) -> None:
        """Between two micro-batches of a window."""
        if self._signals.asked:
            self._feed.keep_open()
            self._answer()
            self.state.window_rng = None

    def _answer(self) -> None:
        """Save and go on, or stop."""
        self._ranks.agree()
        if self._signals.to_stop:
            raise Paused
        self._signals.asked = None
        self._save(LAST)

    def _give_up(self, error: BaseException) -> None:
        """The run is stopped: what can be gone on with is saved, where the window that is open is given up or kept."""
        paused = isinstance(error, Paused)
        if paused:
            self._ranks.agree()
        self._signals.end()
        self.capturing.raised(error)
        if not self.step.is_torn:
            if paused and self.step.is_open:
                self._feed.keep_open()
            else:
                self.step.cancel()
                self._feed.take_back()
        name = "Ctrl-C" if isinstance(error, KeyboardInterrupt) else type(error).__name__
        if isinstance(error, TrainerError) and not isinstance(error, CheckpointError):
            self.go_on = None  # the same words would come to the same error, unless a disk has room again
        keep = self.state.pause if paused else self.state.finish
        if self.step.is_torn or isinstance(error, DivergedError) or (self._ranks and not paused):
            keep = self.state.leave
        self._stop(self._signals.reason if paused else f"stopped by {name}", keep)

    def _skipped(self, report: Report) -> None:
        """Tell the loggers, and stop a run that only skips. On a device it comes when the report is read anyway."""
        self._health.skip(report)
        self._loggers.skip(report)
        self.capturing.skipped(report)
        most = self.settings.limits.skips_in_a_row
        if most is not None and int(self.step.skips_in_a_row) >= most:
            raise DivergedError(
                f"{most} steps in a row were skipped, the last because {report.reason}: the run has diverged. The last "
                "checkpoint is kept; lower the learning rate, clip the gradient, or look at the data of this window."
            )

    def _log(self, report: Report) -> None:
        if report._skipped is not True and report.skipped:
            self._skipped(report)
        self._feed.look()
        self._health.look(report)
        self._loggers.look(self.step.parameters.by_name, report)
        self._loggers.step(report, self._limits.seconds)

    def _evaluated(self, due: bool = True) -> None:
        began = time.monotonic()
        self.state.owes_evaluation = due
        metrics, rows = self._held_out.measure(self._answer)
        best = self.state.judge(metrics, due)
        clocks = self.step.clocks.as_dict()
        event = Evaluated(metrics, clocks, rows, time.monotonic() - began, self.settings.evaluation.grad_mode, best)
        self._loggers.evaluate(event, self.model)
        if best and self.folder is not None and self.settings.checkpoint.best:
            self._save(BEST)

    def _save(self, name: str) -> None:
        self._loggers.flush()
        self.state.save(name)

    def _stop(self, reason: str, keep: Callable[[], None]) -> Stop:
        """Save, and tell the loggers, also where saving fails."""
        self._feed.close()
        try:
            try:
                self._loggers.flush()
            finally:
                keep()
        finally:
            files = self.state.files()
            stop = Stop(
                reason=reason,
                clocks=self.step.clocks.as_dict(),
                skips=self.state.skips,
                seconds=self._limits.seconds,
                metrics=self.state.metrics,
                best=self.state.best,
                files=files,
                go_on=self.go_on if "checkpoint" in files else None,
                health=self._health.words(),
            )
            self._loggers.stop(stop)
        return stop
