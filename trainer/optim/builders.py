"""Optimizers as a config names them, fused where torch has a fused kernel for the parameters."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, AdamW

from trainer import kernels
from trainer.errors import ConfigError
from trainer.optim.groups import check_options

_FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")


@kernels.without_compiler()
def adamw(
    parameters: Iterable[Any],
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
) -> AdamW:
    """AdamW (Loshchilov and Hutter 2019), fused where it can be."""
    parameters = _listed(parameters)
    made = AdamW(
        parameters,
        lr=float(lr),
        betas=(float(betas[0]), float(betas[1])),
        eps=float(eps),
        weight_decay=float(weight_decay),
        **_fused(AdamW, parameters),
    )
    check_options(made)
    return made


@kernels.without_compiler()
def sgd(
    parameters: Iterable[Any],
    lr: float = 1e-2,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
) -> SGD:
    """Gradient descent with momentum, fused where it can be."""
    parameters = _listed(parameters)
    made = SGD(
        parameters,
        lr=float(lr),
        momentum=float(momentum),
        weight_decay=float(weight_decay),
        nesterov=nesterov,
        **_fused(SGD, parameters),
    )
    check_options(made)
    return made


def _listed(parameters: Iterable[Any]) -> list[Any]:
    """Parameters or groups as a list that can be walked twice; a group's rate is a float, as a config may write 1."""
    if isinstance(parameters, Tensor):
        raise ConfigError("the optimizer got one tensor instead of a list of parameters: write [tensor].")
    listed = [{**item} if isinstance(item, dict) else item for item in parameters]
    for item in listed:
        if isinstance(item, dict):
            item["params"] = [item["params"]] if isinstance(item["params"], Tensor) else list(item["params"])
            if isinstance(item.get("lr"), int):
                item["lr"] = float(item["lr"])
    return listed


def _fused(kind: type, parameters: list[Any]) -> dict[str, bool]:
    items: list[Any] = []
    for item in parameters:
        items.extend(item["params"] if isinstance(item, dict) else [item])
    tensors = [item[1] if isinstance(item, tuple) else item for item in items]  # a tuple is (name, parameter)
    return {"fused": True} if tensors and fit_for_fused(kind, tensors) else {}


def fit_for_fused(kind: type, parameters: Iterable[Tensor]) -> bool:
    """Whether torch's fused kernels for an optimizer of that class take all of them: real, on a device that has such
    kernels, and moved by them."""
    return all(
        p.device.type in _FUSED_DEVICES and torch.is_floating_point(p) and not kernels.fused_skips_elements(kind, p)
        for p in parameters
    )
