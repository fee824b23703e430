"""The held-out data of a run and its evaluation: whole, or paused where a signal asks for something."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from trainer.data.sources import Source, source_of
from trainer.device import placed
from trainer.errors import ConfigError, Paused
from trainer.evaluate import Evaluation, Metrics
from trainer.gradient.precision import width
from trainer.settings import Settings
from trainer.signals import Signals
from trainer.step import Step


class HeldOut:
    """Evaluates the model of a step on held-out data.

    Args:
        data: of the kinds that a Trainer takes; None where a run has none.
        signals: looked at between two micro-batches of `measure`.
    """

    def __init__(
        self,
        data: Any,
        step: Step,
        metrics: Metrics | None,
        settings: Settings,
        device: torch.device,
        signals: Signals,
        count_rows: Callable[[Any], int] | None = None,
    ) -> None:
        self.source: Source | None = None
        if data is not None:
            self.source = placed(source_of(data, settings.data, evaluation=True), device, width(settings.precision))
        self.evaluation = Evaluation(
            step.objective,
            metrics,
            settings.evaluation.grad_mode,
            settings.gradient.coefficients,
            count_rows,
            settings.precision,
            device.type,
        )
        self._step = step
        self._signals = signals

    def evaluate(self, between: Callable[[], None] | None = None) -> tuple[dict[str, float], int]:
        """The metrics by name and the rows that they are of. Raises ConfigError where there is no data."""
        source = self.source
        if source is None:
            raise ConfigError(
                "there is no evaluation data: give evaluation_data= (in a recipe: the Split's second part)."
            )
        step = self._step
        return self.evaluation(step.model, lambda done: source.micro_batches(0, 0, done), step.optimizers, between)

    def evaluate_anew(self) -> tuple[dict[str, float], int]:
        """The same, whatever was paused before."""
        self.evaluation.sums = None
        return self.evaluate()

    def measure(self, answer: Callable[[], None]) -> tuple[dict[str, float], int]:
        """The same from where it was paused; what a signal asks for has its `answer` outside of the evaluation, where
        modules and optimizers are in train mode again. Raises Paused where that is to stop."""
        while True:
            try:
                return self.evaluate(self._look)
            except Paused:
                answer()

    def state_dict(self) -> dict[str, Any] | None:
        return self.evaluation.state_dict()

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        self.evaluation.load_state_dict(state)

    def _look(self) -> None:
        if self._signals.asked:
            raise Paused
