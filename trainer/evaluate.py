"""Evaluation: the objective and the metrics over held-out rows, and afterwards everything as it was.

The gradient mode is the one asked for; each submodule's train or eval mode, every `.grad` and every generator are bit
for bit what they were before. Sums are weighed as in training, so the last, shorter micro-batch counts by its weight.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from trainer import modes, rng
from trainer.diagnose.mistakes import Forward, explain
from trainer.diagnose.retention import Retention
from trainer.diagnose.words import listed
from trainer.distributed.ranks import OneProcess, Ranks
from trainer.errors import ConfigError, DataError, Paused
from trainer.gradient.objective import MEAN, Sum, terms_of
from trainer.gradient.precision import autocast
from trainer.gradient.weigher import Weigher
from trainer.gradient.weights import host_number

_MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "enabled": torch.enable_grad,
}

Metrics = Callable[[Any, Any], Mapping[str, Sum]] | Mapping[str, Any]


class Sums:
    """An evaluation on its way: how many micro-batches and rows lie behind, and Σ total and Σ weight by name.

    `rng` are the generators where it was paused.
    """

    def __init__(self) -> None:
        self.position = 0
        self.rows = 0
        self.terms: dict[str, list[Any]] = {}
        self.metrics: dict[str, list[Any]] = {}
        self.rng: dict[str, Any] | None = None


def summed(ranks: Ranks, own: Sums, is_paused: bool) -> Sums | None:
    """The sums of all ranks, added in their order, so that every rank comes to the same; None where one was paused."""
    plain = [{name: (float(t), float(w)) for name, (t, w) in part.items()} for part in (own.terms, own.metrics)]
    found = Sums()
    everyone = ranks.gather((is_paused, own.rows, *plain))
    if any(theirs[0] for theirs in everyone):
        return None
    for _, rows, terms, metrics in everyone:
        found.rows += rows
        for part, theirs in ((found.terms, terms), (found.metrics, metrics)):
            for name, (total, weight) in theirs.items():
                _accumulate(part, name, total, weight)
    return found


class Evaluation:
    """How a model is evaluated.

    Args:
        metrics: `metrics(model, micro_batch) -> {name: Sum(total, weight)}`, or a mapping from names to torchmetrics
            objects (update, compute, reset) which are given (outputs, targets) of (inputs, targets) micro-batches.
        grad_mode: no_grad, inference_mode or enabled.
        coefficients: factors of the objective's named terms, for the loss.
    """

    def __init__(
        self,
        objective: Any,
        metrics: Metrics | None = None,
        grad_mode: str = "no_grad",
        coefficients: Mapping[str, float] | None = None,
        count_rows: Callable[[Any], int] | None = None,
        precision: str = "fp32",
        device_type: str = "cpu",
        ranks: Ranks | None = None,
    ) -> None:
        if grad_mode not in _MODES:
            raise ConfigError(f"evaluation.grad_mode={grad_mode!r} is not possible: choose one of {', '.join(_MODES)}.")
        self.grad_mode = grad_mode
        self._objective = objective
        self._metrics = metrics
        self._coefficients = dict(coefficients or {})
        self._weigher = Weigher(objective, count_rows)
        self._autocast = autocast(precision, device_type)
        self._ranks: Ranks = ranks or OneProcess()
        self.sums: Sums | None = None
        """Of an evaluation that was paused."""
        self.found: Callable[[str], None] = lambda text: None
        """Hears of a graph that something keeps alive, once."""
        self._kept: dict[str, Retention] = {}
        self._is_said = False

    def __call__(
        self,
        model: Any,
        micro_batches: Iterable[Any] | Callable[[int], Iterable[Any]],
        optimizers: Sequence[Any] = (),
        between: Callable[[], None] | None = None,
    ) -> tuple[dict[str, float], int]:
        """The weighted means by name, `loss` first, and how many rows they are of.

        `micro_batches` may be a function of the number of micro-batches that lie behind. `between` is called after each
        one; when it raises Paused, on whatever rank, the next call goes on from there. NaN where nothing weighs
        anything. Raises DataError where there is no micro-batch, ConfigError for a metric that cannot be summed or has
        a name that is taken.
        """
        objects = self._torchmetrics()
        sums, self.sums = self.sums or Sums(), None
        with (
            rng.preserved(),
            modes.in_eval(model, optimizers),
            _MODES[self.grad_mode](),
            self._autocast or nullcontext(),
        ):
            if not sums.position:
                for metric in objects.values():
                    metric.reset()
            left = micro_batches(sums.position) if callable(micro_batches) else micro_batches
            if sums.rng is not None:
                rng.restore(sums.rng)
            paused = False
            for micro_batch in left:
                sums.rows += self._weigher.rows(micro_batch)
                try:
                    self._add_terms(model, micro_batch, sums.terms)
                    self._add_metrics(model, micro_batch, sums.metrics, objects)
                except (RuntimeError, ValueError, IndexError) as error:
                    explain(error, Forward(model, self._objective, micro_batch, {}))
                    raise
                sums.position += 1
                if paused := between is not None and _is_paused(between):
                    break
            whole = summed(self._ranks, sums, paused) if self._ranks.world_size > 1 else None if paused else sums
            if whole is None:
                sums.rng = rng.capture()
                self.sums = sums
                raise Paused
            sums = whole
            if not sums.terms:
                raise DataError("the evaluation data gave no micro-batch: it is empty.")
            terms = sums.terms
            found = {"loss": self._loss(terms), **{name: _mean(*pair) for name, pair in terms.items() if name != MEAN}}
            own = {name: _mean(*pair) for name, pair in sums.metrics.items()}
            own.update({name: float(metric.compute()) for name, metric in objects.items()})
        for name in own:
            if name in found:
                raise ConfigError(f"the metric '{name}' has the name of one of the objective's terms: choose another.")
        return {**found, **own}, sums.rows

    def state_dict(self) -> dict[str, Any] | None:
        """How far an evaluation came that was paused, None where there is none.

        What torchmetrics objects hold cannot be saved by their protocol: with them it begins anew, and gives the same.
        """
        return None if self.sums is None or self._torchmetrics() else dict(vars(self.sums))

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        self.sums = None
        if state is not None:
            self.sums = Sums()
            vars(self.sums).update({name: state[name] for name in vars(self.sums)})

    def _loss(self, terms: Mapping[str, list[Any]]) -> float:
        """As a step's report has it: a term that weighs nothing has no mean and says nothing about the others."""
        weighed = {name: pair for name, pair in terms.items() if float(pair[1])}
        if not weighed:
            return float("nan")
        return sum(self._coefficients.get(name, 1.0) * _mean(*pair) for name, pair in weighed.items())

    def _add_terms(self, model: Any, micro_batch: Any, sums: dict[str, list[Any]]) -> None:
        terms = terms_of(self._objective(model, micro_batch), self._objective)
        self._look_for_holders("objective", model, [term.value for term in terms])
        for term in terms:
            weight = term.weight if term.weight is not None else self._weigher.mean_weight(term.name, micro_batch)
            if isinstance(weight, float) and weight == 0.0:
                total: Any = 0.0  # the mean of nothing is NaN
            else:
                total = term.number() * weight if term.weight is None else term.number()
            _accumulate(sums, term.name, total, weight)

    def _add_metrics(
        self, model: Any, micro_batch: Any, sums: dict[str, list[Any]], objects: Mapping[str, Any]
    ) -> None:
        if objects:
            if not isinstance(micro_batch, list | tuple) or len(micro_batch) != 2:
                raise ConfigError(
                    "torchmetrics objects are given the outputs and targets of (inputs, targets) pairs, the data has "
                    f"{type(micro_batch).__name__}: give a function metrics(model, micro_batch) -> {{name: Sum}}."
                )
            inputs, targets = micro_batch
            outputs = model(inputs) if callable(model) else model.forward(inputs)
            if self.grad_mode == "enabled":
                outputs = self._without_graph(outputs, objects)
            for metric in objects.values():
                metric.update(outputs, targets)
        elif callable(self._metrics):
            answers = self._metrics(model, micro_batch)
            if not isinstance(answers, Mapping):
                raise ConfigError(
                    f"metrics(...) returned {type(answers).__name__}: return {{name: Sum(total, weight)}}."
                )
            self._look_for_holders("metrics", model, [one.total for one in answers.values() if isinstance(one, Sum)])
            for name, answer in answers.items():
                if name == "loss" or not isinstance(answer, Sum):
                    raise ConfigError(
                        f"the metric '{name}' is {type(answer).__name__}: return Sum(total, weight) under a name other "
                        "than loss, so that it can be summed over micro-batches of any size."
                    )
                _accumulate(sums, name, host_number(answer.total), host_number(answer.weight))

    def _without_graph(self, outputs: Any, objects: Mapping[str, Any]) -> Any:
        """What metrics are given: one that keeps it until compute() would keep a graph of every micro-batch alive."""
        detached = _detached(outputs)
        if detached is not outputs and not self._is_said:
            self._is_said = True
            self.found(
                f"the outputs that {listed(objects)} is given have a graph (evaluation.grad_mode=enabled), which a "
                "metric would keep alive until the evaluation ends: they are detached first."
            )
        return detached

    def _look_for_holders(self, what: str, model: Any, roots: Sequence[Any]) -> None:
        """In grad_mode=enabled, whether somebody keeps the graphs of earlier micro-batches alive."""
        if self.grad_mode != "enabled":
            return
        if what not in self._kept:
            step = SimpleNamespace(model=model, objective=self._objective)
            self._kept[what] = Retention(step, self._found_in_evaluation, metrics=self._metrics)
        self._kept[what](None, [root for root in roots if isinstance(root, Tensor)])

    def _found_in_evaluation(self, text: str) -> None:
        self.found(f"in evaluation {text}")

    def _torchmetrics(self) -> dict[str, Any]:
        if not isinstance(self._metrics, Mapping):
            return {}
        for name, metric in self._metrics.items():
            if not all(callable(getattr(metric, method, None)) for method in ("update", "compute", "reset")):
                raise ConfigError(
                    f"metrics['{name}'] is {type(metric).__name__}: a mapping holds torchmetrics objects; for others "
                    "give a function metrics(model, micro_batch) -> {name: Sum(total, weight)}."
                )
            if self._ranks.world_size > 1 and not hasattr(metric, "sync_on_compute"):
                raise ConfigError(
                    f"metrics['{name}'] is {type(metric).__name__}, which does not sum itself over ranks: give a "
                    "function metrics(model, micro_batch) -> {name: Sum(total, weight)}."
                )
        return dict(self._metrics)


def _is_paused(between: Callable[[], None]) -> bool:
    try:
        between()
    except Paused:
        return True
    return False


def _detached(value: Any) -> Any:
    """The same without graphs; itself where there is none."""
    if isinstance(value, Tensor):
        return value.detach() if value.requires_grad else value
    if type(value) in (list, tuple, dict):
        items = list(value.values()) if isinstance(value, dict) else list(value)
        made = [_detached(item) for item in items]
        if all(one is other for one, other in zip(items, made, strict=True)):
            return value
        return dict(zip(value, made, strict=True)) if isinstance(value, dict) else type(value)(made)
    return value


def _accumulate(sums: dict[str, list[Any]], name: str, total: Any, weight: Any) -> None:
    if name in sums:
        sums[name][0] = sums[name][0] + total
        sums[name][1] = sums[name][1] + weight
    else:
        sums[name] = [total, weight]


def _mean(total: Any, weight: Any) -> float:
    weight = float(weight)
    return float(total) / weight if weight else float("nan")
