"""Seeds: the tensors that backward starts from. A window's seeds repeat from window to window, so they are kept."""

import torch
from torch import Tensor

from trainer.gradient.report import Number

# By (value, dtype, device).
_SEEDS: dict[tuple[float, torch.dtype, torch.device], Tensor] = {}
_MOST_SEEDS = 256


def seed_of(number: Number, value: Tensor) -> Tensor:
    """A tensor of value's dtype and device and, for a scalar, its shape."""
    if isinstance(number, Tensor):
        return number.to(value.device, value.dtype).reshape(value.shape if value.numel() == 1 else ())
    key = (number, value.dtype, value.device)
    seed = _SEEDS.get(key)
    if seed is None or seed._version:  # a backward that changes what it is given in place must not change the next one
        if len(_SEEDS) >= _MOST_SEEDS:
            _SEEDS.clear()
        seed = _SEEDS[key] = torch.full((), number, dtype=value.dtype, device=value.device)
    return seed.reshape(value.shape) if value.dim() and value.numel() == 1 else seed
