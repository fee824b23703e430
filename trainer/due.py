"""What happens every so often: a mark on a clock, looked at after every window without a device read."""

from trainer.gradient.clocks import Clocks

# How far one window moves a clock, where that is known before it is drawn; the epochs clock moves after it.
_MOVES = {"windows": 1, "steps": 1, "epochs": 0}
_ANY = 1 << 62


class Due:
    """True once each time the clock passes another multiple of `every`.

    Args:
        every: ticks between two times; None: never.
        clock: one of the clocks.
        at_once: whether the very first tick counts too.
    """

    def __init__(self, every: int | None, clock: str, at_once: bool = False) -> None:
        self._every = every
        self._clock = clock
        self._next: int | None = None
        self._at_once = at_once
        self._move = _MOVES.get(clock, _ANY)

    def start(self, clocks: Clocks) -> None:
        """Begin at the clocks as they stand: the next multiple is the first mark."""
        if self._every is not None:
            now = clocks.as_dict()[self._clock]
            self._next = 1 if self._at_once and now == 0 else (now // self._every + 1) * self._every

    def is_near(self, clocks: Clocks) -> bool:
        """Whether the next window may bring the mark, known without a device read."""
        return self._next is not None and clocks.may_reach(self._clock, self._next - self._move)

    def __call__(self, clocks: Clocks) -> bool:
        if self._next is None or self._every is None or not clocks.has_reached(self._clock, self._next):
            return False
        now: int = getattr(clocks, self._clock)
        self._next = (now // self._every + 1) * self._every
        return True
