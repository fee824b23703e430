"""What is given to a torch loss: outputs and targets that do not go together, where it raises and where it does not."""

import math
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from trainer.diagnose import places
from trainer.diagnose.graphs import nodes
from trainer.diagnose.trace import name_of, storage_of, tensors_in

_CLASSES = ("cross_entropy", "nll_loss")
_PROBABILITIES = ("binary_cross_entropy", "binary_cross_entropy_with_logits")
_DISTANCES = ("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss")
LOSSES = {*_CLASSES, *_PROBABILITIES, *_DISTANCES, "kl_div", "poisson_nll_loss"}
_FILES = (Path(functional.__file__).resolve(), Path(__file__).resolve().parents[1] / "kernels.py")
_VIEWS = ("View", "Transpose", "Permute", "Squeeze", "Unsqueeze", "Reshape", "Select", "Slice", "Alias", "T", "Expand")


def explained_loss(error: Exception) -> str | None:
    """The sentence for what a loss raised; None where it was no loss, or nothing about its arguments explains it."""
    found: FrameType | None = None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_code.co_name in LOSSES and Path(frame.f_code.co_filename).resolve() in _FILES:
            found = frame
    if found is None:
        return None
    held = found.f_locals
    outputs, targets = held.get("input", held.get("outputs")), held.get("target", held.get("targets"))
    if not isinstance(outputs, Tensor) or not isinstance(targets, Tensor):
        return None
    place, name = places.of(error), found.f_code.co_name
    what = f"{name}() in {place}" if place is not None else f"{name}()"
    return _sentence(name, what, outputs, targets, held.get("ignore_index"))


def _sentence(name: str, what: str, outputs: Tensor, targets: Tensor, ignored: int | None) -> str | None:
    if outputs.device != targets.device:
        return (
            f"{what} is given outputs on {outputs.device} and targets on {targets.device}: move the targets, "
            f"targets.to({str(outputs.device)!r})."
        )
    if name in _CLASSES:
        return _of_classes(name, what, outputs, targets, ignored)
    if outputs.shape != targets.shape and outputs.numel() == targets.numel():
        return f"{what} is given {_shapes(outputs, targets)}: give both one shape, {_reshaped(outputs, targets)}."
    if outputs.shape != targets.shape:
        return f"{what} is given {_shapes(outputs, targets)}: it compares element by element, give both one shape."
    if name in _PROBABILITIES:
        if not targets.is_floating_point():
            return f"{what} is given targets of {_type(targets)}: it takes numbers from 0 to 1, targets.float()."
        low, high = _range(targets)
        if low < 0 or high > 1:
            return f"{what} is given targets from {low:.4g} to {high:.4g}: they must lie from 0 to 1."
        low, high = _range(outputs)
        if name == "binary_cross_entropy" and (low < 0 or high > 1):
            return (
                f"{what} is given outputs from {low:.4g} to {high:.4g}, which are no probabilities: use "
                "binary_cross_entropy_with_logits (nn.BCEWithLogitsLoss), which takes them as they are."
            )
    return None


def _of_classes(name: str, what: str, outputs: Tensor, targets: Tensor, ignored: int | None) -> str | None:
    if outputs.dim() < 1:
        return None
    classes = outputs.shape[1] if outputs.dim() > 1 else outputs.shape[0]
    per_row = outputs.shape[:1] + outputs.shape[2:]
    takes = f"it takes one class number for each, of shape {tuple(per_row)}"
    if name == "cross_entropy" and outputs.shape == targets.shape and outputs.dim() > 1:
        if targets.is_floating_point():
            return None
        return (
            f"{what} is given whole numbers of the outputs' own shape {tuple(targets.shape)}: {takes} "
            "(targets.argmax(1) of a one-hot), or probabilities (targets.float())."
        )
    if outputs.dim() > 2 and targets.shape == outputs.shape[:-1] and targets.shape != per_row:
        return (
            f"{what} is given {_shapes(outputs, targets)}: the classes must be the second dimension, "
            "outputs.movedim(-1, 1), or flatten both to rows."
        )
    if targets.shape != per_row:
        told = f"{what} is given {_shapes(outputs, targets)}: {takes}"
        if targets.numel() == math.prod(per_row) and targets.dim() == len(per_row) + 1:
            return f"{told}, targets.squeeze({targets.shape.index(1, 1) if 1 in targets.shape[1:] else 0})."
        return f"{told}."
    if targets.dtype not in (torch.int64, torch.uint8):
        return f"{what} is given class numbers of {_type(targets)}: it takes int64, targets.long()."
    if targets.numel() and targets.device.type != "meta":
        kept = targets if ignored is None else targets[targets != ignored]
        low, high = _range(kept) if kept.numel() else (0.0, 0.0)
        if low < 0 or high >= classes:
            wrong = int(low if low < 0 else high)
            return (
                f"{what} is given the class number {wrong}, and the outputs have {classes} for each, "
                f"classes 0 to {classes - 1}: the last layer needs as many outputs as there are classes; "
                "ignore_index leaves out a number that stands for none."
            )
    return None


def _range(tensor: Tensor) -> tuple[float, float]:
    if not tensor.numel() or tensor.device.type == "meta":
        return 0.0, 0.0
    low, high = tensor.detach().aminmax()
    return float(low), float(high)


