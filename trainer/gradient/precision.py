"""Precision of forward: fp32, bf16 and fp16 (autocast, parameters stay float32) and fp64 (everything in float64)."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from trainer.errors import ConfigError


def autocast(precision: str, device_type: str) -> AbstractContextManager[Any] | None:
    """The context of forward, or None where it needs none: even a disabled autocast costs 3 µs."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    return None if dtype is None else torch.autocast(device_type, dtype=dtype)


def check_precision(precision: str, parameters: Mapping[str, Tensor]) -> None:
    """Raises ConfigError where fp64 is asked for and a parameter is narrower."""
    if precision == "fp64":
        for name, parameter in parameters.items():
            if parameter.dtype not in (torch.float64, torch.complex128):
                raise ConfigError(
                    f"precision=fp64, but the parameter '{name}' is {str(parameter.dtype).removeprefix('torch.')}: "
                    "make the model's tensors float64 before its optimizer (of a module: model.double())."
                )


def slow_here(precision: str, device_type: str) -> str | None:
    """The sentence to say where the precision costs more than fp32, as this CPU has no arithmetic for it."""
    if device_type != "cpu" or precision not in _INSTRUCTIONS:
        return None
    has = torch.cpu.get_capabilities()
    if any(has.get(name) for name in _INSTRUCTIONS[precision]):
        return None
    return (
        f"this CPU has no instructions for {precision}: it is slower here than fp32, up to {_SLOWER[precision]} times."
    )


# Names that torch.cpu.get_capabilities gives them, on x86 and on ARM.
_INSTRUCTIONS = {
    "bf16": ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"),
    "fp16": ("avx512_fp16", "amx_fp16", "fp16_arith"),
}
_SLOWER = {"bf16": 9, "fp16": 17}  # measured by docs/toggles/cost.py


def width(precision: str) -> torch.dtype | None:
    """The dtype that floating-point inputs are turned into, or None where they stay as they are."""
    return torch.float64 if precision == "fp64" else None
