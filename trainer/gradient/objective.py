"""What an objective may answer, and how its answer becomes terms that a window can weigh.

An objective maps (model, micro-batch) to what is differentiated and its weight. It answers with

- a scalar tensor: a mean over the micro-batch's rows (or over what its `weight` method counts);
- `Sum(total, weight)`: a total that is not divided yet, and how much it counts;
- `Cotangents(outputs, vector, weight)`: outputs of any shape with the vector that backward starts from;
- a mapping from names to any of these.
"""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from trainer import kernels
from trainer.errors import ConfigError, ObjectiveError
from trainer.gradient.report import FREE_READS, Number
from trainer.gradient.weights import Counter, counter_of, host_number

MEAN = "loss"
"""The name of the one term of an objective that names none."""


@dataclass(frozen=True, slots=True)
class Sum:
    """A total with its weight: Σ over the micro-batch, not divided.

    Args:
        total: a scalar tensor.
        weight: how much the micro-batch counts, not negative: a number, or a 0-dim tensor.
    """

    total: Tensor
    weight: Number


@dataclass(frozen=True, slots=True)
class Cotangents:
    """Outputs that are no scalar, with the vector v of the vector-Jacobian product vᵀJ that is asked for.

    Args:
        outputs: a tensor of any shape.
        vector: a tensor of the same shape.
        weight: as in `Sum`; vᵀJ counts as a total.
    """

    outputs: Tensor
    vector: Tensor
    weight: Number = 1.0


Answer = Tensor | Sum | Cotangents
_ANSWERS = (Tensor, Sum, Cotangents)
Outcome = Answer | Mapping[str, Answer]


class Objective(Protocol):
    def __call__(self, model: Any, micro_batch: Any, /) -> Outcome: ...


@dataclass(slots=True)
class Term:
    """One thing to differentiate: `value` (scalar), or `value` with a `vector` of its shape.

    `weight` is None for a mean whose weight is what the micro-batch counts.
    """

    name: str
    value: Tensor
    weight: Number | None = None
    vector: Tensor | None = None

    def number(self) -> Number:
        """The value as the number that a report shows: read on the CPU, without its graph elsewhere."""
        value = self.value
        if self.vector is not None:
            value = (value.detach() * self.vector.detach().to(value).conj()).sum().real
        return value.item() if value.device.type in FREE_READS else value.detach().reshape(())


def terms_of(outcome: Any, objective: Any) -> list[Term]:
    """The terms of an objective's answer. Raises ObjectiveError where it is none of the four forms."""
    if type(outcome) is Tensor and not outcome.dim() and not outcome.is_complex():
        return [Term(MEAN, outcome)]  # nearly every answer
    if isinstance(outcome, _ANSWERS):
        return [_term(MEAN, outcome, objective)]
    if isinstance(outcome, Mapping):
        if not outcome:
            raise ObjectiveError(f"{who(objective)} returned an empty mapping: name at least one term.")
        return [_term(str(name), answer, objective) for name, answer in outcome.items()]
    if outcome is None:
        raise ObjectiveError(
            f"{who(objective)} returned None: return the loss (a scalar tensor, Sum(total, weight) or a mapping of "
            "names to them) and leave backward to the step."
        )
    if isinstance(outcome, tuple | list):
        raise ObjectiveError(
            f"{who(objective)} returned a bare {type(outcome).__name__}: write Sum(total, weight) for a total with "
            'its weight, or {"name": loss, "other": loss} for several terms.'
        )
    raise ObjectiveError(
        f"{who(objective)} returned {type(outcome).__name__}: return a scalar tensor, Sum(total, weight), "
        "Cotangents(outputs, vector) or a mapping of names to them."
    )


def _term(name: str, answer: Any, objective: Any) -> Term:
    if isinstance(answer, Tensor):
        if answer.dim() and answer.numel() != 1:
            raise ObjectiveError(
                f"{who(objective)} returned a tensor of shape {tuple(answer.shape)} for '{name}': reduce it to a "
                "scalar, or give the vector that backward starts from: Cotangents(outputs, vector)."
            )
        _check_real(name, answer, objective)
        return Term(name, answer)
    if isinstance(answer, Sum):
        if not isinstance(answer.total, Tensor) or answer.total.numel() != 1:
            raise ObjectiveError(f"{who(objective)}: the total of '{name}' is no scalar tensor.")
        _check_real(name, answer.total, objective)
        return Term(name, answer.total, checked_weight(name, answer.weight, objective))
    if isinstance(answer, Cotangents):
        if answer.outputs.shape != answer.vector.shape:
            raise ObjectiveError(
                f"{who(objective)}: the outputs of '{name}' have shape {tuple(answer.outputs.shape)}, its vector "
                f"{tuple(answer.vector.shape)}: they must be equal."
            )
        return Term(name, answer.outputs, checked_weight(name, answer.weight, objective), answer.vector)
    raise ObjectiveError(
        f"{who(objective)} returned {type(answer).__name__} for '{name}': return a scalar tensor, "
        "Sum(total, weight) or Cotangents(outputs, vector)."
    )


