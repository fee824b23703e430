"""The clocks of a run: what was drawn, and what of it was taken.

micro_batches, windows and epochs count what was drawn; steps, rows and tokens only what went into a step that was
taken. Where the verdict of a window stays on a device, the latter three stay there as well, until somebody reads them.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

DRAWN = ("micro_batches", "windows", "epochs")
TAKEN = ("steps", "rows", "tokens")


def counted(number: int, one: str, more: str | None = None) -> str:
    """A count in words: `1 step`, `1,000 rows`; `more` where its plural is no s more."""
    return f"{number:,} {one if number == 1 else more or f'{one}s'}"


@dataclass(slots=True)
class Clocks:
    """Named counts. `most` bounds a clock from above without a device read."""

    micro_batches: int = 0
    windows: int = 0
    epochs: int = 0
    steps: int = 0
    rows: int = 0
    tokens: int = 0
    # What was taken since the last read, on a device: an int64 tensor of shape (3,), in the order of TAKEN.
    _on_device: Tensor | None = None
    # What would have been taken since then if nothing was skipped.
    _at_most: list[int] = field(default_factory=lambda: [0, 0, 0])

    def draw(self, micro_batches: int) -> None:
        """A window of so many micro-batches was drawn whole and ends now, in a step or in a skip."""
        self.micro_batches += micro_batches
        self.windows += 1

    def take(self, rows: int, tokens: int) -> None:
        """The window became a step."""
        self.steps += 1
        self.rows += rows
        self.tokens += tokens

    def take_if(self, taken: Tensor, rows: int, tokens: int) -> None:
        """The window became a step where `taken` (a 0-dim tensor on a device) is 1, a skip where it is 0."""
        counts = torch.tensor((1, rows, tokens), dtype=torch.int64).to(taken.device, non_blocking=True)
        counts.mul_(taken.to(torch.int64))
        self._on_device = counts if self._on_device is None else self._on_device.add_(counts)
        for index, count in enumerate((1, rows, tokens)):
            self._at_most[index] += count

    def taken_on(self, clock: str, device: torch.device) -> Tensor:
        """One of the clocks of TAKEN as a 0-dim float64 tensor on the device, without a read."""
        count = torch.full((), getattr(self, clock), dtype=torch.float64, device=device)
        return count if self._on_device is None else count + self._on_device[TAKEN.index(clock)]

    def most(self, clock: str) -> int:
        """The largest value that the clock can have, known without a device read."""
        count: int = getattr(self, clock)
        return count + (self._at_most[TAKEN.index(clock)] if clock in TAKEN else 0)

    def may_reach(self, clock: str, count: int) -> bool:
        """Whether a clock may stand at `count` or beyond, without a device read."""
        now: int = getattr(self, clock) if self._on_device is None else self.most(clock)
        return now >= count

    def has_reached(self, clock: str, count: int) -> bool:
        """Whether a clock stands at `count` or beyond. Reads the device only where it could."""
        now: int = getattr(self, clock)
        if self._on_device is not None and self.most(clock) >= count:
            now = getattr(self.read(), clock)
        return now >= count

    def read(self) -> "Clocks":
        """Bring what is on the device to the host; the one place that waits for it."""
        if self._on_device is not None:
            for name, count in zip(TAKEN, self._on_device.tolist(), strict=True):
                setattr(self, name, getattr(self, name) + count)
            self._on_device = None
            self._at_most = [0, 0, 0]
        return self

    def as_dict(self) -> dict[str, int]:
        """All counts, read."""
        self.read()
        return {name: getattr(self, name) for name in (*DRAWN, *TAKEN)}

    def snapshot(self) -> Callable[[], dict[str, int]]:
        """The counts as they are now, to be read later."""
        host = (self.micro_batches, self.windows, self.epochs, self.steps, self.rows, self.tokens)
        device = None if self._on_device is None else self._on_device.clone()

        def read() -> dict[str, int]:
            counts = dict(zip((*DRAWN, *TAKEN), host, strict=True))
            for name, count in zip(TAKEN, () if device is None else device.tolist(), strict=device is not None):
                counts[name] += count
            return counts

        return read

    def state_dict(self) -> dict[str, int]:
        return self.as_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._on_device = None
        self._at_most = [0, 0, 0]
        for name in (*DRAWN, *TAKEN):
            setattr(self, name, int(state[name]))
