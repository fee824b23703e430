"""Flat buffers in which the gradients of all ranks are summed, few sums for many gradients.

The first buffer holds, in front of its gradients, whatever else is to be summed: so a small model costs one sum a
window in all. It is float64 whatever the gradients are, which keeps counts exact; half-precision gradients are summed
in float32. A large gradient is summed where it lies, without a copy: so only once the first buffer has come, which may
say that the window is not to be summed at all.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from trainer.distributed.ranks import Arrived, Ranks

FIRST = 1 << 16
"""Numbers of gradients in the first buffer: half a MiB."""
BUCKET = 16 << 20
"""Bytes of the others."""
WHOLE = 4 << 20
"""Bytes from which on a gradient is summed where it lies."""


@dataclass(slots=True)
class _Bucket:
    buffer: Tensor
    names: list[str] = field(default_factory=list)
    views: list[Tensor] = field(default_factory=list)


class Buckets:
    """The buffers for these parameters, kept from window to window.

    Args:
        parameters: by name, the same on every rank.
        head: how many other numbers the first buffer has room for.
        device: of the first buffer.
    """

    def __init__(self, parameters: Mapping[str, Tensor], head: int, device: torch.device) -> None:
        self._parameters = dict(parameters)
        self._whole: list[str] = []
        small: list[str] = []
        packs: dict[tuple[torch.device, torch.dtype], list[list[str]]] = {}
        room = FIRST
        for name, parameter in self._parameters.items():
            size, wide = _numbers(parameter), _wide(parameter.dtype)
            if size <= room and parameter.device == device:
                room -= size
                small.append(name)
            elif size * wide.itemsize >= WHOLE and wide == _real(parameter.dtype) and parameter.is_contiguous():
                self._whole.append(name)
            else:
                pack = packs.setdefault((parameter.device, wide), [[]])
                if sum(_numbers(self._parameters[other]) for other in pack[-1]) * wide.itemsize >= BUCKET:
                    pack.append([])
                pack[-1].append(name)
        first = self._bucket(small, torch.float64, device, head)
        self.head = first.buffer[:head]
        """The other numbers: written before `send`, summed after `receive`."""
        others = [self._bucket(names, dtype, where, 0) for (where, dtype), all_ in packs.items() for names in all_]
        self._buckets = [first, *others]
        self._coming: list[Arrived] = []
        self._sent: dict[str, Tensor] = {}

    def _bucket(self, names: Sequence[str], dtype: torch.dtype, device: torch.device, head: int) -> _Bucket:
        sizes = [_numbers(self._parameters[name]) for name in names]
        bucket = _Bucket(torch.zeros(head + sum(sizes), dtype=dtype, device=device))
        start = head
        for name, size in zip(names, sizes, strict=True):
            bucket.names.append(name)
            bucket.views.append(bucket.buffer[start : start + size].view(_shape(self._parameters[name])))
            start += size
        return bucket

    def send(self, ranks: Ranks, gradients: Mapping[str, Tensor]) -> None:
        """Start Σ over ranks of all buffers. A parameter without a gradient here counts as zeros. The gradients
        themselves stay as they are until `send_whole` and `receive`."""
        self._coming = []
        with torch.no_grad():
            for bucket in self._buckets:
                here = [(view, gradients.get(name)) for name, view in zip(bucket.names, bucket.views, strict=True)]
                if any(gradient is None for _, gradient in here):
                    torch._foreach_zero_([view for view, gradient in here if gradient is None])
                known = [(view, _plain(gradient)) for view, gradient in here if gradient is not None]
                if known:
                    torch._foreach_copy_([view for view, _ in known], [gradient for _, gradient in known])
                self._coming.append(ranks.sum_later(bucket.buffer))

    def receive_head(self) -> Tensor:
        """Wait for the first buffer; its other numbers."""
        self._coming[0]()
        return self.head

    def send_whole(self, ranks: Ranks, gradients: Mapping[str, Tensor]) -> None:
        """Start Σ over ranks of the large gradients, where they lie."""
        self._sent = {}
        with torch.no_grad():
            for name in self._whole:
                gradient = gradients.get(name)
                whole = torch.zeros_like(self._parameters[name]) if gradient is None else gradient.contiguous()
                self._sent[name] = whole
                self._coming.append(ranks.sum_later(_plain(whole)))

    def drop(self) -> None:
        """Wait for the buffers, in place of `send_whole` and `receive`: what was sent counts for nothing."""
        for arrived in self._coming[1:]:
            arrived()

    def receive(self, gradients: Mapping[str, Tensor], wanted: set[str]) -> dict[str, Tensor]:
        """Wait for the rest. The summed gradients of the `wanted` names: in the given tensors where they were there."""
        found: dict[str, Tensor] = {}
        with torch.no_grad():
            for bucket, arrived in zip(self._buckets, self._coming, strict=False):
                if bucket is not self._buckets[0]:
                    arrived()
                targets, sources = [], []
                for name, view in zip(bucket.names, bucket.views, strict=True):
                    if name in wanted:
                        target = gradients.get(name)
                        found[name] = torch.empty_like(self._parameters[name]) if target is None else target
                        targets.append(_plain(found[name]))
                        sources.append(view)
                if targets:
                    torch._foreach_copy_(targets, sources)
            for arrived in self._coming[len(self._buckets) :]:
                arrived()
        found.update({name: summed for name, summed in self._sent.items() if name in wanted})
        self._sent = {}
        return found


def _plain(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor.detach()


def _real(dtype: torch.dtype) -> torch.dtype:
    return dtype.to_real() if dtype.is_complex else dtype


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else _real(dtype)


def _numbers(parameter: Tensor) -> int:
    return parameter.numel() * (2 if parameter.is_complex() else 1)


def _shape(parameter: Tensor) -> tuple[int, ...]:
    return (*parameter.shape, 2) if parameter.is_complex() else tuple(parameter.shape)
