"""What a run draws: the windows of an epoch from its place on, and what to draw again when one is given up."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

from torch import Tensor

from trainer import rng
from trainer.checkpoint.run_state import RunState
from trainer.data.dealt import Dealt, dealt_windows, whole_of
from trainer.data.iterables import ListSource
from trainer.data.sources import Source, TensorSource
from trainer.data.windows import FullWindow, Window, windows
from trainer.errors import DataError
from trainer.gradient.clocks import Clocks
from trainer.gradient.weigher import Weigher
from trainer.signals import Signals


class Feed:
    """The training data of a run.

    Args:
        source: where micro-batches come from.
        accumulation_steps: micro-batches in a window.
        state: the run's place in the data.
        clocks: the step's.
        weigher: what tells whether every target of the data counts.
        signals: told while the run waits for data, so that a stop need not wait for it.
    """

    def __init__(
        self,
        source: Source | Dealt,
        accumulation_steps: int,
        state: RunState,
        clocks: Clocks,
        weigher: Weigher,
        signals: Signals,
    ) -> None:
        self.source = source
        self._accumulation_steps = accumulation_steps
        self._state = state
        self._clocks = clocks
        self._weigher = weigher
        self._signals = signals
        self._rewind = rng.Rewind()
        self._marked = -1
        self._marked_at = 0
        self._draws = not isinstance(whole_of(source), TensorSource | ListSource)
        self.window: Window | None = None
        """The window that was drawn last."""
        self.drawn: Callable[[Window], None] | None = None
        """Called with each window before its step, where somebody set it."""
        self.keeps_generators = False
        """Whether `before_forward` will be asked, so that the generators are held once more where data draws too."""
        self._looked_at: list[int] = []
        self._is_full = False
        self._drawn_from: Iterator[Any] = iter(())

    def start(self) -> None:
        """The run begins or goes on: what was drawn before is not to be taken back."""
        self._rewind = rng.Rewind()
        self._marked = -1

    def windows(self) -> Iterator[Window]:
        """The rest of this epoch, window by window. Raises DataError for an epoch without a micro-batch."""
        signals = self._signals
        self._mark()
        signals.waiting = True
        self._drawn_from = self._micro_batches()
        signals.waiting = False
        cut = dealt_windows if isinstance(self.source, Dealt) else windows
        batches = cut(self._drawn_from, self._accumulation_steps, self._kind())
        count = 0
        window = self._first(batches)
        while window is not None:
            count += 1
            self.window = window
            if self.drawn is not None:
                self.drawn(window)
            yield window
            self._mark()
            signals.waiting = True
            window = next(batches, None)
            signals.waiting = False
            if self._draws and self.keeps_generators:
                self._rewind.drawn()
        self._marked = -1
        if not count and not self._state.position:
            raise DataError("the data gave no micro-batch in a whole epoch: it is empty.")

    def _first(self, batches: Iterator[Window]) -> Window | None:
        """The first window. One that is open already is drawn as it was when it began, and what it drew since stays."""
        state = self._state
        with nullcontext() if state.window_rng is None else rng.preserved():
            if state.window_rng is not None:
                rng.restore(state.window_rng)
            self._mark()
            self._signals.waiting = True
            window = next(batches, None)
            self._signals.waiting = False
            if self._draws and self.keeps_generators:
                self._rewind.drawn()
        state.window_rng = None
        return window

    def _mark(self) -> None:
        self._rewind.mark()
        self._marked = self._clocks.windows
        self._marked_at = self._clocks.micro_batches

    def is_at_end(self) -> bool:
        """Whether the epoch's micro-batches are all drawn, where the data tells their number."""
        return self._state.position == self.source.length()

    def before_forward(self) -> tuple[dict[str, Any], list[str]]:
        """The generators before the last window's first forward, and the names of those that nobody can tell."""
        return self._rewind.before_forward()

    def row_numbers(self, count: int) -> list[Tensor] | None:
        """The rows of the data in the last window's micro-batches, where the trainer's own order tells them."""
        source, rank, world_size = self.source, 0, 1
        if isinstance(source, Dealt):
            if source.lengths is not None:
                return None
            rank, world_size = source.rank, source.world_size
        numbers = getattr(whole_of(source), "row_numbers", None)
        if numbers is None:
            return None
        position = self._marked_at - self._state.epoch_began
        own = numbers(self._state.order_seed, self._clocks.epochs, position)[rank::world_size][:count]
        return list(own)

    def look(self) -> None:
        """Now and then: find out which generators windows draw from."""
        self._rewind.look()

    def close(self) -> None:
        """Nothing more is drawn: processes that load data end."""
        drawn_from, self._drawn_from = self._drawn_from, iter(())
        if hasattr(drawn_from, "close"):
            drawn_from.close()

    def take_back(self) -> None:
        """The open window was given up: what it drew is drawn again when the run goes on."""
        self._signals.waiting = False
        state = self._state
        if state.window_rng is None and self._marked != self._clocks.windows:
            return
        if not (self.source.owns_order or state.position) and state.epoch_rng is not None:
            rng.restore(state.epoch_rng)  # the epoch begins again, and draws its order again
        elif state.window_rng is not None:
            rng.restore(state.window_rng)
        else:
            self._rewind.back()
        state.window_rng = None

    def keep_open(self) -> None:
        """The open window will be gone on with: the run's state keeps what it takes to draw it again."""
        self._signals.waiting = False
        if self._state.window_rng is None:
            with rng.preserved():
                self._rewind.back()
                self._state.window_rng = rng.capture()

    def _kind(self) -> type[Window]:
        """Full windows where all targets in memory count, looked at again only where somebody changed them."""
        source = self.source.whole if isinstance(self.source, Dealt) else self.source
        if not isinstance(source, TensorSource):
            return Window
        versions = [tensor._version for tensor in source.tensors]
        if versions != self._looked_at:
            self._looked_at = versions
            self._is_full = self._weigher.leaves_nothing_out(source.tensors)
        return FullWindow if self._is_full else Window

    def _micro_batches(self) -> Iterator[Any]:
        """The rest of this epoch. Data that draws its order from the generators draws it again as the epoch began."""
        state = self._state
        place = state.order_seed, self._clocks.epochs, state.position
        if self.source.owns_order:
            return self.source.micro_batches(*place)
        if state.epoch_rng is None or not (state.position or state.window_rng):
            state.epoch_rng = rng.capture()
            return self.source.micro_batches(*place)
        with rng.preserved():
            rng.restore(state.epoch_rng)
            return self.source.micro_batches(*place)