def _check_real(name: str, value: Tensor, objective: Any) -> None:
    if value.is_complex():
        raise ObjectiveError(
            f"{who(objective)} returned a complex number for '{name}': return a real one (abs, .real)."
        )


def checked_weight(name: str, weight: Any, objective: Any) -> Number:
    """A weight as a number. Raises ObjectiveError where it is negative or not finite."""
    number = host_number(weight)
    if isinstance(number, float) and not 0.0 <= number < math.inf:
        raise ObjectiveError(f"{who(objective)}: the weight of '{name}' is {number}: it must be finite, zero or more.")
    return number


def who(objective: Any) -> str:
    """The objective by name, for a sentence."""
    while isinstance(objective, functools.partial):
        objective = objective.func
    name = getattr(objective, "__qualname__", None) or type(objective).__qualname__
    return f"the objective {name}"


class Supervised:
    """The objective of (inputs, targets) pairs and a torch loss: `loss(model(inputs), targets)`.

    Its `weight` is exactly what the loss divides by: elements for MSE, targets that are not ignored for
    cross-entropy (by class weight where it has some), rows for an unknown loss. Made by `supervised`.
    """

    def __init__(self, loss: Callable[..., Tensor], counter: Counter) -> None:
        self.loss = loss
        self.counter = counter
        self._loss = kernels.without_python(loss)
        self.weight = self._weight
        self.tokens = self._tokens if counter.counts_targets else None
        self.full_weight = None if counter.full is None else self._full_weight
        # Where every target of a micro-batch may be ignored, the loss's own mean is 0 / 0. On the CPU the weight
        # is read before and such a micro-batch is left out; elsewhere the total is taken instead of the mean.
        self._total = counter.total_of(loss)

    def __call__(self, model: Any, micro_batch: Any) -> Answer:
        inputs, targets = self._pair(micro_batch)
        outputs = model(inputs) if callable(model) else model.forward(inputs)
        if self._total is not None and (not self.counter.is_mean or outputs.device.type not in FREE_READS):
            total = self._total(outputs, targets)
            return Sum(total if total.dim() == 0 else total.sum(), host_number(self.counter.count(targets, outputs)))
        return self._loss(outputs, targets)

    def _full_weight(self, micro_batch: Any) -> Number:
        """Its weight if no target in it is left out, told without a look at the targets."""
        full = self.counter.full
        return self._weight(micro_batch) if full is None else full(self._pair(micro_batch)[1])

    def _weight(self, micro_batch: Any) -> Number:
        """What the loss of this micro-batch divides by."""
        return host_number(self.counter.count(self._pair(micro_batch)[1], None))

    def _tokens(self, micro_batch: Any) -> int:
        """Targets, for index targets with more than one to a row; 0 elsewhere."""
        targets = self._pair(micro_batch)[1]
        return targets.numel() if targets.dim() > 1 and not targets.is_floating_point() else 0

    def _pair(self, micro_batch: Any) -> tuple[Any, Tensor]:
        try:
            inputs, targets = micro_batch
        except (TypeError, ValueError):
            raise ObjectiveError(
                f"supervised({_loss_name(self.loss)}) needs micro-batches that are (inputs, targets) pairs, "
                f"not {type(micro_batch).__name__}: write an objective of your own for others."
            ) from None
        return inputs, targets

    def __repr__(self) -> str:
        return f"supervised({_loss_name(self.loss)}), weighed by {self.counter.what}"


def supervised(loss: Callable[..., Tensor]) -> Supervised:
    """An objective of (inputs, targets) micro-batches and a torch loss, a module or a function.

    The weight of each loss that torch has is known exactly (`trainer.gradient.weights`); any other loss is taken as
    a mean over rows. A loss with `reduction="sum"` or `"none"` is taken as a total with the same weight.
    """
    if isinstance(loss, type):
        raise ConfigError(f"supervised({loss.__name__}) was given a class: give an instance, {loss.__name__}().")
    if not callable(loss):
        raise ConfigError(f"supervised({loss!r}) was given no loss: give a torch loss module or function.")
    return Supervised(loss, counter_of(loss))


def as_objective(objective: Any, model: Any) -> Any:
    """The objective itself; one that is a loss of torch is taken as `supervised(loss)`, which is what is meant.

    An objective with a method `bind(model)` is given the model.
    """
    if callable(bind := getattr(objective, "bind", None)):
        bind(model)
    inner = objective
    while isinstance(inner, functools.partial):
        inner = inner.func
    is_loss = isinstance(inner, nn.modules.loss._Loss) or getattr(inner, "__module__", "") == "torch.nn.functional"
    return supervised(objective) if is_loss else objective


def _loss_name(loss: Any) -> str:
    return getattr(loss, "__name__", None) or type(loss).__name__
