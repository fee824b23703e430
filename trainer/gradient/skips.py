"""Skips: a step not taken, with its reason, and the buffers that forward changed put back as they were.

Parameters and optimizer state need no copy, as a skipped step never touches them. Buffers do: a NaN in the batch is in
BatchNorm's running statistics before anybody can tell.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase

from trainer.distributed.ranks import Ranks
from trainer.errors import ConfigError, GradientError
from trainer.gradient.norms import nonfinite_names
from trainer.gradient.open_window import OpenWindow
from trainer.gradient.parameters import named_modules
from trainer.gradient.report import Report

# Buffers up to this many bytes are kept at every window's start, and those of normalisation layers whatever their
# size (their kernels change them without raising the version counter). A larger one (a mask, a table of positions) is
# kept until a window has shown that forward leaves it alone; from then on its version counter is watched instead.
_SMALL = 1 << 16


class KeptBuffers:
    """The model's buffers as they were when the window began."""

    def __init__(self, model: Any) -> None:
        modules = named_modules(model).items()
        self._holders = [(prefix, _buffers(module), isinstance(module, _NormBase)) for prefix, module in modules]
        self._places: list[tuple[str, dict[str, Tensor | None], str]] = []
        self._held = -1
        self._copies: dict[str, Tensor] = {}
        # Large buffers that no window was seen to end with: still to be judged.
        self._large: set[str] = set()
        # Large buffers that forward leaves alone: the tensor and its version when the window began.
        self._left_alone: dict[str, tuple[Tensor, int]] = {}
        self._judged = True

    def keep(self) -> None:
        """Copy what forward may change. Called before a window's first forward."""
        self._find()
        self._judged = False
        sources, targets = [], []
        for name, buffer in self._now():
            if name in self._left_alone:
                self._left_alone[name] = (buffer, buffer._version)
                continue
            copy = self._copies.get(name)
            if copy is None or copy.shape != buffer.shape or copy.dtype != buffer.dtype or copy.device != buffer.device:
                copy = self._copies[name] = torch.empty_like(buffer)
            sources.append(buffer.detach() if buffer.requires_grad else buffer)
            targets.append(copy)
        if sources:
            torch._foreach_copy_(targets, sources)

    def put_back(self, flag: Tensor | None = None) -> None:
        """After a skip: every buffer as it was, bit for bit. With a `flag` on a device: where it is 1, unread."""
        self._judge()
        with torch.no_grad():
            for name, buffer in self._now():
                copy = self._copies.get(name)
                if copy is not None:
                    buffer.copy_(copy if flag is None else torch.where(flag.to(copy.device) == 1, copy, buffer))
                elif name not in self._left_alone and (flag is None or bool(flag)):
                    raise GradientError(
                        f"the step was skipped, but the buffer '{name}' was changed in forward for the first time and "
                        "had not been kept: go on from the last checkpoint."
                    )

    def release(self) -> None:
        """The window ended: what it showed about large buffers holds from the next one on."""
        self._judge()

    def _judge(self) -> None:
        """A large buffer that the window left alone needs no copy any more, one that it changed always does."""
        if self._judged:
            return
        self._judged = True
        for name, buffer in self._now() if self._large or self._left_alone else ():
            stood = self._left_alone.get(name)
            if stood is not None:
                if stood[0] is not buffer or stood[1] != buffer._version:
                    del self._left_alone[name]
            elif name in self._large:
                self._large.remove(name)
                if torch.equal(self._copies[name], buffer):
                    self._left_alone[name] = (buffer, buffer._version)
                    del self._copies[name]

    def state_dict(self) -> dict[str, Tensor]:
        return {name: copy.clone() for name, copy in self._copies.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The copies of an open window: whatever its forwards changed before it was saved counts as changed."""
        self._find()
        self._judged = False
        self._copies = {name: copy.clone() for name, copy in state.items()}
        self._left_alone = {name: (b, b._version) for name, b in self._now() if name not in self._copies}
        self._large -= self._left_alone.keys()

    def _find(self) -> None:
        held = sum(len(buffers) for _, buffers, _ in self._holders)
        if held != self._held:
            self._held = held
            self._places = [
                (f"{prefix}.{key}" if prefix else key, buffers, key)
                for prefix, buffers, _ in self._holders
                for key in buffers
            ]
            always = {
                f"{prefix}.{key}" if prefix else key
                for prefix, buffers, norm in self._holders
                if norm
                for key in buffers
            }
            self._large = {
                name
                for name, b in self._now()
                if b.numel() * b.element_size() > _SMALL and name not in always and name not in self._left_alone
            }

    def _now(self) -> Iterator[tuple[str, Tensor]]:
        for name, buffers, key in self._places:
            buffer = buffers.get(key)
            if buffer is not None:
                yield name, buffer


def _buffers(module: Any) -> dict[str, Tensor | None]:
    """The module's own dict. One of TorchScript has none, only a view without `get`; its buffers stay the same."""
    own = module._buffers
    return own if isinstance(own, dict) else dict(own.items())


def reason(
    losses: list[tuple[str, int, float]], micro_batches: int, gradients: dict[str, Tensor], norm: float | None
) -> str:
    """The sentence that says why a window with a non-finite verdict was not taken. Reads what it needs.

    Args:
        losses: (term, index of the micro-batch, value) of all that were weighed.
        micro_batches: how many the window held.
        gradients: by name, as they were checked.
        norm: the gradient norm, where one was taken.
    """
    wrong = of_losses(losses, micro_batches) or of_gradients(nonfinite_names(gradients))
    if wrong:
        return wrong
    if norm is not None and not math.isfinite(norm):
        return "the gradient is finite, but too large for its norm"
    return "the gradient overflows when it is divided by the window's weight"


def losses_of(window: OpenWindow) -> list[tuple[str, int, float]]:
    """(term, micro-batch, value) of all that weighs something, read."""
    return [(name, index, float(value)) for name, index, value in window.losses()]


def of_losses(losses: Sequence[tuple[str, int, float]], micro_batches: int) -> str | None:
    """The first loss that is not finite, in words."""
    wrong = [loss for loss in losses if not math.isfinite(loss[2])]
    if not wrong:
        return None
    name, index, value = min(wrong, key=lambda loss: loss[1])
    term = "" if name == "loss" else f" '{name}'"
    return f"the loss{term} of micro-batch {index + 1} of {micro_batches} is {value}"


def of_gradients(names: Sequence[str]) -> str | None:
    """The parameters whose gradient is not finite, in words."""
    if not names:
        return None
    more = f" and of {len(names) - 1} more" if len(names) > 1 else ""
    return f"the gradient of {names[0]}{more} is not finite, while the loss is"


def why(window: OpenWindow, gradients: dict[str, Tensor], report: Report) -> str:
    """The reason for a window with a non-finite verdict."""
    if not any(report.weights.values()):
        return ZERO_WEIGHT
    return reason(losses_of(window), window.micro_batches, gradients, report.grad_norm)


Rule = Callable[[Report], str | bool | None]
"""The user's own rule: a sentence or True where the step must not be taken, None or False where it may."""


def checked(rule: Rule | None) -> Rule | None:
    """The rule as given. Raises ConfigError for what cannot be called with a report."""
    if rule is not None and (isinstance(rule, type) or not callable(rule)):
        raise ConfigError(f"skip_if={rule!r} cannot be called with a report: give a function or an instance.")
    return rule


def asked(rule: Rule, report: Report, ranks: Ranks) -> str | None:
    """Why the user's own rule skips this step; None where it does not. One rank's answer counts for all.

    Raises ConfigError for an answer that is none.
    """
    answer = rule(report)
    if not isinstance(answer, str | bool | None):
        raise ConfigError(f"skip_if returned {answer!r}: return a sentence, True, False or None.")
    if ranks.world_size == 1:
        return answer if isinstance(answer, str) and answer else "skip_if said so" if answer else None
    said = [(rank, one) for rank, one in enumerate(ranks.gather(answer)) if one]
    if not said:
        return None
    rank, one = said[0]
    return f"on rank {rank} {one if isinstance(one, str) else 'skip_if said so'}"


def reason_on_device(weights: dict[str, float], bad_ranks: Tensor | None = None) -> str:
    """The same where the verdict was never read: what is still known when somebody asks."""
    if not any(weights.values()):
        return ZERO_WEIGHT
    ranks = [] if bad_ranks is None else [str(rank) for rank, bad in enumerate(bad_ranks.tolist()) if bad]
    where = f" on rank{'s' if len(ranks) > 1 else ''} {', '.join(ranks)}" if ranks else ""
    return f"the loss or the gradient is not finite{where}"


ZERO_WEIGHT = "the window weighs nothing: no row or target in it counts, so there is nothing to divide by"
