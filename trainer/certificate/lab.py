"""The measurements: one window's gradient by the reference or by a path, always from the same state and draws."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from trainer import rng
from trainer.certificate import wide
from trainer.certificate.batches import cast, copied, mapped
from trainer.certificate.draws import Draws, Kind
from trainer.certificate.over_ranks import of_all
from trainer.certificate.paths import Path
from trainer.certificate.probe import Probe
from trainer.certificate.reference import Asked, Gradient, Window, gradient
from trainer.certificate.snapshot import Snapshot
from trainer.distributed.ranks import OneProcess, Ranks
from trainer.gradient.parameters import named_modules


@dataclass
class Run:
    """One measurement.

    - `buffers`: the model's buffers after it, as numbers.
    - `drawn`: operations that drew; `used`: what the model switched on itself; `narrowed`: lower types it asked for.
    - `changed`: the state that it changed, by its path and by name.
    - `drew_elsewhere`: whether it drew from generators of Python's or numpy's.
    """

    gradient: Gradient
    buffers: Gradient = field(default_factory=dict)
    window: Window | None = None
    drawn: set[str] = field(default_factory=set)
    used: set[str] = field(default_factory=set)
    narrowed: set[torch.dtype] = field(default_factory=set)
    changed: dict[str, str] = field(default_factory=dict)
    drew_elsewhere: bool = False


class Lab:
    """A model, an objective and a window, on which measurements are made; afterwards all is as it was.

    Args:
        parameters: those whose gradient is certified, by name.
        roots: what else a run may change, by name.
        ranks: other processes with windows of their own; the reference is then of all of them.
    """

    def __init__(
        self,
        model: Any,
        objective: Any,
        window: Sequence[Any],
        parameters: Mapping[str, Tensor],
        asked: Asked,
        roots: Sequence[tuple[str, Any]] = (),
        ranks: Ranks | None = None,
    ) -> None:
        self.model, self.objective, self.parameters, self.asked = model, objective, parameters, asked
        self.ranks: Ranks = ranks or OneProcess()
        self.own = list(window)
        self.window = of_all(self.ranks, self.own, next(iter(parameters.values())).device)
        self.dtype = torch.float64
        """Of the reference: float32 where float64 does not run."""
        self.clones = True
        """Whether the reference hands backward clones of what forward saved; torch.func does not run with that."""
        self._roots = [("", model), ("objective", objective), *roots]
        self.state = Snapshot(self._roots)
        self.modules = named_modules(model)
        self._rng = rng.capture()

    def reference(
        self,
        micro_batches: Sequence[Any],
        dtype: torch.dtype = torch.float64,
        draws: Kind = "equal",
        *,
        fresh: Callable[[str], bool] | None = None,
        shake: tuple[float, int] | None = None,
        keep_parts: bool = False,
        probe: Probe | None = None,
    ) -> Run:
        """The plain gradient of these micro-batches.

        Args:
            fresh: before each micro-batch, state at paths that it accepts is put back as it was.
            shake: change parameters and inputs by up to this share, with this seed.
        """
        run, used = Run({}), wide.Used()
        draw = Draws(draws)
        with self.from_the_start(), self.state.wide(dtype), wide.plainly(dtype, used, self.clones) as mode, draw:
            batches = [cast(one, dtype) for one in micro_batches]
            if shake is not None:
                self._shake(batches, *shake)
            now: Snapshot | None = None  # as it is in this type, seen with the probe in place

            def between() -> None:
                if draws == "neutral":
                    rng.restore(self._rng)  # Python and numpy draw too
                if fresh is not None and now is not None:
                    now.restore_but_gradients(fresh)
                if probe is not None:
                    probe.next()

            def again() -> None:
                if now is not None:
                    now.restore_but_gradients()
                rng.restore(self._rng)
                if probe is not None:
                    probe.forget()

            with probe.watching(self.modules) if probe is not None else nullcontext():
                now = Snapshot(self._roots)
                found = gradient(
                    self.model,
                    self.objective,
                    batches,
                    self.parameters,
                    self.asked,
                    between=between,
                    again=again,
                    keep_parts=keep_parts,
                )
                changed = now.changed()
            run = Run(found.gradient, self._buffers(), found, changed=changed)
            run.drew_elsewhere = now.drew() or rng.moved(self._rng)
        run.drawn, run.used, run.narrowed = draw.seen, used.names, mode.narrowed
        return run

    def by(
        self,
        path: Path,
        window: Sequence[Any],
        off: frozenset[str] = frozenset(),
        draws: Kind | None = None,
        probe: Probe | None = None,
    ) -> Run:
        """The gradient by a path, with some of its settings (and of what the model switches on itself) off."""
        run, used = Run({}), wide.Used()

        def look() -> None:
            # Of several ranks each has the buffers of its own rows.
            run.buffers = self._buffers() if self.ranks.world_size == 1 else {}

        if window is self.window and "ranks" not in off:
            window = self.own
        with self.from_the_start(), ExitStack() as stack:
            stack.enter_context(wide.noting_autocast(used))
            for name in sorted(off & PATCHES.keys()):
                stack.enter_context(PATCHES[name]())
            if draws is not None:
                stack.enter_context(Draws(draws))
            if probe is not None:
                stack.enter_context(probe.watching(self.modules))
            run.gradient = path([copied(one) for one in window], off, look)
        run.used = used.names
        return run

    @contextmanager
    def from_the_start(self) -> Iterator[None]:
        """Everything as it was at first, and afterwards again."""
        with rng.preserved(), self.state.kept(), torch.enable_grad():
            rng.restore(self._rng)
            yield

    def _shake(self, batches: list[Any], share: float, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)

        def change(tensor: Tensor) -> Tensor:
            if tensor.is_floating_point() and tensor.layout is torch.strided:
                noise = torch.rand(tensor.shape, generator=generator, dtype=torch.float64) * 2 - 1
                tensor.data.mul_((1 + share * noise).to(tensor.device, tensor.dtype))
            return tensor

        mapped(list(self.parameters.values()), change)
        mapped(batches, change)

    def _buffers(self) -> Gradient:
        found = {}
        for prefix, module in self.modules.items():
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.layout is torch.strided:
                    found[f"{prefix}.{name}" if prefix else name] = buffer.detach().clone()
        return found


PATCHES: dict[str, Callable[[], Any]] = {
    "checkpoint": wide.without_checkpointing,
    "hooks": wide.without_hooks,
    "autocast": wide.without_autocast,
    "half": lambda: wide.Wide(torch.float32),
    "compile": wide.without_compiling,
    "saved": wide.cloned_for_backward,
}
"""What the model itself may have switched on, by the name under which it can be switched off."""
