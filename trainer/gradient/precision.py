"""Precision: of forward alone (bf16 and fp16, by autocast), or of everything (fp32, fp64, bf16_true)."""

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
    """Raises ConfigError where a precision is asked for that a parameter does not have."""
    dtype = width(precision)
    for name, parameter in parameters.items() if dtype is not None else ():
        if parameter.dtype not in (dtype, torch.complex128 if dtype is torch.float64 else dtype):
            wanted, method = ("float64", "double") if dtype is torch.float64 else ("bfloat16", "bfloat16")
            raise ConfigError(
                f"precision={precision}, but the parameter '{name}' is {str(parameter.dtype).removeprefix('torch.')}: "
                f"make the model's tensors {wanted} before its optimizer (of a module: model.{method}())."
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
    "bf16_true": ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"),
    "fp16": ("avx512_fp16", "amx_fp16", "fp16_arith"),
}
_SLOWER = {"bf16": 9, "bf16_true": 9, "fp16": 17}  # measured by docs/toggles/cost.py


def width(precision: str) -> torch.dtype | None:
    """The dtype that floating-point inputs are turned into, or None where they stay as they are."""
    return {"fp64": torch.float64, "bf16_true": torch.bfloat16}.get(precision)
