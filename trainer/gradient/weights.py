"""Weights: how much a micro-batch counts, exactly as each torch loss divides.

Source: the `reduction` notes of torch.nn's loss classes, held against them in the tests loss by loss.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainer.errors import ConfigError, ObjectiveError
from trainer.gradient.report import FREE_READS, Number


def host_number(value: Any) -> Number:
    """A weight as a float where reading it costs nothing, as a tensor (float64: counts stay exact) on a device."""
    if isinstance(value, Tensor):
        if value.device.type in FREE_READS:
            return float(value.item())
        return value.detach() if value.device.type == "mps" else value.detach().double()  # mps has no float64
    return float(value)


def power_of_two(value: Number) -> Number:
    """The power of two nearest to a positive number (by ratio, so within √2 of it); 1 for zero."""
    if isinstance(value, Tensor):
        return torch.where(value > 0, torch.exp2(torch.round(torch.log2(value.double()))), 1.0)
    # frexp and the constant √½ keep this exact where log2 would round.
    if value <= 0:
        return 1.0
    mantissa, exponent = math.frexp(value)
    return 2.0 ** (exponent if mantissa >= 0.7071067811865476 else exponent - 1)


def not_zero(divisor: Number) -> Number:
    """The divisor, or 1 in place of zero."""
    if isinstance(divisor, Tensor):
        return torch.where(divisor == 0, 1.0, divisor)
    return divisor or 1.0


def as_floats(numbers: list[Number]) -> list[float]:
    """Numbers on the host, by one read of the device where they lie there."""
    if any(isinstance(number, Tensor) for number in numbers):
        device = next(number.device for number in numbers if isinstance(number, Tensor))
        stacked = torch.stack([torch.as_tensor(number, dtype=torch.float64, device=device) for number in numbers])
        return list(stacked.tolist())
    return [float(host_number(number)) for number in numbers]


def first_tensor(micro_batch: Any) -> Tensor:
    """The first tensor in a nested micro-batch. Raises ObjectiveError where there is none."""
    found = next(_tensors(micro_batch), None)
    if found is None:
        raise ObjectiveError(
            f"a micro-batch of type {type(micro_batch).__name__} holds no tensor to count rows by: pass count_rows=."
        )
    return found


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


@dataclass(frozen=True)
class Counter:
    """What a loss divides by.

    - `what`: in words.
    - `count(targets, outputs)`: the divisor; `outputs` is None where only the data is known.
    - `is_mean`: whether the loss divides by it itself.
    - `full(targets)`: the divisor if no target is ignored, where that is cheaper to tell.
    - `counts_targets`: whether it counts index targets, of which a row can have many.
    - `total`: the loss's reduction="sum" twin, where a mean of nothing (0 / 0) is possible or the loss is no mean.
    """

    what: str
    count: Callable[[Tensor, Tensor | None], Number]
    is_mean: bool = True
    total: Callable[..., Tensor] | None = None
    counts_targets: bool = False
    full: Callable[[Tensor], float] | None = None

    def total_of(self, loss: Callable[..., Tensor]) -> Callable[..., Tensor] | None:
        return self.total if self.is_mean else loss


def _rows(targets: Tensor, outputs: Tensor | None) -> Number:
    del outputs
    return float(targets.shape[0]) if targets.dim() else 1.0


def _elements(targets: Tensor, outputs: Tensor | None) -> Number:
    return float(targets.numel() if outputs is None else max(targets.numel(), outputs.numel()))


def _all_classes(targets: Tensor) -> float:
    if targets.is_floating_point():
        # Class probabilities of shape (rows, classes, ...): divided by rows × what follows the classes.
        return float(targets.numel() // targets.shape[1]) if targets.dim() > 1 else 1.0
    return float(targets.numel())


def _classes(targets: Tensor, ignore_index: int, class_weights: Tensor | None) -> Number:
    if targets.is_floating_point():
        return _all_classes(targets)
    if class_weights is None:
        # One pass instead of two where nothing is ignored, which is the rule.
        free = targets.device.type in FREE_READS and ignore_index < 0 and targets.numel() > 0
        if free and int(targets.min()) >= 0:
            return float(targets.numel())
        return (targets != ignore_index).sum()
    kept = targets != ignore_index
    return class_weights[targets.where(kept, 0)].mul(kept).sum()


_ELEMENT_LOSSES: tuple[type[nn.Module], ...] = (
    nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss, nn.BCELoss, nn.BCEWithLogitsLoss, nn.SoftMarginLoss,
    nn.PoissonNLLLoss, nn.HingeEmbeddingLoss,
)  # fmt: skip
_ROW_LOSSES: tuple[type[nn.Module], ...] = (nn.MultiMarginLoss, nn.MultiLabelMarginLoss, nn.MultiLabelSoftMarginLoss)
_ELEMENT_FUNCTIONS: tuple[Callable[..., Any], ...] = (
    functional.mse_loss, functional.l1_loss, functional.smooth_l1_loss, functional.huber_loss,
    functional.binary_cross_entropy, functional.binary_cross_entropy_with_logits, functional.soft_margin_loss,
    functional.poisson_nll_loss, functional.hinge_embedding_loss,
)  # fmt: skip
_ROW_FUNCTIONS: tuple[Callable[..., Any], ...] = (
    functional.multi_margin_loss, functional.multilabel_margin_loss, functional.multilabel_soft_margin_loss,
)  # fmt: skip
_REDUCTIONS = ("mean", "sum", "none", "batchmean")


def counter_of(loss: Callable[..., Any]) -> Counter:
    """The counter of a torch loss; of any other callable: a mean over rows."""
    function, options = _options(loss)
    for old in ("size_average", "reduce"):
        if options.get(old) is not None:
            raise ConfigError(f"the loss was given {old}, which torch has replaced: write reduction= in its place.")
    reduction = options.get("reduction", "mean")
    if reduction not in _REDUCTIONS:
        raise ConfigError(f"the loss's reduction {reduction!r} is not known: choose one of {', '.join(_REDUCTIONS)}.")
    is_mean = reduction in ("mean", "batchmean")
    if _is(function, (nn.CrossEntropyLoss, nn.NLLLoss), (functional.cross_entropy, functional.nll_loss)):
        ignore_index = options.get("ignore_index", -100)
        class_weights = options.get("weight")
        what = "targets that are not ignored" if class_weights is None else "class weights of targets not ignored"

        def count(targets: Tensor, outputs: Tensor | None) -> Number:
            del outputs
            return _classes(targets, ignore_index, class_weights)

        full = None if class_weights is not None else _all_classes
        return Counter(what, count, is_mean, _summed(function, options), counts_targets=True, full=full)
    if reduction == "batchmean" or _is(function, _ROW_LOSSES, _ROW_FUNCTIONS):
        return Counter("rows", _rows, is_mean)
    if _is(function, (*_ELEMENT_LOSSES, nn.KLDivLoss), (*_ELEMENT_FUNCTIONS, functional.kl_div)):
        return Counter("elements", _elements, is_mean)
    return Counter("rows (a loss that torch does not have is taken as a mean over rows)", _rows, is_mean)


def _options(loss: Callable[..., Any]) -> tuple[Any, dict[str, Any]]:
    """The function or module behind a loss, and what was set on it."""
    options: dict[str, Any] = {}
    while isinstance(loss, functools.partial):
        options = {**loss.keywords, **options}
        loss = loss.func
    if isinstance(loss, nn.Module):
        known = ("reduction", "ignore_index", "weight")
        options = {**{name: getattr(loss, name) for name in known if hasattr(loss, name)}, **options}
    return loss, options


def _is(loss: Any, modules: tuple[type[nn.Module], ...], functions: tuple[Callable[..., Any], ...]) -> bool:
    # A subclass may reduce as it likes: only the classes themselves are known.
    return type(loss) in modules or any(loss is function for function in functions)


def _summed(loss: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Tensor]:
    """Cross-entropy (its class or function, taken out of its partials) with its own options, as a total."""
    if isinstance(loss, nn.NLLLoss) or loss is functional.nll_loss:
        function: Callable[..., Tensor] = functional.nll_loss
    else:
        function = functional.cross_entropy
    keywords = {name: value for name, value in options.items() if name in ("weight", "ignore_index", "label_smoothing")}
    if isinstance(loss, nn.CrossEntropyLoss):
        keywords["label_smoothing"] = loss.label_smoothing
    return functools.partial(function, reduction="sum", **keywords)
