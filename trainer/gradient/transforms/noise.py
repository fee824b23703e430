"""Gaussian noise on the gradient: Neelakantan et al. 2015, "Adding Gradient Noise Improves Learning for Very Deep
Networks", who let its variance fall as η / (1 + t)^0.55."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trainer.errors import ConfigError, GradientError
from trainer.gradient.report import Report
from trainer.gradient.transforms.clips import above_zero
from trainer.gradient.transforms.patterns import Patterns


class Noise:
    """Adds N(0, std²) to every element (of a complex one: to both parts).

    The draws come from a generator of its own for each device, seeded alike on every rank, and their state is saved:
    the global generators are left alone, and a run that goes on draws what it would have drawn.
    """

    def __init__(
        self, std: float, schedule: Callable[[int], float] | None, seed: int, match: str | Sequence[str] | None
    ) -> None:
        if schedule is not None and not callable(schedule):
            raise ConfigError(f"noise: the schedule {schedule!r} cannot be called with a count.")
        self._std, self._seed = above_zero("noise", "std", std), int(seed)
        self._schedule = schedule
        self._clock: str = getattr(schedule, "clock", "steps")
        self._match = Patterns("noise", match)
        self._generators: dict[str, torch.Generator] = {}

    def bind(self, parameters: Mapping[str, Tensor]) -> None:
        self._match.find(parameters)

    def std(self, report: Report) -> float:
        """The standard deviation in this step."""
        if self._schedule is None:
            return self._std
        return self._std * float(self._schedule(report.clocks[self._clock]))

    def __call__(self, gradients: dict[str, Tensor], report: Report) -> None:
        std = self.std(report)
        for name, gradient in gradients.items():
            if name not in self._match:
                continue
            if gradient.layout is not torch.strided:
                raise GradientError(
                    f"noise: the gradient of '{name}' is sparse, and noise would be on all of it: leave it out with "
                    "match, or make it dense."
                )
            values = torch.view_as_real(gradient) if gradient.is_complex() else gradient
            wide = torch.promote_types(values.dtype, torch.float32)
            draw = torch.randn(values.shape, generator=self._generator(values.device), device=values.device, dtype=wide)
            values.add_(draw.mul_(std))

    def _generator(self, device: torch.device) -> torch.Generator:
        key = str(device)
        if key not in self._generators:
            self._generators[key] = torch.Generator(device).manual_seed(self._seed)
        return self._generators[key]

    def state_dict(self) -> dict[str, Any]:
        return {key: generator.get_state() for key, generator in self._generators.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._generators = {}
        for key, saved in state.items():
            self._generator(torch.device(key)).set_state(saved.cpu())


def noise(
    std: float,
    schedule: Callable[[int], float] | None = None,
    seed: int = 0,
    match: str | Sequence[str] | None = None,
) -> Noise:
    """Gaussian noise on the gradient.

    Args:
        std: its standard deviation, on the scale of the gradient.
        schedule: a factor of it by count, as those of learning rates; its `clock` is followed (steps by default).
        seed: of its generator.
        match: names of parameters with wildcards; all by default.
    """
    return Noise(std, schedule, seed, match)
