"""Activation checkpointing by segments: keep what enters a segment, compute what is inside again in backward.

Segments exist only while a step's forward runs: outside of it the model is as its owner made it. Torch's
non-reentrant checkpoint does the recompute; three things that it leaves to its user are done here. Buffers that
forward changes (BatchNorm's statistics, spectral norm's vectors) are what they were while the segment is computed
again, and are changed once a micro-batch (torch issue 96136). The RNG is the same in both. A parameter that was
changed in between is refused, as saved-tensor hooks switch torch's own check off.
"""

import fnmatch
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.checkpoint import checkpoint

from trainer.activations import sentinel
from trainer.activations.again import Again, Kept
from trainer.errors import ConfigError, did_you_mean
from trainer.settings import ActivationCheckpointingSettings, validated

# A buffer of more bytes (a mask, a table of positions) is kept for backward only where forward changed it.
_SMALL = 1 << 16


class Segments:
    """A context for forward: inside it, the chosen parts of the model are checkpointed."""

    def __init__(self, model: nn.Module, cuts: Sequence["Cut"], verify: bool = False) -> None:
        self._model = model
        self.cuts = list(cuts)
        for segment in (segment for cut in self.cuts for segment in cut.segments):
            segment.verify = verify
        self._ran = False

    def __enter__(self) -> None:
        for cut in self.cuts:
            cut.install()

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        for cut in self.cuts:
            cut.remove()
        if error is None and not self._ran:
            self._ran = any(cut.ran for cut in self.cuts)
            if not self._ran:
                raise ConfigError(
                    f"activation_checkpointing: forward never called {self!r}, so nothing would be saved: name modules "
                    "that it calls in activation_checkpointing.modules (of a container whose members it calls one by "
                    f"one, its members). {_that_fit(self._model, '')}"
                )

    def __repr__(self) -> str:
        return ", ".join(repr(cut) for cut in self.cuts)


class Cut:
    """One module whose forward runs as segments: itself as one, or a Sequential as several.

    Args:
        name: the module's name in the model.
        module: the module.
        parts: for a Sequential, its modules by name in runs of consecutive ones.
    """

    def __init__(self, name: str, module: nn.Module, parts: list[list[tuple[str, nn.Module]]] | None = None) -> None:
        self.name = name
        self.module = module
        self.parts = parts
        self.ran = False
        self._own = "forward" in module.__dict__
        self._before: Any = None
        self.segments = [_Segment(name, run) for run in (parts or [[("", module)]])]

    def install(self) -> None:
        self._before = self.module.forward
        self._own = "forward" in self.module.__dict__
        self.module.forward = self._run if self.parts is None else self._run_parts

    def remove(self) -> None:
        if self._own:
            self.module.forward = self._before
        else:
            del self.module.forward

    def _run(self, *inputs: Any, **keywords: Any) -> Any:
        self.ran = True
        return self.segments[0].run(self._before, *inputs, **keywords)

    def _run_parts(self, value: Any) -> Any:
        self.ran = True
        for segment in self.segments:
            value = segment.run(segment.through, value)
        return value

    def __repr__(self) -> str:
        where = f"'{self.name}'" if self.name else "the model"
        return where if self.parts is None else f"{where} in {len(self.parts)} segments"


class _Segment:
    """Modules that are computed again together."""

    def __init__(self, name: str, modules: list[tuple[str, nn.Module]]) -> None:
        self._modules = [(".".join(part for part in (name, own) if part), module) for own, module in modules]
        self._left_alone: set[str] = set()
        self.verify = False

    def through(self, value: Any) -> Any:
        for _, module in self._modules:
            value = module(value)
        return value

    def run(self, forward: Callable[..., Any], *inputs: Any, **keywords: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*inputs, **keywords)
        versions = [(name, parameter, parameter._version) for name, parameter in self._parameters()]
        kept = self._keep()

        again = Again(versions, kept)
        if self.verify:
            value = sentinel.checkpointed(repr(self), self._modules, again, forward, inputs, keywords)
        else:
            contexts = nullcontext(), again
            value = checkpoint(
                forward, *inputs, use_reentrant=False, preserve_rng_state=True, context_fn=lambda: contexts, **keywords
            )
        self._let_go(kept)
        return value

    def __repr__(self) -> str:
        first, last = self._modules[0][0], self._modules[-1][0]
        if first == last:
            return f"the segment '{first}'" if first else "the model"
        return f"the segment '{first}' to '{last}'"

    def _keep(self) -> list[Kept]:
        kept = []
        copies: dict[int, Tensor] = {}
        for prefix, outer in self._modules:
            for where, module in outer.named_modules(prefix=prefix):
                for key, buffer in module._buffers.items():
                    copy = None
                    if buffer is not None and not buffer.requires_grad:
                        copy = copies.get(id(buffer))
                        if copy is None:
                            copy = copies[id(buffer)] = buffer.clone()
                    version = 0 if buffer is None else buffer._version
                    kept.append(Kept(f"{where}.{key}" if where else key, module, key, buffer, copy, version))
        return kept

    def _let_go(self, kept: list[Kept]) -> None:
        """Drop the copies of large buffers that forward left alone: looked at once, by their version from then on."""
        for one in kept:
            buffer, copy = one.buffer, one.copy
            if buffer is None or copy is None or buffer.numel() * buffer.element_size() <= _SMALL:
                continue
            if isinstance(one.holder, _NormBase) or buffer.layout is not torch.strided:
                continue  # the kernels of normalisation change buffers without raising the version
            alone = buffer._version == one.version
            if alone and (one.name in self._left_alone or torch.equal(buffer, copy)):
                self._left_alone.add(one.name)
                one.copy = None

    def _parameters(self) -> Iterator[tuple[str, Tensor]]:
        for name, module in self._modules:
            yield from module.named_parameters(name)


