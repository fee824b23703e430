"""Data: its order, its micro-batches, its windows."""

from trainer.data.order import mixed, order
from trainer.data.sources import Source, Split, source_of
from trainer.data.windows import Window, windows

__all__ = ["Source", "Split", "Window", "mixed", "order", "source_of", "windows"]
