"""A checksum of a tensor's bits."""

import zlib
from typing import Any

import torch
from torch import Tensor


def checksum(tensor: Tensor) -> Any:
    """Of the bits of a tensor, in their order: a number on the CPU, elsewhere a tensor on its device."""
    if tensor.layout is not torch.strided or tensor.device.type == "meta":
        return tuple(tensor.shape)
    bits = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
    if bits.device.type == "cpu":
        return zlib.crc32(bits.numpy())  # type: ignore[arg-type]
    places = torch.arange(1, bits.numel() + 1, device=bits.device) * 0x9E3779B1
    return (bits.to(torch.int64) * (places | 1)).sum()
