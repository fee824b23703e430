"""The held-out data of a run and its evaluation: whole, or paused where a signal asks for something."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from trainer.data.dealt import NOTHING, Dealt, dealt
from trainer.data.sources import Source, source_of
from trainer.device import placed
from trainer.errors import ConfigError, Paused
from trainer.evaluate import Evaluation, Metrics
from trainer.gradient.parameters import named_modules
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
        self.source: Source | Dealt | None = None
        if data is not None:
            origin = source_of(data, settings.data, evaluation=True)
            self.source = dealt(placed(origin, device, width(settings.precision)), origin, step.ranks)
        self.evaluation = Evaluation(
            step.objective,
            metrics,
            settings.evaluation.grad_mode,
            settings.gradient.coefficients,
            count_rows,
            settings.precision,
            device.type,
            step.ranks,
        )
        self._step = step
        self._signals = signals
        self.look: Callable[[], None] = self._look
        """What is done after each micro-batch of `measure`: it raises Paused where a signal waits for its answer."""

    def evaluate(self, between: Callable[[], None] | None = None) -> tuple[dict[str, float], int]:
        """The metrics by name and the rows that they are of. Raises ConfigError where there is no data."""
        source = self.source
        if source is None:
            raise ConfigError(
                "there is no evaluation data: give evaluation_data= (in a recipe: the Split's second part)."
            )
        step = self._step

        def left(done: int) -> Iterator[Any]:
            position = source.position_after(done) if isinstance(source, Dealt) else done
            return (batch for batch in source.micro_batches(0, 0, position) if batch is not NOTHING)

        if step.ranks.world_size == 1:
            return self.evaluation(step.model, left, step.optimizers, between)
        with _buffers_of_the_first(step):
            return self.evaluation(step.model, left, step.optimizers, between)

    def evaluate_anew(self) -> tuple[dict[str, float], int]:
        """The same, whatever was paused before."""
        self.evaluation.sums = None
        return self.evaluate()

    def measure(self, answer: Callable[[], None]) -> tuple[dict[str, float], int]:
        """The same from where it was paused; what a signal asks for has its `answer` outside of the evaluation, where
        modules and optimizers are in train mode again. Raises Paused where that is to stop."""
        while True:
            try:
                return self.evaluate(self.look)
            except Paused:
                answer()

    def state_dict(self) -> dict[str, Any] | None:
        return self.evaluation.state_dict()

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        self.evaluation.load_state_dict(state)

    def _look(self) -> None:
        if self._signals.asked:
            raise Paused


@contextmanager
def _buffers_of_the_first(step: Step) -> Iterator[None]:
    """All ranks evaluate the model that the first one saves: with its buffers (BatchNorm's are each rank's own)."""
    own = {
        f"{prefix}.{name}": buffer
        for prefix, module in named_modules(step.model).items()
        for name, buffer in module.named_buffers(recurse=False)
    }
    if not own:
        yield
        return
    first = step.ranks.rank == 0
    theirs = step.ranks.gather({name: buffer.cpu() for name, buffer in own.items()} if first else None)[0]
    before = {} if first else {name: buffer.clone() for name, buffer in own.items()}
    _copy(own, {name: theirs[name] for name in before})
    try:
        yield
    finally:
        _copy(own, before)


@torch.no_grad()
def _copy(into: Mapping[str, torch.Tensor], values: Mapping[str, torch.Tensor]) -> None:
    for name, value in values.items():
        into[name].copy_(value)
