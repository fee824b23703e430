"""The plain gradient of one window: an objective, a forward, a backward, and a sum.

It imports nothing of the step and nothing of the rooms that serve it, and reads an objective's answer for itself: what
the step is held against must not share its mistakes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from trainer.certificate.batches import CountRows, copied, rows_of

Gradient = dict[str, Tensor]


@dataclass(frozen=True)
class Asked:
    """What a window's gradient is divided by, and the factor of each named term."""

    reduction: str = "mean"
    coefficients: Mapping[str, float] = field(default_factory=dict)
    count_rows: CountRows | None = None


@dataclass
class Window:
    """One window's gradient by parameter name, and what each micro-batch gave to it.

    - `weights[i][term]`: how much micro-batch i counted.
    - `parts[i]`: the gradient that came from micro-batch i alone, as it went into the sum; empty unless asked for.
    """

    gradient: Gradient
    weights: list[dict[str, float]]
    losses: list[dict[str, float]]
    parts: list[Gradient] = field(default_factory=list)


def gradient(
    model: Any,
    objective: Callable[[Any, Any], Any],
    micro_batches: Sequence[Any],
    parameters: Mapping[str, Tensor],
    asked: Asked,
    *,
    between: Callable[[], None] = lambda: None,
    again: Callable[[], None] = lambda: None,
    keep_parts: bool = False,
) -> Window:
    """The gradient of (Σ total) / (Σ weight) over the micro-batches, each run by plain autograd, one after the other.

    Args:
        between: called before each micro-batch.
        again: puts everything back as it was before the first forward. Where weights are known only from forward,
            they are found by a first pass, so that in the second one backward starts from the true divisor.
        keep_parts: keep each micro-batch's own share of the gradient.
    """
    weights: list[dict[str, float]] = []
    if len(micro_batches) > 1 or asked.reduction == "micro_batches":
        for one in micro_batches:
            between()
            weights.append({term.name: term.weight for term in _terms(objective, model, copied(one), asked)})
        again()
    found = Window({}, [], [])
    for parameter in parameters.values():
        parameter.grad = None
    before: Gradient = {}
    for one in micro_batches:
        between()
        terms = _terms(objective, model, one, asked)
        found.weights.append({term.name: term.weight for term in terms})
        found.losses.append({term.name: term.number() for term in terms})
        # What weighs nothing is left out: a mean over nothing is 0 / 0.
        roots = [term.root(_share(term, weights or found.weights, asked)) for term in terms if term.weight]
        if roots:
            torch.autograd.backward([value for value, _ in roots], [seed for _, seed in roots])
        if keep_parts:
            now = read(parameters)
            found.parts.append({name: value - before[name] if name in before else value for name, value in now.items()})
            before = now
    found.gradient = read(parameters)
    return found


def read(parameters: Mapping[str, Tensor]) -> Gradient:
    """Copies of the gradients that there are, dense."""
    found = {}
    for name, parameter in parameters.items():
        if parameter.grad is not None:
            one = parameter.grad.detach()
            found[name] = one.to_dense() if one.layout is not torch.strided else one.clone()
    return found


@dataclass(slots=True)
class _Term:
    """One thing to differentiate. A mean still has to be multiplied by its weight to be a total."""

    name: str
    value: Tensor
    vector: Tensor | None
    weight: float
    is_mean: bool

    def root(self, share: float) -> tuple[Tensor, Tensor]:
        """The value, and what backward starts from."""
        if self.vector is None:
            return self.value, torch.full_like(self.value, share)
        return self.value, self.vector.to(self.value) * share

    def number(self) -> float:
        value = self.value.detach()
        return float(value if self.vector is None else (value * self.vector.to(value).conj()).sum().real)


def _terms(objective: Any, model: Any, micro_batch: Any, asked: Asked) -> list[_Term]:
    answer = objective(model, micro_batch)
    named = answer if isinstance(answer, Mapping) else {"loss": answer}
    found = []
    for key, one in named.items():
        name = str(key)
        if isinstance(one, Tensor):
            found.append(_Term(name, one, None, _told(objective, name, micro_batch, asked), True))
        elif hasattr(one, "vector"):
            found.append(_Term(name, one.outputs, one.vector, float(one.weight), False))
        else:
            found.append(_Term(name, one.total, None, float(one.weight), False))
    return found


def _told(objective: Any, name: str, micro_batch: Any, asked: Asked) -> float:
    """What a mean counts: what the objective's `weight` says, else rows."""
    tell = getattr(objective, "weight", None)
    if not callable(tell):
        return float(rows_of(micro_batch, asked.count_rows) or 1)
    weight = tell(micro_batch)
    return float(weight[name] if isinstance(weight, Mapping) else weight)


def _share(term: _Term, weights: Sequence[Mapping[str, float]], asked: Asked) -> float:
    """What backward of a term starts from, so that the sum over micro-batches is the gradient that was asked for."""
    own = term.weight if term.is_mean else 1.0
    if asked.reduction == "micro_batches":
        own = (1.0 if term.is_mean else 1.0 / term.weight) / len(weights)
    elif asked.reduction == "mean":
        own /= sum(one.get(term.name, 0.0) for one in weights)
    return own * asked.coefficients.get(term.name, 1.0)
