"""Which parameters have a gradient on any rank, and those whose gradient is sparse: these are summed one by one."""

import torch
from torch import Tensor

from trainer.distributed.ranks import Ranks
from trainer.errors import GradientError
from trainer.gradient.narrow import gradient_dtype


def marks(gradients: dict[str, Tensor], layout: list[str], world_size: int) -> list[float]:
    """What a rank sends for each name of the layout, to be summed: 1 for a dense gradient, more for a sparse one."""
    sparse = world_size + 1.0
    return [
        0.0 if name not in gradients else 1.0 if gradients[name].layout is torch.strided else sparse for name in layout
    ]


def present(summed: list[float], layout: list[str], world_size: int) -> tuple[set[str], set[str]]:
    """(parameters that any rank has a dense gradient of, those with a sparse one).

    Raises GradientError, on every rank, for one that is sparse here and dense there.
    """
    one = world_size + 1
    dense, sparse = set(), set()
    for name, count in zip(layout, summed, strict=True):
        if count >= one:
            sparse.add(name)
            if count % one:
                raise GradientError(f"the gradient of '{name}' is sparse on one rank and dense on another.")
        elif count:
            dense.add(name)
    return dense, sparse


def sum_sparse(ranks: Ranks, parameter: Tensor, gradient: Tensor | None) -> Tensor:
    """Σ over ranks of a sparse gradient; None counts as zeros. Raises GradientError on a device."""
    if parameter.device.type != "cpu":
        raise GradientError(
            "a gradient is sparse, and ranks on a device sum dense ones only: make the embedding with sparse=False."
        )
    if gradient is None:
        gradient = torch.sparse_coo_tensor(
            torch.zeros(1, 0, dtype=torch.int64),
            torch.zeros(0, *parameter.shape[1:], dtype=gradient_dtype(parameter)),
            parameter.shape,
            check_invariants=False,
        )
    summed = gradient.detach().coalesce()
    ranks.sum_later(summed)()
    return summed.coalesce()
