"""How a row of the failure programme counts: its trials, what they came to, and which of them broke the promise.

Every row is a function `trials(count, seed) -> Tally`. The fast tier (the test command) and the full one (the same
functions with more trials) differ in the count alone; TRIALS in the environment multiplies it.
"""

import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Tally:
    """Outcomes by name, and a line for each trial that broke the promise."""

    outcomes: Counter[str] = field(default_factory=Counter)
    broken: list[str] = field(default_factory=list)
    instants: Counter[str] = field(default_factory=Counter)
    """Where a trial struck, for the rows that strike at random."""
    sizes: Counter[str] = field(default_factory=Counter)
    """Bytes of each file, for the row that strikes at random bytes: its instants are files."""
    told: list[str] = field(default_factory=list)
    """What else there is to say of the row, in sentences."""

    @property
    def trials(self) -> int:
        return self.outcomes.total()

    def note(self, outcome: str, broken: str | None = None) -> None:
        self.outcomes[outcome] += 1
        if broken is not None:
            self.broken.append(broken)

    def __str__(self) -> str:
        shown = ", ".join(f"{name} {count}" for name, count in sorted(self.outcomes.items()))
        return f"{self.trials} trials: {shown}; {len(self.broken)} broken {self.broken[:3]}"


@contextmanager
def scratch() -> Iterator[Path]:
    """An empty folder, in memory where the system has such: trials wait for no real disk."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as name:
        yield Path(name)


def times(fast: int) -> int:
    """The count of the fast tier, multiplied by TRIALS."""
    return max(1, int(fast * float(os.environ.get("TRIALS", "1"))))
