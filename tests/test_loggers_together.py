"""All loggers as one: each hears what it has a method for."""

from typing import Any

import pytest
import torch

from trainer import Trainer
from trainer.errors import ConfigError
from trainer.loggers.together import Together


class Heard:
    """Hears evaluations and the end, and nothing else."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def evaluate(self, event: Any, model: Any) -> None:
        self.events.append("evaluate")

    def stop(self, event: Any) -> None:
        self.events.append("stop")


def test_a_logger_may_leave_events_out() -> None:
    heard = Heard()
    model = torch.nn.Linear(1, 1)
    rows = (torch.ones(4, 1),)
    Trainer(
        model,
        lambda model, batch: model(batch[0]).square().mean(),
        torch.optim.SGD(model.parameters(), lr=0.1),
        data=rows,
        evaluation_data=rows,
        epochs=2,
        console=False,
        loggers=[heard],
    ).fit()
    assert heard.events == ["evaluate", "evaluate", "stop"]


def test_an_object_that_listens_to_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="the logger object listens to nothing: give it one of start, step"):
        Together([object()])


def test_every_logger_is_stopped_and_the_first_error_is_raised() -> None:
    class Failing(Heard):
        def stop(self, event: Any) -> None:
            raise ValueError(f"after {self.events}")

    heard = Heard()
    with pytest.raises(ValueError, match="after"):
        Together([Failing(), heard]).stop(None)  # type: ignore[arg-type]
    assert heard.events == ["stop"]
