"""Precision of forward: fp32, bf16 (autocast, parameters stay float32) and fp64 (everything in float64)."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from trainer.errors import ConfigError


def autocast(precision: str, device_type: str) -> AbstractContextManager[Any] | None:
    """The context of forward, or None where it needs none: even a disabled autocast costs 3 µs."""
    if precision == "bf16":
        return torch.autocast(device_type, dtype=torch.bfloat16)
    return None


def check_precision(precision: str, parameters: Mapping[str, Tensor]) -> None:
    """Raises ConfigError where fp64 is asked for and a parameter is narrower."""
    if precision == "fp64":
        for name, parameter in parameters.items():
            if parameter.dtype not in (torch.float64, torch.complex128):
                raise ConfigError(
                    f"precision=fp64, but the parameter '{name}' is {str(parameter.dtype).removeprefix('torch.')}: "
                    "make the model's tensors float64 before its optimizer (of a module: model.double())."
                )


def width(precision: str) -> torch.dtype | None:
    """The dtype that floating-point inputs are turned into, or None where they stay as they are."""
    return torch.float64 if precision == "fp64" else None
