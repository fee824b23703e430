"""The gradient of each source of the data: how large it is, and which sources pull against each other."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from trainer import rng
from trainer.data.rows import rows_at
from trainer.diagnose.compared import Comparing, compare
from trainer.errors import ConfigError
from trainer.gradient.objective import terms_of
from trainer.gradient.open_window import OpenWindow
from trainer.gradient.report import Number
from trainer.gradient.skips import KeptBuffers
from trainer.gradient.weights import host_number

KEY = "source"
"""Where a micro-batch that is a mapping names its source."""
MOST = 16
"""More sources in one window have too many pairs to look at."""

NameSources = Callable[[Any], Any]
"""The source of a micro-batch: a name or a number for all its rows, or a sequence (a tensor, a list) for each."""


class SourceGradients(Comparing):
    """Measures every so many windows, when their last backward is done; hangs itself into the step.

    It costs, in a window that is measured, another forward and backward of its rows, source by source, and the memory
    of one gradient for each source. What forward draws, the buffers that it changes and `.grad` are afterwards as they
    were; what a model or an objective counts in attributes of its own is not. With several ranks each looks at its
    own rows.

    Args:
        step: whose window's rows are looked at.
        every: one of so many windows is measured, and the first.
        sources: tells a micro-batch's sources; None: its entry `source`.

    Attributes:
        latest: what was measured last: the gradient that a window of each source's rows alone would have.

    Raises ConfigError, in the first window, where a micro-batch names no source or too many.
    """

    tags = ("sources/",)

    def __init__(self, step: Any, every: int, sources: NameSources | None = None) -> None:
        super().__init__(
            step,
            every,
            "sources",
            "diagnose.source_gradients",
            "what a step gains on one it loses on the other. Near a minimum of their sum that is how it must be; well "
            "before it, mix them otherwise, or tell the model which one it sees",
        )
        self._sources = sources
        self._has_failed = False
        step.after_backward.append(self)

    def __call__(self, window: OpenWindow, roots: list[Tensor]) -> None:
        count, drawn = self._step.clocks.windows, window.drawn
        if (count and (count + 1) % self._every) or drawn is None or window.micro_batches < len(drawn):
            return
        by_source: dict[str, list[Any]] = {}
        for micro_batch in drawn:
            for name, part in self._parts(micro_batch):
                by_source.setdefault(name, []).append(part)
        if len(by_source) > MOST:
            raise ConfigError(
                f"diagnose.source_gradients was told {len(by_source)} sources in one window, and compares at most "
                f"{MOST}: name groups of them."
            )
        buffers = KeptBuffers(self._step.model)
        buffers.keep()
        try:
            with rng.preserved(), torch.enable_grad():
                found = {name: self._gradient(parts, window.loss_scale) for name, parts in by_source.items()}
        except Exception as error:  # of the user's model, on fewer rows than it is used to
            self._fail(error)
            return
        finally:
            buffers.put_back()
        measured = {name: one for name, one in found.items() if any(part is not None for part in one)}
        latest = compare(measured, dict.fromkeys(measured, 1.0))
        if latest.is_finite:
            self.latest = latest
            self._sentences += self._conflicts.look(latest)

    def _parts(self, micro_batch: Any) -> Iterator[tuple[str, Any]]:
        """A micro-batch's rows, source by source."""
        if self._sources is not None:
            told = self._sources(micro_batch)
        elif isinstance(micro_batch, Mapping) and KEY in micro_batch:
            told = micro_batch[KEY]
        else:
            raise ConfigError(
                f"diagnose.source_gradients needs to know where rows come from, and a {type(micro_batch).__name__} "
                f"does not say: draw micro-batches that are mappings with the key '{KEY}' (one for each row "
                "or one for all), give Trainer sources=, or set it to null."
            )
        told = told.tolist() if isinstance(told, Tensor) else told
        if isinstance(told, str | int):
            yield str(told), micro_batch
            return
        rows = self._step.weigher.rows(micro_batch)
        names = [str(one) for one in told]
        if len(names) != rows:
            raise ConfigError(
                f"diagnose.source_gradients was told {len(names)} sources for a micro-batch of {rows} rows: name one "
                "for each row, or one for all."
            )
        for name in dict.fromkeys(names):
            own = [row for row, other in enumerate(names) if other == name]
            yield name, micro_batch if len(own) == rows else rows_at(micro_batch, own, rows)

    def _gradient(self, parts: list[Any], loss_scale: Number) -> list[Tensor | None]:
        """As a step computes it, with these rows for a window; into a list of our own."""
        step = self._step
        wanted = [one for one in step.parameters.by_name.values() if one.requires_grad]
        window = OpenWindow(step.settings, step.weigher, parts, {}, loss_scale)
        held: dict[str | None, list[Tensor | None]] = {}
        for part in parts:
            window.enter()
            terms = terms_of(step._forward(part), step.objective)
            roots: dict[str | None, list[tuple[Tensor, Tensor]]] = {}
            for term in terms:
                seed = window.seed(term, part, alone=len(terms) == 1)
                if seed is not None and term.value.requires_grad:
                    own = None if window.terms[term.name].apart is None else term.name
                    roots.setdefault(own, []).append((term.value, seed))
            for name, pairs in roots.items():
                values, seeds = zip(*pairs, strict=True)
                found = torch.autograd.grad(values, wanted, seeds, retain_graph=len(roots) > 1, allow_unused=True)
                held[name] = _added(held.get(name), found, 1.0)
            window.count(part)
        whole: list[Tensor | None] | None = None
        for name, gradient in held.items():
            left = window.leftover() if name is None else window.leftover_of(window.terms[name])
            whole = _added(whole, gradient, 1.0 / (float(host_number(left)) * float(host_number(loss_scale))))
        return whole or []

    def _fail(self, error: Exception) -> None:
        if not self._has_failed:
            self._has_failed = True
            why = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
            self._sentences.append(
                f"diagnose.source_gradients left a window out, as its rows do not run source by source: {why}."
            )


def _added(whole: list[Tensor | None] | None, more: Any, factor: float) -> list[Tensor | None]:
    """The sum with another gradient times a factor, in float32 or wider."""
    wide = [one if one is None else (one if one.dtype.itemsize > 2 else one.float()) * factor for one in more]
    if whole is None:
        return wide
    return [new if old is None else old if new is None else old + new for old, new in zip(whole, wide, strict=True)]
