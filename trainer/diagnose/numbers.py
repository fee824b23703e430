"""Numbers of a tensor in words, and how far they are from finite."""

import torch
from torch import Tensor

FINITE, INF, NAN = 0, 1, 2


def level(tensor: Tensor) -> int:
    """FINITE, INF where an infinity is the worst in it, or NAN. Whole numbers are finite."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return FINITE
    values = _values(tensor)
    if bool(values.isfinite().all()):
        return FINITE
    return NAN if bool(values.isnan().any()) else INF


def is_finite(tensor: Tensor) -> bool:
    """Whether every number in it is; whole numbers are."""
    return level(tensor) == FINITE


def spread(tensor: Tensor) -> str:
    """`4 × 8 float32 in [-1.2, 3.4]`, of what is finite in it; what is not is said too."""
    shape = " × ".join(map(str, tensor.shape)) or "a scalar"
    kind = str(tensor.dtype).removeprefix("torch.")
    if not tensor.numel() or tensor.is_complex() or tensor.layout is not torch.strided:
        return f"{shape} {kind}"
    values = _values(tensor)
    others = ""
    if values.is_floating_point():
        others = "" if bool(values.isfinite().all()) else f", with {bad(tensor)}"
        values = values[values.isfinite()].double()
        if not values.numel():
            return f"{shape} {kind}{others}"
    return f"{shape} {kind} in [{values.min().item():.4g}, {values.max().item():.4g}]{others}"


def bad(tensor: Tensor) -> str:
    """`nan and -inf (3 of 48)`."""
    values = _values(tensor)
    kinds = [
        word
        for word, there in (
            ("nan", values.isnan()),
            ("inf", values == float("inf")) if not values.is_complex() else ("inf", values.isinf()),
            ("-inf", values == float("-inf")) if not values.is_complex() else ("inf", values.isinf()),
        )
        if bool(there.any())
    ]
    wrong = int((~values.isfinite()).sum())
    return f"{' and '.join(dict.fromkeys(kinds))} ({wrong:,} of {values.numel():,})"


def _values(tensor: Tensor) -> Tensor:
    values = tensor.detach()
    if values.layout is not torch.strided:
        values = values.coalesce().values() if values.layout is torch.sparse_coo else values.values()
    # What has fewer than 16 bits knows neither isfinite nor comparisons.
    return values.float() if values.is_floating_point() and values.element_size() == 1 else values
