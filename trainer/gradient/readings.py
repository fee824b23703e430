"""Ways to read a model's loss: as a mean over what, and as which total of its logits and labels."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Reading:
    """One way to read a loss: as a mean over what, and as which total of (logits, labels); None where they do not fit.

    The total is in the logits' own width, float32 at least.
    """

    what: str
    count: Callable[[Tensor, int], Tensor | int]
    total: Callable[[Tensor, Tensor, int], Tensor | None]


def _shifted_count(labels: Tensor, ignore_index: int) -> Tensor:
    return (labels[..., 1:] != ignore_index).sum()


def _shifted_total(logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor | None:
    if labels.dim() < 2 or not _are_logits(logits, labels):
        return None
    return _cross_entropy(logits[..., :-1, :], labels[..., 1:], ignore_index)


def _aligned_count(labels: Tensor, ignore_index: int) -> Tensor:
    return (labels != ignore_index).sum()


def _aligned_total(logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor | None:
    return _cross_entropy(logits, labels, ignore_index) if _are_logits(logits, labels) else None


def _elements(labels: Tensor, ignore_index: int) -> int:
    del ignore_index
    return labels.numel()


def _squared_total(logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor | None:
    del ignore_index
    if not labels.is_floating_point() or logits.numel() != labels.numel():
        return None
    return functional.mse_loss(_wide(logits).flatten(), labels.flatten().to(_wide(logits)), reduction="sum")


def _binary_total(logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor | None:
    del ignore_index
    if not labels.is_floating_point() or logits.shape != labels.shape:
        return None
    return functional.binary_cross_entropy_with_logits(_wide(logits), labels.to(_wide(logits)), reduction="sum")


READINGS = {
    "shifted": Reading("labels after the first of each row that are not ignored", _shifted_count, _shifted_total),
    "labels": Reading("labels that are not ignored", _aligned_count, _aligned_total),
    "squares": Reading("elements of the labels", _elements, _squared_total),
    "binary": Reading("elements of the labels", _elements, _binary_total),
}


def _are_logits(logits: Tensor, labels: Tensor) -> bool:
    whole = not (labels.is_floating_point() or labels.is_complex() or labels.dtype is torch.bool)
    return whole and logits.dim() == labels.dim() + 1 and logits.shape[:-1] == labels.shape


def are_classes(labels: Tensor, logits: Tensor) -> bool:
    """Whether whole numbers can be classes of these logits. Others end a CUDA process, so it is asked before."""
    if labels.is_floating_point() or not labels.numel() or not logits.dim():
        return True
    return int(labels.max()) < logits.shape[-1]


def _cross_entropy(logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    flat = _wide(logits).reshape(-1, logits.shape[-1])
    return functional.cross_entropy(flat, labels.reshape(-1).long(), ignore_index=ignore_index, reduction="sum")


def _wide(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
