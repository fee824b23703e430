"""All loggers of a run as one."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from trainer.errors import ConfigError
from trainer.gradient.report import Report
from trainer.loggers.events import Evaluated, Found, Start, Stop

EVENTS = ("start", "step", "evaluate", "skip", "stop")


class Together:
    """Passes each event on to every logger that has a method for it, in their order.

    `ticks` are the functions that want to be called after every window.
    """

    def __init__(self, loggers: Sequence[Any]) -> None:
        self.loggers = list(loggers)
        for logger in self.loggers:
            if not any(callable(getattr(logger, event, None)) for event in (*EVENTS, "tick", "look", "found")):
                raise ConfigError(
                    f"the logger {type(logger).__name__} listens to nothing: give it one of {', '.join(EVENTS)}."
                )
        self._listening = {
            event: [logger for logger in self.loggers if callable(getattr(logger, event, None))] for event in EVENTS
        }
        self.ticks = [logger.tick for logger in self.loggers if hasattr(logger, "tick")]
        self._looks = [logger.look for logger in self.loggers if hasattr(logger, "look")]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.loggers)

    def start(self, event: Start) -> None:
        for logger in self._listening["start"]:
            logger.start(event)

    def look(self, parameters: Mapping[str, Tensor], report: Report) -> None:
        for look in self._looks:
            look(parameters, report)

    def step(self, report: Report, seconds: float) -> None:
        for logger in self._listening["step"]:
            logger.step(report, seconds)

    def evaluate(self, event: Evaluated, model: Any) -> None:
        for logger in self._listening["evaluate"]:
            logger.evaluate(event, model)

    def skip(self, report: Report) -> None:
        for logger in self._listening["skip"]:
            logger.skip(report)

    def found(self, event: Found) -> None:
        for logger in self.loggers:
            if callable(getattr(logger, "found", None)):
                logger.found(event)

    def flush(self) -> None:
        """What loggers keep in line goes to their files, or a run that goes on from the checkpoint would miss it."""
        for logger in self.loggers:
            if hasattr(logger, "flush"):
                logger.flush()

    def stop(self, event: Stop) -> None:
        """Each is told, also where another one fails. Raises the first error."""
        errors: list[Exception] = []
        for logger in self._listening["stop"]:
            try:
                logger.stop(event)
            except Exception as error:
                errors.append(error)
        if errors:
            raise errors[0]