def _shapes(outputs: Tensor, targets: Tensor) -> str:
    return f"outputs of shape {tuple(outputs.shape)} and targets of shape {tuple(targets.shape)}"


def _reshaped(outputs: Tensor, targets: Tensor) -> str:
    if outputs.dim() == targets.dim() + 1 and outputs.shape[-1] == 1:
        return "outputs.squeeze(-1)"
    if targets.dim() == outputs.dim() + 1 and targets.shape[-1] == 1:
        return "targets.squeeze(-1)"
    return "targets.reshape(outputs.shape), if their order is the same"


def _type(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


class Losses(TorchFunctionMode):
    """Enter it around a forward; `said` is what no error says, a sentence each.

    Args:
        micro_batch: to know targets by in a difference that the objective takes itself.
        closely: look at values and at what the outputs were made by, not only at shapes.
    """

    def __init__(self, micro_batch: Any, closely: bool = False) -> None:
        super().__init__()
        self._given = {storage_of(one) for one in tensors_in(micro_batch)} - {None}
        self._closely = closely
        self._sums: list[tuple[Tensor, str]] = []
        self._found: dict[str, None] = {}
        self._below: FrameType | None = None

    def within(self, run: Callable[[], Any]) -> Any:
        """What `run` returns."""
        self._below = sys._getframe()
        try:
            with self:
                return run()
        finally:
            self._below = None

    @property
    def said(self) -> list[str]:
        return list(self._found)

    def returned(self, roots: Sequence[Tensor]) -> None:
        """The means that an objective returned: a sum is none."""
        for tensor, what in self._sums:
            if any(root is tensor for root in roots):
                self._found[
                    f"the objective returns what {what} has summed (reduction='sum') as if it were a mean over rows: "
                    "return Sum(total, weight), or take the mean."
                ] = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = name_of(func)
        if name in LOSSES or name in ("sub", "rsub"):
            pair = _pair(args, kwargs)
            if pair is not None and isinstance(result, Tensor):
                place = places.here(self._below)
                what = f"{name}() in {place}" if place is not None else f"{name}()"
                self._look(name, what, *pair)
                if name in LOSSES and kwargs.get("reduction") == "sum":
                    self._sums.append((result, what))
        return result

    def _look(self, name: str, what: str, outputs: Tensor, targets: Tensor) -> None:
        if name in _DISTANCES or name in ("sub", "rsub"):
            if _pairs_all(outputs, targets) and (name in _DISTANCES or self._is_difference(outputs, targets)):
                shape = tuple(torch.broadcast_shapes(outputs.shape, targets.shape))
                self._found[
                    f"{what} is given shapes {tuple(outputs.shape)} and {tuple(targets.shape)} and takes every output "
                    f"with every target, {shape}: give both one shape, by squeeze(-1) of the longer one."
                ] = None
        elif self._closely and (told := _quietly_wrong(name, what, outputs, targets)):
            self._found[told] = None

    def _is_difference(self, one: Tensor, other: Tensor) -> bool:
        """Whether it is one of something to be trained and something of the micro-batch."""
        if one.requires_grad == other.requires_grad:
            return False
        return storage_of(other if one.requires_grad else one) in self._given


def _pair(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor] | None:
    first = args[0] if args else kwargs.get("input")
    second = args[1] if len(args) > 1 else kwargs.get("target", kwargs.get("other"))
    return (first, second) if isinstance(first, Tensor) and isinstance(second, Tensor) else None


def _pairs_all(one: Tensor, other: Tensor) -> bool:
    """Whether they are a column and a row of as many: together they become a table of all pairs."""
    if one.numel() != other.numel() or one.numel() < 2 or abs(one.dim() - other.dim()) != 1:
        return False
    longer, shorter = (one, other) if one.dim() > other.dim() else (other, one)
    return bool(longer.shape[:-1] == shorter.shape and longer.shape[-1] == 1)


def _quietly_wrong(name: str, what: str, outputs: Tensor, targets: Tensor) -> str | None:
    made_by = _made_by(outputs)
    if name == "cross_entropy" and made_by == "Softmax":
        return f"{what} is given softmax()'s probabilities: it takes the outputs before it and takes it itself."
    if name == "binary_cross_entropy_with_logits":
        if made_by == "Sigmoid":
            return (
                f"{what} is given sigmoid()'s probabilities: it takes the outputs before sigmoid and takes it itself."
            )
        low, high = _range(targets)
        if low < 0 or high > 1:
            return f"{what} is given targets from {low:.4g} to {high:.4g}: they must lie from 0 to 1."
    if name in ("nll_loss", "kl_div") and (made_by == "Softmax" or _range(outputs)[1] > 1e-4):
        return (
            f"{what} is given values up to {_range(outputs)[1]:.4g}, which are no logarithms of probabilities: "
            "log_softmax comes before it."
        )
    return None


def _made_by(outputs: Tensor) -> str:
    """The operation behind the views: `Softmax` of SoftmaxBackward0."""
    for node in nodes([outputs]):
        name = str(node.name()).rstrip("0123456789").removesuffix("Backward").removeprefix("Unsafe")
        if not name.startswith(_VIEWS) or name.startswith("Tanh"):
            return name
    return ""
