"""A word that one rank leaves for the others, who look for it now and then: no sum over ranks, no wait.

It lies in the store that the process group was made with. To look costs one question to it, so it is asked at most once
a second; a run in which nobody calls pays the reading of a clock.
"""

import time

from trainer.distributed.lost import find_store

_EVERY = 1.0
_CALLED = "trainer/called/{}"


class Call:
    """Args:
    name: of this call, the same on every rank; without one nobody calls and nobody hears.
    """

    def __init__(self, name: str | None = None) -> None:
        self._key = None if name is None else _CALLED.format(name)
        self._next = 0.0

    def call(self) -> None:
        store = find_store() if self._key is not None else None
        if store is not None:
            try:
                store.set(self._key, "1")
            except RuntimeError:
                return  # whoever held the store is gone: the next sum over ranks says so

    def is_heard(self) -> bool:
        now = time.monotonic()
        if self._key is None or now < self._next:
            return False
        self._next = now + _EVERY
        store = find_store()
        try:
            return store is not None and bool(store.check([self._key]))
        except RuntimeError:
            return False