def segments_for(model: Any, wanted: ActivationCheckpointingSettings | int | Sequence[str] | None) -> Segments | None:
    """The segments that the settings ask for, or None.

    Raises ConfigError where the model cannot be cut so; the sentence names the modules that can.
    """
    wanted = _as_settings(wanted)
    if wanted is None or wanted.mode == "none":
        return None
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"activation_checkpointing=segments needs an nn.Module to cut; {type(model).__name__} is a plain object."
        )
    cuts = _by_pattern(model, wanted.modules) if wanted.modules else [_by_number(model, wanted.segments)]
    return Segments(model, cuts, wanted.verify)


def verified(wanted: ActivationCheckpointingSettings | int | Sequence[str] | None) -> Any:
    """The same with each recompute held against its forward (`trainer.activations.sentinel`)."""
    wanted = _as_settings(wanted)
    return wanted if wanted is None or wanted.mode == "none" else replace(wanted, verify=True)


def _as_settings(
    wanted: ActivationCheckpointingSettings | int | Sequence[str] | None,
) -> ActivationCheckpointingSettings | None:
    if wanted is None or isinstance(wanted, ActivationCheckpointingSettings):
        return wanted
    by_number = {"segments": wanted} if isinstance(wanted, int) else {}
    by_name = {} if isinstance(wanted, int) else {"modules": [wanted] if isinstance(wanted, str) else list(wanted)}
    values = {"mode": "segments", **by_number, **by_name}
    return validated(ActivationCheckpointingSettings, values, "activation_checkpointing")


def _by_pattern(model: nn.Module, patterns: Sequence[str]) -> list[Cut]:
    modules = {name: module for name, module in model.named_modules() if name}
    chosen: dict[str, nn.Module] = {}
    for pattern in patterns:
        found = {name: module for name, module in modules.items() if fnmatch.fnmatchcase(name, pattern)}
        # `blocks.*` means the blocks, not everything inside them.
        outer = {n: m for n, m in found.items() if not any(n.startswith(f"{other}.") for other in found)}
        if not outer:
            raise ConfigError(
                f"activation_checkpointing.modules: no module matches '{pattern}': {_that_fit(model, pattern)}"
            )
        chosen.update(outer)
    for name in chosen:
        inside = next((other for other in chosen if name.startswith(f"{other}.")), None)
        if inside is not None:
            raise ConfigError(f"activation_checkpointing.modules: '{name}' lies inside '{inside}': name one of them.")
        if isinstance(chosen[name], nn.ModuleList | nn.ModuleDict):
            raise ConfigError(
                f"activation_checkpointing.modules: '{name}' is a list that is never called itself: name what is in "
                f"it, '{name}.*'."
            )
    return [Cut(name, module) for name, module in chosen.items()]


def _by_number(model: nn.Module, number: int | None) -> Cut:
    chains = [(name, module) for name, module in model.named_modules() if type(module) is nn.Sequential]
    if not chains:
        raise ConfigError(
            f"activation_checkpointing: {type(model).__name__} holds no nn.Sequential that could be cut by number: "
            f"name its parts in activation_checkpointing.modules. {_that_fit(model, '')}"
        )
    name, chain = max(chains, key=lambda item: (len(item[1]), -len(item[0])))
    modules = list(chain._modules.items())
    wanted = number if number is not None else max(1, round(len(modules) ** 0.5))
    if wanted > len(modules):
        where = f"'{name}'" if name else "the model"
        raise ConfigError(
            f"activation_checkpointing.segments={wanted} is more than the {len(modules)} modules of {where}: "
            f"choose at most {len(modules)}."
        )
    size, longer = divmod(len(modules), wanted)
    parts, start = [], 0
    for index in range(wanted):
        stop = start + size + (1 if index < longer else 0)
        parts.append([(own, module) for own, module in modules[start:stop] if module is not None])
        start = stop
    return Cut(name, chain, parts)


def _that_fit(model: nn.Module, wrong: str) -> str:
    """Modules that make good segments: the members of lists and sequentials, else the children."""
    fit: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList | nn.Sequential) and len(module) > 1:
            fit.append(f"{name}.*" if name else "*")
    fit = fit or [name for name, child in model.named_children() if any(True for _ in child.parameters())]
    return did_you_mean(wrong, fit)
