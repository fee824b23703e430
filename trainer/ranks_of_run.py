"""What a run does with its other ranks, beside its steps: it sees to it that they are alike, stops with them, and saves
what each of them has of its own. With one process none of it is there."""

import dataclasses
import secrets
from collections.abc import Callable, Mapping
from typing import Any

from trainer import rng
from trainer.data.order import mixed
from trainer.distributed.alike import first_difference, first_unlike
from trainer.distributed.call import Call
from trainer.distributed.ranks import Ranks
from trainer.due import Due
from trainer.errors import ConfigError, DivergedError, Paused
from trainer.limits import Limits
from trainer.settings import Settings
from trainer.signals import STOP, Signals
from trainer.step import Step

# What a rank may ask of all; the largest is done.
_SAVE, _TIME, _INTERRUPT, _TERMINATE = 1, 2, 3, 4
_CODES = {"SIGUSR1": _SAVE, "SIGINT": _INTERRUPT, "SIGTERM": _TERMINATE}


class RanksOfRun:
    """The ranks of one run. What is called here is called by all of them.

    Args:
        signals: those that a rank gets wait until all ranks know of them.
        limits: the time is over for all when it is for one.
    """

    def __init__(self, step: Step, settings: Settings, signals: Signals, limits: Limits) -> None:
        self.ranks: Ranks = step.ranks
        self._step = step
        self._settings = settings
        self._signals = signals
        self._limits = limits
        self._compare = Due(settings.ranks.compare_every, settings.ranks.compare_clock)
        self._call = Call()
        if step.reducer is not None:
            signals.wait_for_others = limits.wait_for_others = True
            step.reducer.ask = self._asked

    def __bool__(self) -> bool:
        return self.ranks.world_size > 1

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that logs and writes."""
        return self.ranks.rank == 0

    def start(self, config: Mapping[str, Any], order_seed: int) -> int:
        """Compare settings, config, optimizers and parameters. Raises ConfigError, on every rank, for a difference.

        Returns the first rank's seed of the order.
        """
        if not self:
            return order_seed
        values = _flat(dataclasses.asdict(self._settings), "") | _flat(config, "")
        for number, optimizer in enumerate(self._step.optimizers):
            for place, group in enumerate(optimizer.param_groups):
                options = {key: value for key, value in group.items() if key != "params"}
                values |= _flat(options, f"optimizer {number}, group {place}")
        named = self._step.parameters.by_name
        shapes = {name: (tuple(p.shape), str(p.dtype), p.requires_grad) for name, p in named.items()}
        unlike = first_unlike(self.ranks, values | {f"the parameter '{name}'": shapes[name] for name in shapes})
        if unlike is not None:
            told = ", ".join(f"{value!r} on rank {rank}" for rank, value in enumerate(unlike[1]))
            raise ConfigError(f"the ranks are not alike: {unlike[0]} is {told}. Start all of them with the same words.")
        found = first_difference(self.ranks, named)
        if found is not None:
            raise ConfigError(
                f"the ranks begin with different parameters: '{found[0]}' on rank {_listed(found[1])} is not what it "
                "is on the others. Make the model the same everywhere: set seed, or load one file into all (init=)."
            )
        self._compare.start(self._step.clocks)
        seed, name = self.ranks.gather((order_seed, secrets.token_hex(8)))[0]
        self._call = Call(name)
        return int(seed)

    def compare(self) -> None:
        """Raises DivergedError, on every rank, where a parameter is not the same on all."""
        found = first_difference(self.ranks, self._step.parameters.by_name)
        if found is not None:
            raise DivergedError(
                f"the ranks have drifted apart: the parameter '{found[0]}' of rank {_listed(found[1])} is not what it "
                f"is on the others, at step {self._step.clocks.as_dict()['steps']}. Go on from the last checkpoint, "
                "and look for what one rank does otherwise: a change by hand, other library versions, a faulty device."
            )

    def tick(self) -> None:
        """After every window: what any rank asked for is known to all now."""
        self._hear(self._step.reducer.asked if self._step.reducer is not None else [])
        if self._compare(self._step.clocks):
            self.compare()

    # A stop inside a window or an evaluation. Each rank stops where it is: only sums over ranks make them wait for one
    # another, and nothing was summed yet of what is open.

    def between(self) -> None:
        """Between two micro-batches of a window. Raises Paused, on every rank in the same window, to stop."""
        if self._is_to_stop() and self._step.reducer is not None:
            self._step.reducer.leave_open()

    def look(self) -> None:
        """Between two micro-batches of an evaluation. Raises Paused on this rank; the others hear of it at its end."""
        if self._is_to_stop():
            raise Paused

    def agree(self) -> None:
        """Every rank was paused: what was asked for is known to all now."""
        if self and not self._signals.asked:
            reducer = self._step.reducer if self._step.is_open else None
            self._hear(self.ranks.gather(self._asked()) if reducer is None else reducer.asked)

    def _is_to_stop(self) -> bool:
        if self._signals.noted in STOP:
            self._call.call()
            return True
        return self._call.is_heard()

    def _hear(self, codes: list[int]) -> None:
        code = max(codes, default=0)
        if code == _TIME:
            self._limits.is_over = True
        elif code:
            self._signals.asked = next(name for name, one in _CODES.items() if one == code)

    def _asked(self) -> int:
        """What this rank has to ask, told with the window's sums."""
        code = _CODES.get(self._signals.noted or "", 0)
        if code == _SAVE:
            self._signals.noted = None
        return max(code, _TIME if self._limits.time_is_over() else 0)

    @property
    def ticks(self) -> list[Callable[[], None]]:
        return [self.tick] if self else []

    def seed(self, seed: int) -> None:
        """Seed the generators: the first rank as one process would, the others each in a way of its own."""
        rng.seed_all(seed if self.is_first else mixed(seed, self.ranks.rank))

    # What goes into a checkpoint, as a part of the run's state.

    def state_dict(self) -> dict[str, Any]:
        """The names of the terms that the ranks have agreed on. Called before each save, where parameters that differ
        must not be saved.

        Raises DivergedError as `compare` does.
        """
        if self._step.reducer is None:
            return {}
        self.compare()
        return {"terms": list(self._step.reducer.names)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """What each rank has of its own is put back with the rest (`trainer.checkpoint.of_ranks`)."""
        if self._step.reducer is not None and "terms" in state:
            self._step.reducer.names = list(state["terms"])


def _flat(tree: Any, where: str) -> dict[str, Any]:
    """Leaves by their keys joined with dots."""
    if not isinstance(tree, Mapping):
        return {where: tree}
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= _flat(value, f"{where}.{key}" if where else str(key))
    return found


def _listed(ranks: list[int]) -> str:
    return ", ".join(str(rank) for rank in ranks)
