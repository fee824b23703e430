"""Clipping: bounds on the true gradient of a window, applied once, after it was found finite.

By norm the whole is made smaller by one factor, which is not applied here: it joins the one number that the optimizer's
kernel divides by. By value, by unit (adaptive) or by parameter group the gradients are changed in one pass.
A parameter group with one of the three options is bounded by that alone (null: by nothing); the toggles bound the rest.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.optim import Optimizer

from trainer.errors import ConfigError
from trainer.gradient import norms
from trainer.gradient.adaptive import clip_adaptive
from trainer.gradient.narrow import of_model
from trainer.gradient.report import Number, Report
from trainer.settings import CLIPS, GradientSettings


class Bound(NamedTuple):
    """One bound and what it is on.

    - `name`: of the parameter group; "" for the toggles.
    - `how`, `largest`: which of `settings.CLIPS`, and its threshold; None where nothing bounds it.
    - `parameters`: those of the group by `id`; None: all that no group's bound is on.
    """

    name: str
    how: str | None
    largest: float
    parameters: frozenset[int] | None = None


class Measured(NamedTuple):
    """The norm of the gradients as they lie there, and of those under each bound by norm."""

    whole: Number
    parts: Sequence[Number] = ()


class Clipping:
    """The bounds of one step.

    Args:
        settings: the toggles.
        optimizers: their parameter groups may hold bounds of their own, which are read for every window.
    """

    def __init__(self, settings: GradientSettings, optimizers: Sequence[Optimizer]) -> None:
        how = next((name for name in CLIPS if getattr(settings, name) is not None), None)
        self._toggles = Bound("", how, 0.0 if how is None else getattr(settings, how))
        self._order = settings.norm_order
        self._keeps = settings.zero_grad == "never"
        self._optimizers = optimizers
        self.bounds: list[Bound] = []
        """Where groups have bounds of their own: theirs, and that of the toggles last."""
        self.by_norm = False
        """Whether something is bounded by norm, which then decides whether the step can be taken."""
        self.exactly = False
        """Whether `.grad` itself must be the true gradient."""
        self._take_up([])
        self.refresh()

    def refresh(self) -> None:
        """Look at the groups again; with every window, as a group may join or a checkpoint bring its own."""
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                if "clip_norm" in group or "clip_value" in group or "clip_adaptive" in group:
                    self._take_up(self._by_group())
                    return
        if self.bounds:
            self._take_up([])

    def _take_up(self, bounds: list[Bound]) -> None:
        self.bounds = bounds
        ways = [bound.how for bound in bounds] or [self._toggles.how]
        self.by_norm = "clip_norm" in ways
        self.exactly = "clip_value" in ways or "clip_adaptive" in ways

    def _by_group(self) -> list[Bound]:
        found = []
        groups = [group for optimizer in self._optimizers for group in optimizer.param_groups]
        for number, group in enumerate(groups):
            own = {name: group[name] for name in CLIPS if name in group}
            if own:
                chosen = {name: largest for name, largest in own.items() if largest is not None}
                name = str(number)
                _check(name, chosen)
                how = next(iter(chosen), None)
                held = frozenset(id(of_model(parameter)) for parameter in group["params"])
                found.append(Bound(name, how, float(chosen[how]) if how else 0.0, held))
        return [*found, self._toggles]

    def measure(self, gradients: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> Measured:
        """The norms that a bound or a reader wants."""
        if not (self.bounds and self.by_norm):
            return Measured(norms.norm(list(gradients.values()), self._order))
        parts = [norms.norm(list(part.values()), self._order) for part in self._parts(gradients, parameters)]
        return Measured(norms.joined(parts, self._order), parts)

    def __call__(
        self,
        gradients: Mapping[str, Tensor],
        parameters: Mapping[str, Tensor],
        factor: Number,
        measured: Measured | None,
        report: Report,
    ) -> Number:
        """Clip, and say so in the report.

        Args:
            factor: what the gradients must still be multiplied with to be the true ones.
            measured: their norms; None where nothing wants them.

        Returns what they must be multiplied with now.
        """
        if self.bounds:
            self._clip_groups(gradients, parameters, factor, measured, report)
        elif self._toggles.how is None:
            return factor
        elif self._toggles.how == "clip_norm" and measured is not None:
            report._clip_factor = norms.clip_factor(measured.whole * factor, self._toggles.largest)
            if not self._keeps:
                return factor * report._clip_factor
            norms.scale(list(gradients.values()), report._clip_factor)  # the next window adds to what was clipped
            return factor
        else:
            self._apply(self._toggles, gradients, parameters)
        if measured is not None:
            report._norm_after = norms.norm(list(gradients.values()), self._order) * factor
        return factor

    def _clip_groups(
        self,
        gradients: Mapping[str, Tensor],
        parameters: Mapping[str, Tensor],
        factor: Number,
        measured: Measured | None,
        report: Report,
    ) -> None:
        parts = self._parts(gradients, parameters)
        taken: Sequence[Number | None] = (measured.parts if measured else ()) or [None] * len(parts)
        found: dict[str, tuple[Number, Number]] = {}
        for bound, part, norm in zip(self.bounds, parts, taken, strict=True):
            if bound.how == "clip_norm" and norm is not None and part:
                whole = norm * factor
                clip_factor = norms.clip_factor(whole, bound.largest)
                found[bound.name or "others"] = (whole, clip_factor)
                norms.scale(list(part.values()), clip_factor)
            elif bound.how is not None:
                self._apply(bound, part, parameters)
        report._groups = found

    def _apply(self, bound: Bound, gradients: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
        if bound.how == "clip_value":
            norms.clip_value(list(gradients.values()), bound.largest)
        elif bound.how == "clip_adaptive":
            clip_adaptive(gradients, parameters, bound.largest)

    def _parts(self, gradients: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        """The gradients under each bound."""
        parts: list[dict[str, Tensor]] = [{} for _ in self.bounds]
        for name, gradient in gradients.items():
            key = id(parameters[name])
            place = next((i for i, b in enumerate(self.bounds) if b.parameters is not None and key in b.parameters), -1)
            parts[place][name] = gradient
        return parts


def _check(group: str, chosen: Mapping[str, Any]) -> None:
    """Raises ConfigError for a group's bound that is not possible."""
    if len(chosen) > 1:
        one, other, *_ = chosen
        raise ConfigError(
            f"parameter group {group} has {one} and {other}: choose one and leave the other out, or set it to null."
        )
    for name, largest in chosen.items():
        if isinstance(largest, bool) or not isinstance(largest, int | float) or not 0 < largest < float("inf"):
            raise ConfigError(
                f"parameter group {group}: {name}={largest!r} is not possible: give a number above 0, or null where "
                "nothing bounds the group."
            )
