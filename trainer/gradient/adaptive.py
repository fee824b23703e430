"""Adaptive gradient clipping: each unit's gradient is bounded by its own parameters.

Brock, De, Smith and Simonyan 2021, "High-Performance Large-Scale Image Recognition Without Normalization", equation 3.
A unit is what has one index in the first dimension: the incoming weights of one output. Vectors and scalars (biases,
gains) are one unit each.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from trainer.errors import GradientError

SMALLEST = 1e-3
"""What a unit's norm counts at least, so that parameters that start at zero can move (the paper's epsilon)."""


def clip_adaptive(
    gradients: Mapping[str, Tensor], parameters: Mapping[str, Tensor], largest: float, smallest: float = SMALLEST
) -> None:
    """Scale each unit's gradient in place: to a 2-norm of at most `largest` × max(its parameters' norm, `smallest`).

    Sparse gradients must be coalesced; of them, the rows that are there are units. Nothing is read from a device.

    Raises GradientError for a gradient that is sparse in more than its rows.
    """
    changed, limits, norms = [], [], []
    for name, gradient in gradients.items():
        parameter = parameters[name].detach()
        if gradient.layout is not torch.strided:
            if gradient.layout is not torch.sparse_coo or gradient.sparse_dim() != 1:
                raise GradientError(
                    f"clip_adaptive: the gradient of '{name}' is sparse in other dimensions than its first, where "
                    "units are: clip it by norm, or leave its group out with clip_adaptive: null."
                )
            parameter = parameter.index_select(0, gradient.indices()[0])
            gradient = gradient.values()
            if gradient.dim() == 1:  # a sparse vector: as elsewhere one unit, with all of its parameters
                parameter = parameters[name].detach()
        if gradient.numel():
            changed.append(torch.view_as_real(gradient) if gradient.is_complex() else gradient)
            limits.append(unit_norms(parameter))
            norms.append(unit_norms(gradient))
            if gradient.is_complex() and limits[-1].dim():
                limits[-1], norms[-1] = limits[-1].unsqueeze(-1), norms[-1].unsqueeze(-1)
    if changed:
        torch._foreach_clamp_min_(limits, smallest)
        torch._foreach_mul_(limits, largest)
        torch._foreach_div_(limits, norms)  # a unit without a gradient gives infinity, which the next line makes 1
        torch._foreach_clamp_max_(limits, 1.0)
        torch._foreach_mul_(changed, limits)


def unit_norms(tensor: Tensor) -> Tensor:
    """The 2-norm of each unit in float32 or wider, of a shape that multiplies the tensor."""
    wide = torch.float32 if tensor.dtype in (torch.bfloat16, torch.float16) else None
    if sum(size > 1 for size in tensor.shape) <= 1:
        norms: Tensor = torch.linalg.vector_norm(tensor, dtype=wide)
    else:
        norms = torch.linalg.vector_norm(tensor, dim=tuple(range(1, tensor.dim())), keepdim=True, dtype=wide)
    return norms
