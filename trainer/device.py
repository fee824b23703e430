"""Where a run computes, and its micro-batches there."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from trainer.data.sources import Source, TensorSource, place
from trainer.errors import ConfigError

# Data in memory up to this many bytes is moved to a device once instead of batch by batch.
_MOVED_WHOLE = 1 << 30


class Placed:
    """A source whose micro-batches are on a device, their floating-point tensors in a dtype (None: as they are)."""

    def __init__(self, source: Source, device: torch.device, dtype: torch.dtype | None) -> None:
        self.owns_order = source.owns_order
        self.cuts_rows = source.cuts_rows
        self._source = self.placed_from = source
        self._device = device
        self._dtype = dtype

        # A source that can leave out the micro-batches of other ranks still can.
        self.dealt = self._dealt if hasattr(source, "dealt") else None

    def length(self) -> int | None:
        return self._source.length()

    def micro_batches(self, seed: int, epoch: int, position: int) -> Iterator[Any]:
        batches = self._source.micro_batches(seed, epoch, position)
        return (place(batch, self._device, self._dtype) for batch in batches)

    def _dealt(self, *place_and_deal: int) -> Iterator[Any]:
        batches = self._source.dealt(*place_and_deal)  # type: ignore[attr-defined]
        return (place(batch, self._device, self._dtype) for batch in batches)


def placed(source: Source, device: torch.device, dtype: torch.dtype | None) -> Source:
    """The source on the device, at once where it is small enough to lie there whole. Nothing is moved to the CPU."""
    if isinstance(source, TensorSource):
        size = sum(tensor.numel() * tensor.element_size() for tensor in source.tensors)
        if device.type == "cpu" or size <= _MOVED_WHOLE:
            return source.placed(device, dtype)
    return source if device.type == "cpu" and dtype is None else Placed(source, device, dtype)


def device_of(wanted: str, model: Any) -> torch.device:
    """The device that the settings ask for. A plain object's tensors are never moved, so for one it is the CPU.

    Raises ConfigError for a device that is not here.
    """
    if not isinstance(model, nn.Module):
        return torch.device("cpu")
    if wanted == "auto":
        names = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
        return torch.device(next((name for name, here in names.items() if here), "cpu"))
    try:
        device = torch.device(wanted)
    except RuntimeError:
        raise ConfigError(f"device={wanted!r} is no device: choose auto, cpu, cuda, cuda:0 or mps.") from None
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            seen = f"{count} CUDA devices" if count else "no CUDA device"
            raise ConfigError(f"device={wanted} is not here: torch sees {seen}. Choose device=cpu or auto.")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError(f"device={wanted} is not here: torch sees no MPS device. Choose device=cpu or auto.")
    return device
