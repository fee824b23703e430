"""Norms, the finite check and clipping of gradients that may be sparse, complex, of mixed dtypes or devices.

A norm is taken before anything is clipped and never of clipped values: torch's own clip turns one infinity into
all-NaN and finite gradients of 1e20 silently into zeros. Numbers are floats on the CPU and tensors elsewhere.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from trainer import kernels
from trainer.gradient.report import FREE_READS, Number

# Below this many gradients the squares are added in Python (in double precision), above it in one kernel.
_FEW = 16


def plain(gradients: Sequence[Tensor]) -> list[Tensor]:
    """The numbers in the gradients as dense real tensors: coalesced values of sparse ones, complex viewed as real."""
    if not any(gradient.layout is not torch.strided or gradient.is_complex() for gradient in gradients):
        return list(gradients)
    values = []
    for gradient in gradients:
        if gradient.layout is not torch.strided:
            gradient = gradient.coalesce().values()
        values.append(torch.view_as_real(gradient) if gradient.is_complex() else gradient)
    return values


def groups(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """The tensors by device and dtype, as the foreach kernels want them."""
    if _are_alike(tensors):
        return [list(tensors)]
    found: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        found.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    return list(found.values())


def _are_alike(tensors: Sequence[Tensor]) -> bool:
    """Whether all are of one device and dtype, which is the rule, and cheaper to see than to sort."""
    if not tensors:
        return False
    device, dtype = tensors[0].device, tensors[0].dtype
    return all(tensor.dtype is dtype and tensor.device == device for tensor in tensors)


def norm(gradients: Sequence[Tensor], order: float = 2.0) -> Number:
    """The norm of all gradients as one vector, in float32 or wider: of order 2, any other, or infinity (the largest
    absolute value)."""
    norms: list[Tensor] = []
    for same in groups(plain(gradients)):
        wide = [tensor.float() for tensor in same] if same[0].dtype in (torch.bfloat16, torch.float16) else same
        if order == math.inf:
            wide = [tensor for tensor in wide if tensor.numel()]  # torch refuses to take the largest of nothing
        norms.extend(torch._foreach_norm(wide, order) if wide else ())
    if not norms:
        return 0.0
    device = next((one.device for one in norms if one.device.type not in FREE_READS), None)
    if device is not None:
        return joined([one.to(device, torch.float64) for one in norms], order)
    if len(norms) <= _FEW and order == 2.0:
        return math.hypot(*(one.item() for one in norms))
    return float(joined([one.double() for one in norms], order))


def each(tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """The 2-norm of each tensor by its name, in float32 or wider; one read for each device and dtype."""
    names = {id(tensor): name for name, tensor in tensors.items()}
    found: dict[str, float] = {}
    for same in groups(list(tensors.values())):
        dense = [tensor.detach() for tensor in plain(same)]
        wide = [tensor.float() for tensor in dense] if dense and dense[0].itemsize < 4 else dense
        values = torch.stack(torch._foreach_norm(wide, 2)).tolist() if wide else []
        found.update(zip((names[id(tensor)] for tensor in same), values, strict=True))
    return {name: found[name] for name in tensors}


def joined(norms: Sequence[Number], order: float) -> Number:
    """The norm of vectors laid end to end, out of their norms: numbers, or 0-dim tensors of one device and dtype."""
    tensors = [one for one in norms if isinstance(one, Tensor)]
    if not tensors:
        return float(torch.linalg.vector_norm(torch.tensor(norms, dtype=torch.float64), order)) if norms else 0.0
    whole: Tensor = torch.linalg.vector_norm(
        torch.stack([one if isinstance(one, Tensor) else tensors[0].new_tensor(one) for one in norms]), order
    )
    return whole


def nonfinite(tensors: Sequence[Tensor], found: Tensor, one: Tensor) -> None:
    """Set `found` (float32, 0-dim) to exactly 1.0 where any number in the tensors is infinite or NaN."""
    for same in groups(plain(tensors)):
        kernels.check_and_scale(same, found, one)


def scale(gradients: Sequence[Tensor], factor: Number) -> None:
    """Multiply all gradients in place, in one pass. Sparse ones must be coalesced, and stay so."""
    for same in groups(plain(gradients)):  # multiplied itself, a sparse tensor would not count as coalesced any more
        torch._foreach_mul_(same, factor.to(same[0].device, same[0].dtype) if isinstance(factor, Tensor) else factor)


def clip_factor(norm: Number, largest: float) -> Number:
    """What to multiply the gradient with so that its norm is at most `largest`: min(1, largest / norm).

    Torch divides by norm + 1e-6; here the norm after clipping is the threshold itself.
    """
    if isinstance(norm, Tensor):
        return (largest / norm).clamp(max=1.0)
    return largest / norm if norm > largest else 1.0


def clip_value(gradients: Sequence[Tensor], largest: float) -> None:
    """Clamp each element (of a complex one: both parts) to ±largest, in place. Sparse ones must be coalesced."""
    for same in groups(plain(gradients)):
        torch._foreach_clamp_max_(same, largest)
        torch._foreach_clamp_min_(same, -largest)


def nonfinite_names(gradients: dict[str, Tensor]) -> list[str]:
    """The names of the gradients that hold an infinity or a NaN; reads each, so only once something is wrong."""
    return [
        name for name, gradient in gradients.items() if not all(bool(v.isfinite().all()) for v in plain([gradient]))
    ]
