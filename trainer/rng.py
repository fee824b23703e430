"""The state of every generator that training draws from: torch, each device, python and numpy."""

import array
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from trainer.errors import CheckpointError


def seed_all(seed: int) -> None:
    """Seed torch (all devices), python and, where it is loaded, numpy."""
    torch.manual_seed(seed)
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % (1 << 32))


def capture() -> dict[str, Any]:
    """All states, as tensors and numbers."""
    version, words, gauss = random.getstate()
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": {"version": version, "words": _tensor(words), "gauss": gauss},
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    if torch.backends.mps.is_available():
        state["mps"] = torch.mps.get_rng_state()
    if "numpy" in sys.modules:
        name, keys, position, has_gauss, cached = sys.modules["numpy"].random.get_state()
        state["numpy"] = {
            "name": name,
            "words": _tensor(keys.tolist()),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "gauss": float(cached),
        }
    return state


def moved(state: Mapping[str, Any]) -> bool:
    """Whether python's or numpy's own generator is no longer in this state."""
    now = capture()
    return any(
        not torch.equal(now[name]["words"], state[name]["words"])
        or now[name] != {**state[name], "words": now[name]["words"]}
        for name in ("python", "numpy")
        if name in state and name in now
    )


def drawing() -> Callable[[], bool]:
    """Answers, when it is called later, whether any generator was drawn from since now."""
    held = [(get, get()) for get, _ in _generators().values()]
    return lambda: not all(_same(get(), state) for get, state in held)


def restore(state: Mapping[str, Any]) -> None:
    """Put all states back; those of devices that are not here are left out. Raises CheckpointError for what is none."""
    try:
        torch.set_rng_state(state["torch"])
        python = state["python"]
        random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
        if "cuda" in state and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(list(state["cuda"])[: torch.cuda.device_count()])
        if "mps" in state and torch.backends.mps.is_available():
            torch.mps.set_rng_state(state["mps"])
        if "numpy" in state:
            import numpy

            saved = state["numpy"]
            words = saved["words"].numpy().astype("uint32")
            numpy.random.set_state((saved["name"], words, saved["position"], saved["has_gauss"], saved["gauss"]))
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"the saved state of the random generators is none ({error}): it is damaged.") from None


@contextmanager
def preserved() -> Iterator[None]:
    """What is drawn inside leaves no trace: afterwards every generator is as it was."""
    held = [(put_back, get()) for get, put_back in _generators().values()]
    try:
        yield
    finally:
        for put_back, state in held:
            put_back(state)


class Rewind:
    """Takes back what a window drew that was given up, so that it draws the same when it comes again.

    To hold all states costs more than a small window. So only those generators are held that windows draw from, which
    `look`, called every so often, finds out by comparing; until its first look that is all of them.
    """

    def __init__(self) -> None:
        self._generators = _generators()
        self._drawn_from = list(self._generators)
        self._looked = {name: get() for name, (get, _) in self._generators.items()}
        self._held: dict[str, Any] = {}
        self._drawn: dict[str, Any] = {}
        self._calls, self._next = 0, 1

    def mark(self) -> None:
        """A window begins."""
        if self._drawn_from:
            self._held = self._drawn = {name: self._generators[name][0]() for name in self._drawn_from}

    def drawn(self) -> None:
        """Its data is drawn and its first forward comes: what drawing may have moved is held once more."""
        if self._drawn_from:
            self._drawn = {name: self._generators[name][0]() for name in self._drawn_from}

    def before_forward(self) -> tuple[dict[str, Any], list[str]]:
        """All states (as `capture` has them) as they were before the window's first forward, and the names of those
        that nobody can tell any more: generators that were drawn from for the first time since the last look."""
        with preserved():
            unknown = []
            for name, (get, put_back) in self._generators.items():
                if name in self._drawn:
                    put_back(self._drawn[name])
                elif not _same(get(), self._looked[name]):
                    unknown.append(name)
            return capture(), unknown

    def look(self) -> None:
        """Find out which generators were drawn from since the last look: at the 1st, 2nd, 4th, 8th, … call."""
        self._calls += 1
        if self._calls < self._next:
            return
        self._next *= 2
        now = {name: get() for name, (get, _) in self._generators.items()}
        self._drawn_from = [name for name, state in now.items() if not _same(state, self._looked[name])]
        self._held = {name: state for name, state in self._held.items() if name in self._drawn_from}
        self._drawn = {name: state for name, state in self._drawn.items() if name in self._drawn_from}
        self._looked = now

    def back(self) -> None:
        """Back to the last mark."""
        for name, state in self._held.items():
            self._generators[name][1](state)


def _generators() -> dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]]:
    """How each generator's state is read and put back, in whatever form is the cheapest."""
    found: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
        "torch": (torch.get_rng_state, torch.set_rng_state),
        "python": (random.getstate, random.setstate),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        found["cuda"] = (torch.cuda.get_rng_state_all, torch.cuda.set_rng_state_all)
    if torch.backends.mps.is_available():
        found["mps"] = (torch.mps.get_rng_state, torch.mps.set_rng_state)
    if "numpy" in sys.modules:
        found["numpy"] = (_numpy_state, sys.modules["numpy"].random.set_state)
    return found


def _numpy_state() -> Any:
    name, keys, position, has_gauss, cached = sys.modules["numpy"].random.get_state()
    return name, memoryview(keys), position, has_gauss, cached  # unlike arrays, views compare as a whole


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor):
        return torch.equal(left, right)
    if isinstance(left, list):  # of each device
        return all(torch.equal(one, other) for one, other in zip(left, right, strict=True))
    return bool(left == right)


def _tensor(words: Any) -> Tensor:
    # Through a buffer: torch.tensor reads a Python sequence number by number.
    return torch.frombuffer(array.array("q", words), dtype=torch.int64)
