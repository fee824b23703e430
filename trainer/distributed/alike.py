"""Whether ranks hold the same: parameters by digest, and any plain values. The first difference is named.

Ranks that have drifted apart train on without a word otherwise: it cost BLOOM-176B fifteen days before somebody saw it
(BigScience, chronicles of the 176B training, 2022).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from trainer.distributed.ranks import Ranks

_PIECE = 1 << 20
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def digest(tensor: Tensor) -> Tensor:
    """A 64-bit sum of the tensor's bits, each number weighed by its place; a 0-dim int64 tensor on its device.

    Any one number that differs changes it, and numbers that change places do. It is no cryptographic hash.
    """
    if tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    flat = tensor.detach().contiguous().view(-1)
    numbers = flat.view(_INTEGERS[flat.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for start in range(0, len(numbers), _PIECE):
        piece = numbers[start : start + _PIECE].to(torch.int64)
        place = torch.arange(start, start + len(piece), device=flat.device)
        total = total * 31 + (piece * (place * 2 + 0x9E3779B1)).sum()
    return total


def first_difference(ranks: Ranks, tensors: Mapping[str, Tensor]) -> tuple[str, list[int]] | None:
    """The first tensor that is not the same on all ranks, and the ranks where it differs from most; None: all are.

    All ranks come to the same answer. One read of the device and one exchange of 8 bytes for each tensor and rank.
    """
    digests = [digest(tensor) for tensor in tensors.values()]
    device = digests[0].device if digests else torch.device("cpu")
    here = torch.stack([one.to(device) for one in digests]).tolist() if digests else []
    return _unlike(ranks.gather([(name, number) for name, number in zip(tensors, here, strict=True)]))


def first_unlike(ranks: Ranks, values: Mapping[str, Any]) -> tuple[str, list[Any]] | None:
    """The first key whose value is not the same on all ranks, with each rank's value; None: all are.

    All ranks come to the same answer.
    """
    everyone = ranks.gather(dict(values))
    for name in dict.fromkeys(name for theirs in everyone for name in theirs):
        found = [theirs.get(name) for theirs in everyone]
        if any(repr(one) != repr(found[0]) for one in found):
            return name, found
    return None


def _unlike(everyone: list[list[tuple[str, int]]]) -> tuple[str, list[int]] | None:
    for place in range(max(len(theirs) for theirs in everyone)):
        found = [theirs[place] if place < len(theirs) else None for theirs in everyone]
        if any(one != found[0] for one in found):
            usual = max(found, key=found.count)
            name = next(one[0] for one in found if one is not None)
            return name, [rank for rank, one in enumerate(found) if one != usual]
    return None
