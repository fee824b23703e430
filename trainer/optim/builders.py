"""Optimizers as a config names them, fused where torch has a fused kernel for the parameters."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, AdamW

from trainer.optim.groups import check_options

_FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")


def adamw(
    parameters: Iterable[Any],
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
) -> AdamW:
    """AdamW (Loshchilov and Hutter 2019), fused where it can be."""
    parameters = list(parameters)
    made = AdamW(
        parameters,
        lr=float(lr),
        betas=(float(betas[0]), float(betas[1])),
        eps=float(eps),
        weight_decay=float(weight_decay),
        **_fused(parameters),
    )
    check_options(made)
    return made


def sgd(
    parameters: Iterable[Any],
    lr: float = 1e-2,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
) -> SGD:
    """Gradient descent with momentum, fused where it can be."""
    parameters = list(parameters)
    made = SGD(
        parameters,
        lr=float(lr),
        momentum=float(momentum),
        weight_decay=float(weight_decay),
        nesterov=nesterov,
        **_fused(parameters),
    )
    check_options(made)
    return made


def _fused(parameters: list[Any]) -> dict[str, bool]:
    tensors: list[Tensor] = []
    for item in parameters:
        tensors.extend(list(item["params"]) if isinstance(item, dict) else [item])
    return {"fused": True} if tensors and fit_for_fused(tensors) else {}


def fit_for_fused(parameters: Iterable[Tensor]) -> bool:
    """Whether torch's fused kernels take all of them: real, and on a device that has such kernels."""
    return all(p.device.type in _FUSED_DEVICES and torch.is_floating_point(p) for p in parameters)
