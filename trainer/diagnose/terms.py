"""The gradient of each named term of an objective: how large it is, and which terms pull against each other."""

import weakref
from typing import Any

import torch
from torch import Tensor

from trainer import rng
from trainer.diagnose.compared import Comparing, compare
from trainer.errors import ConfigError
from trainer.gradient.objective import MEAN, Supervised, Term, who
from trainer.gradient.open_window import OpenWindow
from trainer.gradient.weights import host_number


class TermGradients(Comparing):
    """Measures every so many windows; hangs itself into the step.

    It costs, in a window that is measured, a backward for each term (and, under activation checkpointing, a recompute
    with it), and the memory of one gradient for each. They end nowhere: the window's own backward comes afterwards, as
    if nothing had been. With several ranks each looks at its own rows.

    Args:
        step: whose objective's terms are looked at.
        every: one of so many windows is measured, and the first.

    Attributes:
        latest: what was measured last: each term's true gradient over the window, as it goes into the sum (divided by
            its own Σ weight, with its coefficient).

    Raises ConfigError for an objective without named terms: at once where that can be told, else in the first window.
    """

    tags = ("terms/",)

    def __init__(self, step: Any, every: int) -> None:
        if isinstance(step.objective, Supervised):
            raise _nameless(step.objective)
        super().__init__(
            step,
            every,
            "terms",
            "diagnose.term_gradients",
            "what a step gains on one it loses on the other. Near a minimum of their sum that is how it must be; well "
            "before it, weigh them anew (gradient.coefficients)",
        )
        self._clocks = step.clocks
        self._window: weakref.ref[OpenWindow] | None = None
        self._held: dict[str, list[Tensor | None]] = {}
        self._failed: str | None = None
        step.before_backward.append(self._before)
        step.after_backward.append(self._after)

    def _before(self, window: OpenWindow, term: Term, seed: Tensor) -> None:
        """A term's backward is about to run: run it once by itself, into a list of our own."""
        count = self._clocks.windows
        if (count and (count + 1) % self._every) or self._failed is not None:
            return
        if not window.micro_batches and window.drawn is not None and self._of(window) is None:
            self._window, self._held = weakref.ref(window), {}
        if self._of(window) is None:
            return  # the window was joined in its middle
        wanted = [one for one in self._step.parameters.by_name.values() if one.requires_grad]
        try:
            with rng.preserved():  # a recompute, or somebody's own backward, may draw
                found = torch.autograd.grad(term.value, wanted, seed, retain_graph=True, allow_unused=True)
        except RuntimeError as error:
            self._give_up(f"a term's backward cannot run twice here ({_first_line(error)})")
            return
        wide: list[Tensor | None] = [one if one is None or one.dtype.itemsize > 2 else one.float() for one in found]
        held = self._held.get(term.name)
        if held is not None:
            wide = [_sum(*pair) for pair in zip(held, wide, strict=True)]
        self._held[term.name] = wide

    def _after(self, window: OpenWindow, roots: list[Tensor]) -> None:
        if self._window is None or self._of(window) is None:
            return
        if list(window.terms) == [MEAN]:
            raise _nameless(self._step.objective)
        if window.drawn is None or window.micro_batches < len(window.drawn):
            return
        self._window = None
        if not self._held:
            return  # it weighs nothing
        if (name := self._out_of_reach()) is not None:
            self._give_up(f"'{name}' gets its gradient beside the graph, as under a reentrant checkpoint")
            return
        scale = float(host_number(window.loss_scale))
        left = {name: float(host_number(window.leftover_of(window.terms[name]))) for name in self._held}
        self.latest = compare(self._held, {name: 1.0 / (one * scale) for name, one in left.items()})
        self._held, self._window = {}, None
        if self.latest.is_finite:
            self._sentences += self._conflicts.look(self.latest)
        else:
            self.latest = None

    def _of(self, window: OpenWindow) -> OpenWindow | None:
        """The window, where it is the one that is measured."""
        return window if self._window is not None and self._window() is window else None

    def _out_of_reach(self) -> str | None:
        """A parameter that the window's backward reached and no term's did."""
        by_name: dict[str, Tensor] = self._step.parameters.by_name
        wanted = [(name, parameter) for name, parameter in by_name.items() if parameter.requires_grad]
        for index, (name, parameter) in enumerate(wanted):
            gradient = parameter.grad
            if (
                gradient is not None
                and all(held[index] is None for held in self._held.values())
                and bool(gradient.count_nonzero())
            ):
                return name
        return None

    def _give_up(self, why: str) -> None:
        """What cannot be walked twice is not measured; if it cannot be walked once, the step says so itself."""
        self._failed = why
        self._held, self._window = {}, None
        self._sentences.append(f"diagnose.term_gradients measures no more: {why}.")


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return other if one is None else one if other is None else one + other


def _first_line(error: RuntimeError) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _nameless(objective: Any) -> ConfigError:
    return ConfigError(
        f"diagnose.term_gradients compares the named terms of an objective, and {who(objective)} names none: return "
        '{"name": loss, "other": loss} from it, or set diagnose.term_gradients=null.'
    )
