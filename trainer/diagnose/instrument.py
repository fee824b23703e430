"""What an instrument of a run is: something that looks at the gradient beside the training, and never changes it."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from trainer.gradient.report import Report

Trouble = tuple[str, str]
"""In a word, and in a line: `("vanishing", "'0.weight' since step 150")`."""


class Instrument:
    """An instrument has of these seven what it needs. All that it says is a sentence, or a line of words.

    One that looks at micro-batches hangs itself on `Step.after_backward` as well.

    Attributes:
        tags: how the tags begin that it puts into `report.measured`; a chart of what nobody measures is not shown.
    """

    tags: tuple[str, ...] = ()

    def notes(self) -> list[str]:
        """What can be said before the first step."""
        return []

    def look(self, parameters: Mapping[str, Tensor], report: Report) -> list[str]:
        """What is new. Called now and then, when a report is read anyway: numbers for the loggers go into
        `report.measured`."""
        return []

    def skip(self, parameters: Mapping[str, Tensor], report: Report) -> None:
        """A window was skipped; its gradients are still there. On a device it comes where a report is read."""

    def troubles(self) -> list[Trouble]:
        """What was wrong with the gradient, for the run's end."""
        return []

    def words(self) -> list[str]:
        """What else there is to say of the gradient, for the run's end."""
        return []

    def state_dict(self) -> dict[str, Any] | None:
        """What was seen and said so far: numbers, words and tensors. None where nothing has to be kept."""
        return None

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`."""
