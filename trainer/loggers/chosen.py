"""The loggers that the settings ask for; each is imported only where it is used."""

from pathlib import Path

from trainer.loggers.events import Logger
from trainer.settings import LoggerSettings


def chosen(settings: LoggerSettings, folder: Path | None, goes_on: bool = False) -> list[Logger]:
    """Console, TensorBoard and metrics.jsonl as asked for; the files only where there is a folder.

    With `goes_on` a file that cannot be written is a warning and no error.
    """
    loggers: list[Logger] = []
    if settings.console:
        from trainer.loggers.console import Console

        loggers.append(Console())
    if folder is not None and settings.tensorboard:
        from trainer.loggers.tensorboard import TensorBoard

        loggers.append(
            TensorBoard(
                folder,
                histograms=settings.histograms,
                layer_norms=settings.layer_norms,
                clock=settings.clock,
                goes_on=goes_on,
            )
        )
    if folder is not None and settings.metrics:
        from trainer.loggers.metrics import Metrics

        loggers.append(Metrics(folder, goes_on))
    return loggers
