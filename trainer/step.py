"""The life of a gradient, read straight down:

zero → forward → scale → backward → accumulate → all_reduce → unscale → inspect → clip → step → release.

`Step.accumulate` is the first half, once for every micro-batch; `Step.finish` is the second, once for the window.
Everything between the last backward and the parameters is one number (`factor`: divisor and clip) and one flag (`bad`).
On the CPU both are read, which costs nothing there; elsewhere both stay on the device until somebody reads the report.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from trainer import kernels, step_state
from trainer.activations.segments import segments_for
from trainer.diagnose.mistakes import Forward, explain, not_connected, written_in_forward
from trainer.distributed.ranks import OneProcess, Ranks
from trainer.errors import ConfigError, DivergedError, GradientError, Paused
from trainer.gradient import norms, skips
from trainer.gradient.apart import add_apart, backward_apart
from trainer.gradient.clipping import Clipping, Measured
from trainer.gradient.clocks import Clocks
from trainer.gradient.invariants import Untouched, check
from trainer.gradient.narrow import Narrow
from trainer.gradient.objective import Objective, Term, as_objective, terms_of
from trainer.gradient.open_window import OpenWindow
from trainer.gradient.over_ranks import reducer_for, why
from trainer.gradient.parameters import Trained
from trainer.gradient.precision import autocast, check_precision
from trainer.gradient.report import Number, Report, Trace
from trainer.gradient.scaler import loss_scale_for, reason_on_device
from trainer.gradient.transforms.chain import Transform, Transforms
from trainer.gradient.verdict import Inspector
from trainer.gradient.weigher import Weigher
from trainer.gradient.zeroing import Aside, add_back, can_put_back, put_back, zero
from trainer.optim.rates import Rates
from trainer.optim.update import Update, as_optimizers
from trainer.settings import ActivationCheckpointingSettings, GradientSettings, Precision, step_settings


class Step:
    """One window at a time: from zeroed gradients to new parameters.

    Args:
        model: an nn.Module, or any object that holds leaf tensors. It is never moved or wrapped.
        objective: maps (model, micro-batch) to a scalar tensor (a mean), `Sum`, `Cotangents` or a mapping to them.
        optimizer: an optimizer or a sequence of optimizers over disjoint parameters.
        schedule: factor(count) of each group's learning rate (`trainer.optim`), or a torch LRScheduler.
        activation_checkpointing: its settings, a number of segments, or patterns of module names.
        precision: fp32, bf16 or fp16 (autocast; fp16 with a loss scale), or fp64 (the parameters are float64 already).
        count_rows: rows of a micro-batch; by default the first dimension of its first tensor.
        ranks: other processes (`ManyProcesses()` of a process group that you made); by default there are none.
        transforms: what changes the gradient before it is clipped, in this order (`trainer.gradient.transforms`).
        skip_if: a rule of your own: `skip_if(report)` says True, or why, where the step must not be taken.
        gradient: the toggles as settings; or give them by keyword: `clip_norm=1.0`, `reduction="sum"`, ….
    """

    def __init__(
        self,
        model: Any,
        objective: Objective,
        optimizer: Any,
        *,
        schedule: Any = None,
        activation_checkpointing: ActivationCheckpointingSettings | int | Sequence[str] | None = None,
        precision: Precision = "fp32",
        count_rows: Callable[[Any], int] | None = None,
        ranks: Ranks | None = None,
        transforms: Sequence[Transform] = (),
        skip_if: skips.Rule | None = None,
        gradient: GradientSettings | None = None,
        **toggles: Any,
    ) -> None:
        self.model = model
        self.objective = as_objective(objective, model)
        self.optimizers = as_optimizers(optimizer)
        self.settings = step_settings(gradient, toggles)
        self.ranks: Ranks = ranks or OneProcess()
        self.clocks = Clocks()
        self.skips_in_a_row: int | Tensor = 0
        self.weigher = Weigher(self.objective, count_rows)
        self.rates = Rates(schedule, self.optimizers)
        self._narrow = Narrow(self.settings)
        self._updates = [Update(one, self._narrow) for one in self.optimizers]
        self.parameters = Trained(model, self.optimizers, self._narrow)
        self._segments = segments_for(model, activation_checkpointing)
        self.precision = precision
        check_precision(precision, self.parameters.by_name)
        self.device = next(iter(self.parameters.by_name.values())).device
        self._autocast = autocast(precision, self.device.type)
        self._scale = loss_scale_for(precision, self.settings, self.parameters.by_name, self.device)
        self._buffers = skips.KeptBuffers(model)
        self._clipping = Clipping(self.settings, self.optimizers)
        self.transforms = Transforms(transforms, self.parameters.by_name, self.settings.nonfinite == "allow")
        self.skip_if = skips.checked(skip_if)
        self._is_watched = bool(transforms) or skip_if is not None
        self._inspector = Inspector(self.settings.nonfinite == "allow", self.device)
        self.reducer = reducer_for(self.ranks, self.settings, self.weigher, self.device)
        self._open: OpenWindow | None = None
        self._aside: Aside = []
        self._expected: dict[str, float] = {}
        self._moving = False
        self._trace = Trace()
        self.before_backward: list[Callable[[OpenWindow, Term, Tensor], None]] = []
        """Instruments (`trainer.diagnose`): called with the window, each term and what its backward will start from."""
        self.after_backward: list[Callable[[OpenWindow, list[Tensor]], None]] = []
        """Instruments (`trainer.diagnose`): called with the window and the roots when a micro-batch is done."""

    def __call__(self, window: Sequence[Any], norms: bool = False, between: Callable[[], None] | None = None) -> Report:
        """One step on a window: a sequence of micro-batches, drawn whole.

        `norms` asks for the gradient norm in the report where no clip computes it anyway. When the objective raises,
        the window is cancelled: parameters, buffers and optimizer are as they were before it. `between` is called
        between two micro-batches; when it raises Paused, the window stays open, for a later call or for `state_dict`.
        """
        if not len(window) and self.reducer is None:
            raise ConfigError("the window holds no micro-batch: there is nothing to step on.")
        done = 0
        if self._open is not None:
            self._open.join(window)
            done = self._open.micro_batches
        try:
            if not len(window) and self._open is None:
                self._begin(window)  # this rank has nothing, others may have
            for micro_batch in window[done:] if done else window:
                if between is not None and self._open is not None:
                    between()
                self.accumulate(micro_batch, window)
        except BaseException as error:
            if isinstance(error, Paused) and self._open is not None and self.is_open:
                self._open.drawn = None  # to be drawn again
            else:
                self.cancel()
            raise
        return self.finish(norms)

    def accumulate(self, micro_batch: Any, window: Sequence[Any] | None = None) -> None:
        """Add one micro-batch's gradient to the window's.

        With the whole window given, backward starts from the true divisor; without it from a power of two near what
        is expected, and `finish` makes up the rest. After an error in here the window can only be cancelled.
        """
        open_ = self._open
        if open_ is None:
            open_ = self._begin(window)  # zero
        elif window is not open_.drawn:
            open_.join(window)
        open_.enter()

        untouched = None if self.clocks.windows else Untouched(self.parameters.by_name)
        terms = terms_of(self._forward(micro_batch), self.objective)  # forward
        if untouched is not None and (name := untouched.written()):
            raise written_in_forward(name, self._as_it_was(micro_batch))
        roots, seeds = [], []
        for term in terms:
            seed = open_.seed(term, micro_batch, alone=len(terms) == 1)  # scale
            if seed is None:
                continue
            if not term.value.requires_grad:
                raise not_connected(term.name, self._as_it_was(micro_batch))
            for look in self.before_backward:
                look(open_, term, seed)
            apart = open_.terms[term.name].apart
            if apart is None:
                roots.append(term.value)
                seeds.append(seed)
            else:
                backward_apart(term.value, seed, self.parameters.by_name, apart)
                self._trace.values += 1
                self._trace.backward_calls += 1
        if roots:
            try:
                kernels.backward(tuple(roots), tuple(seeds), self.parameters.inputs, False)  # backward, accumulate
            except RuntimeError as error:
                explain(error, self._as_it_was(micro_batch), tuple(roots))
                raise
            self._trace.values += len(roots)
            self._trace.backward_calls += 1
        open_.count(micro_batch)
        for look_back in self.after_backward:
            look_back(open_, roots)

    def finish(self, norms: bool = False) -> Report:
        """End the window: in a step, or in a skip that leaves parameters, buffers and optimizer state as they were."""
        open_ = self._begin(None) if self._open is None and self.reducer is not None else self._open
        if open_ is None or (self.reducer is None and not open_.micro_batches):
            raise ConfigError("finish() came without an open window: call accumulate(micro_batch) before it.")
        open_.check_whole()
        try:
            report = self._finish(open_, norms)
        except BaseException as error:
            if isinstance(error, Paused) and self.reducer is not None:
                open_.drawn = None  # another rank stops inside the window: to be drawn again
                raise
            if self._moving:
                self._open, self._aside = None, []  # neither a step nor a skip: see is_torn
            self.cancel()
            raise
        if report._diverged and self.settings.nonfinite == "raise":
            raise DivergedError(
                f"step {self.clocks.steps + 1} was not taken: {report.reason}. nonfinite=raise stops here."
            )
        return report

    def gradient(self, window: Sequence[Any] | None = None) -> dict[str, Tensor]:
        """The open window's true gradient by name, over all ranks, before any clip. After it only cancel() is left.

        A rank that has no micro-batch of a window that was given whole to the others gives its own, which is empty.
        """
        open_ = self._begin(window) if self._open is None and self.reducer is not None else self._open
        if open_ is None:
            raise ConfigError("gradient() came without an open window: call accumulate(micro_batch) before it.")
        open_.check_whole()
        if self.reducer is not None:
            self.reducer.close(open_, self.parameters, self._trace)
        gradients = self.parameters.gradients()
        norms.scale(list(gradients.values()), self._unscale(open_, gradients))
        return {name: gradient.clone() for name, gradient in self.parameters.gradients().items()}

    # The stages, in the order above.

    def _begin(self, window: Sequence[Any] | None) -> OpenWindow:
        self._check_whole()
        self.parameters.refresh()
        self._open, self._trace = self._window(window), Trace()
        self._buffers.keep()
        self._clipping.refresh()
        self._narrow.follow()
        self._aside = zero(self.parameters.by_name.values(), self.settings.zero_grad)
        return self._open

    def _window(self, drawn: Sequence[Any] | None) -> OpenWindow:
        opening = None if self.reducer is None else self.reducer.open(drawn, self._expected, self.parameters)
        return OpenWindow(self.settings, self.weigher, drawn, self._expected, self._scale.value, opening)

    def _finish(self, open_: OpenWindow, norm_wanted: bool) -> Report:
        settings = self.settings
        if self.reducer is not None:
            self.reducer.close(open_, self.parameters, self._trace)  # all_reduce
        check(self._trace, open_, self.ranks.world_size)
        if settings.coefficients and not self.clocks.windows:
            open_.check_coefficients()
        gradients = self.parameters.gradients()
        factor = self._unscale(open_, gradients)  # unscale
        if self._aside:
            add_back(self._aside)
        if self._aside or open_.apart():
            gradients = self.parameters.gradients()
        by_norm = self._clipping.by_norm
        wanted = norm_wanted or by_norm or self._is_watched
        measured = self._clipping.measure(gradients, self.parameters.by_name) if wanted else None
        norm = None if measured is None else measured.whole
        bad = self._inspector(open_, list(gradients.values()), factor, norm, by_norm)  # inspect
        sums = open_.means, open_.weights(), settings.coefficients, open_.size()
        report = Report(*sums, self._scale.shown, settings.reduction, self._trace)
        report._grad_norm = None if norm is None else norm * factor
        if self._is_watched:
            report._clocks, report._lr = self.clocks.snapshot(), self.rates.now()
        if open_.weighs_nothing():
            self._skip(report, skips.ZERO_WEIGHT)
        elif isinstance(bad, Tensor) and self._defers():
            report._overflowed = self._scale.blame_on(bad, open_)
            self._step_if(bad, self._clip(gradients, factor, measured, report), report)  # both, on the device
        elif bool(bad):
            overflow = self._scale.blame(open_, gradients)
            report._overflowed = overflow is not None
            self._skip(report, overflow or why(open_, gradients, report, self.reducer))
            report._diverged = overflow is None and report._reason != skips.ZERO_WEIGHT
        elif self.skip_if is not None and (asked := skips.asked(self.skip_if, report, self.ranks)):
            self._skip(report, asked)
        else:
            self._step(float(self._clip(gradients, factor, measured, report)), report)  # clip, step
        self._release(open_, report)  # release
        return report

    def _forward(self, micro_batch: Any) -> Any:
        try:
            if self._segments is None and self._autocast is None:
                return self.objective(self.model, micro_batch)
            with self._segments or nullcontext(), self._autocast or nullcontext():
                return self.objective(self.model, micro_batch)
        except (RuntimeError, ValueError, IndexError) as error:
            explain(error, self._as_it_was(micro_batch))
            raise

    def _unscale(self, open_: OpenWindow, gradients: dict[str, Tensor]) -> Number:
        """What is left of the divisor, as a factor. What must have the true gradient in `.grad` gets it here."""
        unscaled = 1.0 / open_.leftover()
        factor: Number = unscaled / open_.loss_scale
        apart = open_.apart()
        exactly = bool(apart or self.transforms) or self._clipping.exactly or self.settings.zero_grad == "never"
        is_one = isinstance(factor, float) and factor == 1.0
        if isinstance(unscaled, Tensor) or unscaled > 1.0 or (exactly and not is_one):
            # A factor above 1 could still overflow: it is applied before the check, not folded behind it.
            norms.scale(list(gradients.values()), factor)
            factor = 1.0
        for held, own in apart:
            add_apart(held, own, self.parameters.by_name)
        return factor

    def _clip(self, gradients: dict[str, Tensor], factor: Number, measured: Measured | None, report: Report) -> Number:
        if self.transforms:
            gradients = self.transforms(gradients, self.parameters.by_name, report)
            measured = self._clipping.measure(gradients, self.parameters.by_name)
            report._norm_after = self.transforms.checked(measured.whole, gradients)
        return self._clipping(gradients, self.parameters.by_name, factor, measured, report)

    def _step(self, factor: float, report: Report) -> None:
        report._lr = self.rates.set(self.clocks)
        self._moving = True
        for update in self._updates:
            update.apply(factor)
        self.rates.taken()
        self._scale.follow(taken=1.0, overflowed=0.0)
        self.clocks.draw(report.micro_batches)
        self.clocks.take(report.rows, report.tokens)
        self.skips_in_a_row = 0

    def _step_if(self, bad: Tensor, factor: Number, report: Report) -> None:
        factor = torch.as_tensor(factor, dtype=torch.float32, device=self.device)
        report._lr = self.rates.set_on(self.clocks, self.device)
        self._moving = True
        for update in self._updates:
            update.apply_if_finite(factor, bad)
        self._buffers.put_back(bad)
        put_back(self._aside, bad)
        report._skipped = bad
        bad_ranks = None if self.reducer is None else self.reducer.bad_ranks
        report._reason = lambda: reason_on_device(report, bad_ranks)
        self._scale.follow(1.0 - bad, report._overflowed)
        self.clocks.draw(report.micro_batches)
        self.clocks.take_if(1.0 - bad, report.rows, report.tokens)
        self.skips_in_a_row = (self.skips_in_a_row + bad - report._overflowed) * bad

    def _skip(self, report: Report, reason: str) -> None:
        self._buffers.put_back()
        put_back(self._aside)
        report._lr = self.rates.now()
        report._skipped = True
        report._reason = reason
        self.clocks.draw(report.micro_batches)
        self._scale.follow(taken=0.0, overflowed=float(report._overflowed))
        self.skips_in_a_row = self.skips_in_a_row + (not report._overflowed)

    def _release(self, open_: OpenWindow, report: Report) -> None:
        if open_.drawn is None or self.reducer is not None:
            self._expected = open_.denominators()
        report._clocks = self.clocks.snapshot()
        self._buffers.release()
        if self.transforms:
            self.transforms.release()
        open_.close()
        self._aside = []
        self._open = None
        self._moving = False

    # What the stages ask for.

    def _as_it_was(self, micro_batch: Any) -> Forward:
        return Forward(self.model, self.objective, micro_batch, self.parameters.by_name)

    def _defers(self) -> bool:
        """Whether the verdict can stay on the device; `raise` has to know it."""
        if self.settings.nonfinite == "raise" or self._is_watched or not can_put_back(self._aside):
            return False
        return self.rates.defers and all(one.defers() for one in self._updates)

    def _check_whole(self) -> None:
        if self._moving:
            raise GradientError(
                "the last step was cut off while its parameters were being changed: load the last checkpoint first."
            )

    @property
    def is_open(self) -> bool:
        """Whether a window is open, each of its micro-batches wholly in it: `state_dict` can save it so."""
        open_ = self._open
        return open_ is not None and (0 if self.reducer is None else -1) < open_.micro_batches == open_.entered

    @property
    def is_torn(self) -> bool:
        """Whether a step was cut off (by Ctrl-C, say) while its parameters were being changed. Such a state must not be
        saved or gone on from; `load_state_dict` mends it."""
        return self._moving

    def cancel(self) -> None:
        """Give the open window up: parameters, buffers, optimizer and clocks as they were before it."""
        if self._open is not None:
            self._open = None
            zero_grad = self.settings.zero_grad
            zero(self.parameters.by_name.values(), "set_to_none" if zero_grad == "never" else zero_grad)
            put_back(self._aside)
            self._aside = []
            self._buffers.put_back()
            self.transforms.put_back()

    def state_dict(self) -> dict[str, Any]:
        """Clocks, skips, schedule, and the open window with its gradients: numbers and tensors only.

        The optimizers' states are theirs, the parameters and buffers the model's.
        """
        self._check_whole()
        return step_state.state_of(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`, after the model and the optimizers have theirs. Where a window was open, the next
        call gets that window, drawn again.

        Raises CheckpointError, having changed nothing, for a gradient that does not fit the parameters.
        """
        step_state.load(self, state)
