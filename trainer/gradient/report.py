"""What happened in one step. Numbers stay tensors on their device until somebody reads them."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

Number = float | Tensor

FREE_READS = {"cpu"}
"""The types of device where reading a number waits for nothing. Numbers are floats there, tensors elsewhere."""


@dataclass(slots=True)
class Trace:
    """What was done for one window on this rank: counts that the host has anyway.

    - `backward_calls`: calls of backward.
    - `values`: losses that went through them.
    - `reductions`: sums of its gradient over ranks; of them `extra_reductions` for gradients that are sparse or belong
      to a term of another divisor.
    """

    backward_calls: int = 0
    values: int = 0
    reductions: int = 0
    extra_reductions: int = 0


class Report:
    """One window's report.

    Attributes read like numbers; the first read of one that is on a device waits for it, later reads do not.

    - `loss`: the window's loss under the window's reduction, before the step. NaN where the weight is zero.
    - `terms`: the same for each named term, without its coefficient ({"loss": loss} where there are no names).
    - `weight`: the window's summed weight (of the first term where they differ; `weights` has all).
    - `grad_norm`: the norm (of order `norm_order`) of the window's true gradient, before anything changed it; None
      unless a clip by norm, a transform, `skip_if` or a reader wanted it.
    - `grad_norm_after`: the norm of what reached the optimizer, on the same steps; None where the step was skipped.
    - `clip_factor`: what the gradient was multiplied with by `clip_norm`; None where that is off.
    - `group_norms`, `group_clip_factors`: the same two of each parameter group with a `clip_norm` of its own, by its
      number, and of the `others` where the toggle bounds them; empty where no group has one.
    - `divisor`: what the summed gradient was divided by: the weight, 1 or the number of micro-batches, by `reduction`
      (of the first term where they differ).
    - `backward_calls`, `reductions`: of this rank; a reduction is a sum of the gradient over ranks.
    - `loss_scale`: what backward's seeds were multiplied with; None unless in fp16. `overflowed`: whether the step was
      skipped because of it.
    - `skipped`, `reason`: whether the step was not taken, and the sentence that says why.
    - `measured`: what instruments read in this window, by TensorBoard's tag; empty unless one was asked for.
    - `layer_norms`: the norm of each parameter's gradient as the optimizer left it, by name; empty unless an instrument
      looked at this step.
    - `lr`: the learning rate of the first parameter group.
    - `micro_batches`, `rows`, `tokens`: what this window held.
    - `clocks`: the counts after this window ({"steps": 12, ...}).
    """

    __slots__ = (
        "_clip_factor", "_clocks", "_diverged", "_grad_norm", "_groups", "_loss", "_loss_scale", "_lr", "_norm_after",
        "_overflowed", "_reason", "_reduction", "_skipped", "_terms", "_trace", "_weights", "coefficients",
        "layer_norms", "measured", "micro_batches", "rows", "tokens",
    )  # fmt: skip

    def __init__(
        self,
        terms: Callable[[], dict[str, float]],
        weights: dict[str, Number],
        coefficients: dict[str, float],
        size: tuple[int, int, int],
        loss_scale: Number | None = None,
        reduction: str = "mean",
        trace: Trace | None = None,
    ) -> None:
        self._terms: Callable[[], dict[str, float]] | dict[str, float] = terms
        self._weights = weights
        self.coefficients = coefficients
        self.micro_batches, self.rows, self.tokens = size
        self._reduction = reduction
        self._trace = trace
        self._loss: float | None = None
        self._grad_norm: Number | None = None
        # Where something but `clip_factor` changed the gradient: its norm without that factor.
        self._norm_after: Number | None = None
        self._clip_factor: Number | None = None
        # (norm, clip factor) of each parameter group that was clipped by its own norm.
        self._groups: dict[str, tuple[Number, Number]] | None = None
        self._loss_scale = loss_scale
        self._overflowed: Number = 0.0
        self._skipped: bool | Tensor = False
        self._diverged = False  # whether it was skipped because something is not finite, as far as the host knows
        self._reason: str | Callable[[], str] | None = None
        self._lr: Number = 0.0
        self._clocks: Callable[[], dict[str, int]] = dict
        self.measured: dict[str, float] = {}
        self.layer_norms: dict[str, float] = {}

    @property
    def terms(self) -> dict[str, float]:
        if not isinstance(self._terms, dict):
            self._terms = self._terms()
        return self._terms

    @property
    def loss(self) -> float:
        if self._loss is None:
            # A term that weighs nothing in this window has no mean; it says nothing about the others.
            weighed = [name for name, weight in self.weights.items() if weight != 0.0]
            means = [self.coefficients.get(name, 1.0) * self.terms[name] for name in weighed]
            self._loss = sum(means) if means else float("nan")
        return self._loss

    @property
    def weights(self) -> dict[str, float]:
        return {name: float(weight) for name, weight in self._weights.items()}

    @property
    def weight(self) -> float:
        return float(next(iter(self._weights.values()), 0.0))

    @property
    def divisor(self) -> float:
        if self._reduction == "mean":
            return self.weight
        return float(self.micro_batches) if self._reduction == "micro_batches" else 1.0

    @property
    def backward_calls(self) -> int:
        return 0 if self._trace is None else self._trace.backward_calls

    @property
    def reductions(self) -> int:
        return 0 if self._trace is None else self._trace.reductions

    @property
    def grad_norm(self) -> float | None:
        return None if self._grad_norm is None else float(self._grad_norm)

    @property
    def clip_factor(self) -> float | None:
        return None if self._clip_factor is None else float(self._clip_factor)

    @property
    def loss_scale(self) -> float | None:
        return None if self._loss_scale is None else float(self._loss_scale)

    @property
    def overflowed(self) -> bool:
        return bool(self._overflowed)

    @property
    def grad_norm_after(self) -> float | None:
        if self._grad_norm is None or self.skipped:
            return None
        after = float(self._grad_norm if self._norm_after is None else self._norm_after)
        return after if self._clip_factor is None else after * float(self._clip_factor)

    @property
    def group_norms(self) -> dict[str, float]:
        return {name: float(norm) for name, (norm, _) in (self._groups or {}).items()}

    @property
    def group_clip_factors(self) -> dict[str, float]:
        return {name: float(factor) for name, (_, factor) in (self._groups or {}).items()}

    @property
    def skipped(self) -> bool:
        return bool(self._skipped)

    @property
    def reason(self) -> str | None:
        if not self.skipped:
            return None
        return self._reason() if callable(self._reason) else self._reason

    @property
    def lr(self) -> float:
        return float(self._lr)

    @property
    def clocks(self) -> dict[str, int]:
        return self._clocks()

    def __repr__(self) -> str:
        norm = "" if self.grad_norm is None else f", grad_norm={self.grad_norm:.6g}"
        skipped = f", skipped: {self.reason}" if self.skipped else ""
        return f"Report(loss={self.loss:.6g}, weight={self.weight:g}{norm}{skipped})"
