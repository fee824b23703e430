"""The learning rates: set before a step is taken, by a schedule that follows what was taken."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from trainer.errors import CheckpointError, ConfigError
from trainer.gradient.clocks import Clocks
from trainer.gradient.report import Number


class Rates:
    """Schedule and optimizers together.

    Args:
        schedule: None; a `trainer.optim.Schedule` or any callable from the count of steps to a factor; or a torch
            LRScheduler, which then ticks once for every step that was taken.
    """

    def __init__(self, schedule: Any, optimizers: Sequence[Optimizer]) -> None:
        self._optimizers = optimizers
        self._torch: LRScheduler | None = None
        self._schedule: Any = None
        if isinstance(schedule, ReduceLROnPlateau):
            raise ConfigError("ReduceLROnPlateau follows a metric, not a clock: use a schedule of trainer.optim.")
        if isinstance(schedule, LRScheduler):
            if not any(schedule.optimizer is one for one in optimizers):
                raise ConfigError(
                    f"the {type(schedule).__name__} was made for another optimizer: make it for one that the step has."
                )
            self._torch = schedule
        elif schedule is not None and not callable(schedule):
            raise ConfigError(f"the schedule {schedule!r} cannot be called with a count: give a function of the clock.")
        else:
            self._schedule = schedule
        self.clock: str = getattr(schedule, "clock", "steps")
        self.defers = self._torch is None
        """Whether a step can be taken without the host knowing it: a torch LRScheduler has to be told."""
        if self._schedule is not None:
            for group in self._groups():
                if "lr" not in group:
                    raise ConfigError("the optimizer's groups hold no lr for a schedule to follow: set schedule=null.")
                # A resumed optimizer brings its own, which is not the rate that it was stopped at.
                group.setdefault("initial_lr", group["lr"])

    def set(self, clocks: Clocks) -> Number:
        """Set every group's rate for the step that is about to be taken; returns the first group's."""
        if self._schedule is not None:
            factor = self._schedule(getattr(clocks.read(), self.clock))
            rates = [float(group.setdefault("initial_lr", group["lr"]) * factor) for group in self._groups()]
            for rate in rates:
                if not math.isfinite(rate):
                    raise ConfigError(f"the schedule {self._schedule!r} gives the learning rate {rate}.")
            for group, rate in zip(self._groups(), rates, strict=True):
                group["lr"] = rate
        else:
            self._check()
        return self.now()

    def set_on(self, clocks: Clocks, device: torch.device) -> Number:
        """The same without a read of the clocks: the rates become 0-dim tensors on the device."""
        if self._schedule is not None:
            factor = self._schedule(clocks.taken_on(self.clock, device))
            if not isinstance(factor, Tensor):
                factor = torch.full((), factor, dtype=torch.float64, device=device)  # filled, as a copy would wait
            for group in self._groups():
                group["lr"] = (factor * group.setdefault("initial_lr", group["lr"])).to(torch.float32)
        else:
            self._check()
        return self.now()

    def _check(self) -> None:
        for group in self._groups():
            rate = group.get("lr", 0.0)
            known = not isinstance(rate, Tensor) or rate.device.type == "cpu"
            if known and not math.isfinite(rate):
                raise ConfigError(f"the optimizer's learning rate is {rate}: the step is not taken.")

    def now(self) -> Number:
        """The first group's rate as it stands."""
        rate: Number = self._groups()[0].get("lr", 0.0)
        return rate

    def taken(self) -> None:
        """A step was taken."""
        if self._torch is not None:
            self._torch.step()

    def state_dict(self) -> dict[str, Any]:
        """What a scheduler of torch holds; everything else is in the clocks."""
        return {} if self._torch is None else {"scheduler": self._kind(), "state": _plain(self._torch.state_dict())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises CheckpointError where the state is that of another scheduler."""
        saved = state.get("scheduler")
        if saved != self._kind():
            raise CheckpointError(
                f"the checkpoint was saved with {saved or 'no scheduler of torch'}, and this run's schedule is "
                f"{self._kind() or 'no scheduler of torch'}: give the schedule that it was saved with."
            )
        if self._torch is not None:
            self._torch.load_state_dict(dict(state["state"]))

    def check_accepted(self) -> None:
        """After a resume with rates that were changed meanwhile. Raises ConfigError where a scheduler of torch, whose
        state holds the old ones, would go on with those."""
        if self._torch is None:
            return
        rates = [group.get("initial_lr") for group in self._torch.optimizer.param_groups]
        if rates != list(self._torch.base_lrs):
            raise ConfigError(
                f"the learning rate was changed to {rates[0]:g}, but {self._kind()} goes on with the "
                f"{self._torch.base_lrs[0]:g} that it was saved with: use a schedule of trainer.optim, which follows "
                "the new one, or set it back."
            )

    def _kind(self) -> str | None:
        return None if self._torch is None else type(self._torch).__name__

    def _groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self._optimizers for group in optimizer.param_groups]


def _plain(state: Mapping[str, Any]) -> dict[str, Any]:
    """A scheduler's state without what is no number: functions stay with the code."""
    kept = (bool, int, float, str, list, dict, type(None))
    return {name: value for name, value in state.items() if isinstance(value, kept) and not callable(value)}
