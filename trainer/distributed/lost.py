"""What is said when another rank is gone: which one, as far as the ranks that are left can tell, and its last words."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from trainer.errors import LostRankError

# How long the ranks that are left wait for one another's answer.
_ROLL_CALL = 1.0
_ALIVE, _LAST_WORDS = "trainer/alive/{}", "trainer/last_words/{}"


def last_words(rank: int, words: str) -> None:
    """A rank that ends by an error says why, where the others will look for it."""
    store = find_store()
    if store is not None:
        try:
            store.set(_LAST_WORDS.format(rank), words)
        except RuntimeError:
            return  # whoever held the store is gone as well


def lost(error: RuntimeError, rank: int, world_size: int) -> LostRankError:
    """The sentence for a sum over ranks that failed, and the ranks that did not answer since."""
    late = "timed out" in str(error).lower()
    with _not_ended_meanwhile():
        silent, words = _roll_call(rank, world_size)
    if words:
        first = min(words)
        return LostRankError(f"rank {first} ended by an error, so the others end too: {words[first]}")
    who = "another rank" if not silent else f"rank {silent[0]}" if len(silent) == 1 else f"ranks {_listed(silent)}"
    verb = "are" if len(silent) > 1 else "is"
    what = "did not answer in time (ranks.timeout)" if late else f"{verb} gone (the connection was lost)"
    return LostRankError(
        f"{who} {what}, so the others end too: look at what it said last, and go on from the last checkpoint."
    )


def _listed(ranks: list[int]) -> str:
    return ", ".join(str(rank) for rank in ranks)


def _roll_call(rank: int, world_size: int) -> tuple[list[int], dict[int, str]]:
    """(ranks that do not answer, the last words of those that left some)."""
    store = find_store()
    if store is None:
        return [], {}
    others = [other for other in range(world_size) if other != rank]
    end = time.monotonic() + _ROLL_CALL
    try:
        store.set(_ALIVE.format(rank), "1")
        silent = others
        while silent and time.monotonic() < end:
            silent = [other for other in silent if not store.check([_ALIVE.format(other)])]
            if any(store.check([_LAST_WORDS.format(other)]) for other in silent):
                break
            time.sleep(0.02)
        left = [other for other in others if store.check([_LAST_WORDS.format(other)])]
        return silent, {other: store.get(_LAST_WORDS.format(other)).decode() for other in left}
    except RuntimeError:
        return [], {}  # rank 0 holds the store, and is gone with it


def find_store() -> Any:
    """The store that the default group was made with (private, torch 2.13); None where there is none any more."""
    find = getattr(dist.distributed_c10d, "_get_default_store", None)
    try:
        return None if find is None else find()
    except (RuntimeError, ValueError):
        return None


@contextmanager
def _not_ended_meanwhile() -> Iterator[None]:
    """torchrun ends the ranks that are left as soon as it sees one gone; what they have to say comes first."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)
