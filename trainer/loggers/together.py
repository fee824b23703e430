"""All loggers of a run as one."""

from collections.abc import Iterator, Sequence
from typing import Any

from trainer.gradient.report import Report
from trainer.loggers.events import Evaluated, Logger, Start, Stop


class Together:
    """Passes each event on to every logger, in their order.

    `ticks` are the functions that want to be called after every window.
    """

    def __init__(self, loggers: Sequence[Logger]) -> None:
        self.loggers = list(loggers)
        self.ticks = [logger.tick for logger in self.loggers if hasattr(logger, "tick")]

    def __iter__(self) -> Iterator[Logger]:
        return iter(self.loggers)

    def start(self, event: Start) -> None:
        for logger in self.loggers:
            logger.start(event)

    def step(self, report: Report, seconds: float) -> None:
        for logger in self.loggers:
            logger.step(report, seconds)

    def evaluate(self, event: Evaluated, model: Any) -> None:
        for logger in self.loggers:
            logger.evaluate(event, model)

    def skip(self, report: Report) -> None:
        for logger in self.loggers:
            logger.skip(report)

    def flush(self) -> None:
        """What loggers keep in line goes to their files, or a run that goes on from the checkpoint would miss it."""
        for logger in self.loggers:
            if hasattr(logger, "flush"):
                logger.flush()

    def stop(self, event: Stop) -> None:
        """Each is told, also where another one fails. Raises the first error."""
        errors: list[Exception] = []
        for logger in self.loggers:
            try:
                logger.stop(event)
            except Exception as error:
                errors.append(error)
        if errors:
            raise errors[0]
