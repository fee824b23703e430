"""What a run draws: the windows of an epoch from its place on, and what to draw again when one is given up."""

from collections.abc import Iterator
from typing import Any

from trainer import rng
from trainer.checkpoint.run_state import RunState
from trainer.data.sources import Source, TensorSource
from trainer.data.windows import FullWindow, Window, windows
from trainer.errors import DataError
from trainer.gradient.clocks import Clocks
from trainer.gradient.weigher import Weigher


class Feed:
    """The training data of a run.

    Args:
        source: where micro-batches come from.
        accumulation_steps: micro-batches in a window.
        state: the run's place in the data.
        clocks: the step's.
        weigher: what tells whether every target of the data counts.
    """

    def __init__(
        self, source: Source, accumulation_steps: int, state: RunState, clocks: Clocks, weigher: Weigher
    ) -> None:
        self.source = source
        self._accumulation_steps = accumulation_steps
        self._state = state
        self._clocks = clocks
        self._weigher = weigher
        self._rewind = rng.Rewind()
        self._marked = -1
        self._looked_at: list[int] = []
        self._is_full = False

    def start(self) -> None:
        """The run begins or goes on: what was drawn before is not to be taken back."""
        self._rewind = rng.Rewind()
        self._marked = -1

    def windows(self) -> Iterator[Window]:
        """The rest of this epoch, window by window. Raises DataError for an epoch without a micro-batch."""
        clocks, rewind = self._clocks, self._rewind
        rewind.mark()
        self._marked = clocks.windows
        count = 0
        for window in windows(self._micro_batches(), self._accumulation_steps, self._kind()):
            count += 1
            yield window
            rewind.mark()
            self._marked = clocks.windows
        if not count and not self._state.position:
            raise DataError("the data gave no micro-batch in a whole epoch: it is empty.")

    def is_at_end(self) -> bool:
        """Whether the epoch's micro-batches are all drawn, where the data tells their number."""
        return self._state.position == self.source.length()

    def look(self) -> None:
        """Now and then: find out which generators windows draw from."""
        self._rewind.look()

    def take_back(self) -> None:
        """The open window was given up: what it drew is drawn again when the run goes on."""
        if self._marked == self._clocks.windows:
            self._rewind.back()

    def _kind(self) -> type[Window]:
        """Full windows where all targets in memory count, looked at again only where somebody changed them."""
        if not isinstance(self.source, TensorSource):
            return Window
        versions = [tensor._version for tensor in self.source.tensors]
        if versions != self._looked_at:
            self._looked_at = versions
            self._is_full = self._weigher.leaves_nothing_out(self.source.tensors)
        return FullWindow if self._is_full else Window

    def _micro_batches(self) -> Iterator[Any]:
        """The rest of this epoch. Data that draws its order from the generators draws it again as the epoch began."""
        state = self._state
        place = state.order_seed, self._clocks.epochs, state.position
        if self.source.owns_order:
            return self.source.micro_batches(*place)
        if not state.position or state.epoch_rng is None:
            state.epoch_rng = rng.capture()
            return self.source.micro_batches(*place)
        with rng.preserved():
            rng.restore(state.epoch_rng)
            return self.source.micro_batches(*place)
