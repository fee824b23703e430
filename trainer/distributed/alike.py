"""Whether ranks hold the same: parameters by digest, and any plain values. The first difference is named.

Ranks that have drifted apart train on without a word otherwise: it cost BLOOM-176B fifteen days before somebody saw it
(BigScience, chronicles of the 176B training, 2022).
"""

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from trainer.distributed.ranks import Ranks

# Numbers of 8 bytes that are weighed at a time.
_PIECE = 1 << 18


@functools.cache
def _places(device: torch.device) -> Tensor:
    """An odd weight for each place in a piece."""
    return torch.arange(_PIECE, dtype=torch.int64, device=device) * 2 + 0x9E3779B1


@torch.no_grad()
def digest(tensor: Tensor) -> Tensor:
    """A 64-bit sum of the tensor's bytes, eight at a time, each weighed by its place; a 0-dim int64 tensor where it is.

    Any one number that differs changes it, and numbers that change places do. It is no cryptographic hash.
    """
    if tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    flat = tensor.detach().contiguous().view(-1)
    if flat.storage_offset() * flat.element_size() % 8:
        flat = flat.clone()
    size = flat.numel() * flat.element_size()
    data = flat.view(torch.uint8)
    whole, rest = data[: size - size % 8].view(torch.int64), data[size - size % 8 :].to(torch.int64)
    total = (rest * _places(flat.device)[: len(rest)]).sum()
    for piece in whole.split(_PIECE):
        total = total * 31 + (piece * _places(flat.device)[: len(piece)]).sum()
    return total


def first_difference(ranks: Ranks, tensors: Mapping[str, Tensor]) -> tuple[str, list[int]] | None:
    """The first tensor that is not the same on all ranks, and the ranks where it differs from most; None: all are.

    All ranks come to the same answer. One read of the device and one exchange of 8 bytes for each tensor and rank.
    """
    return _unlike(ranks.gather(list(zip(tensors, _digests(tensors), strict=True))))


def unlike_the_first(ranks: Ranks, tensors: Mapping[str, Tensor]) -> set[str]:
    """Which of this rank's tensors are not what the first rank has under their names. Called by every rank."""
    here = dict(zip(tensors, _digests(tensors), strict=True))
    first = ranks.gather(here)[0]
    return {name for name, number in here.items() if first.get(name) != number}


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


def _digests(tensors: Mapping[str, Tensor]) -> list[int]:
    digests = [digest(tensor) for tensor in tensors.values()]
    return torch.stack([one.to(digests[0].device) for one in digests]).tolist() if digests else []


def _unlike(everyone: list[list[tuple[str, int]]]) -> tuple[str, list[int]] | None:
    for place in range(max(len(theirs) for theirs in everyone)):
        found = [theirs[place] if place < len(theirs) else None for theirs in everyone]
        if any(one != found[0] for one in found):
            usual = max(found, key=found.count)
            name = next(one[0] for one in found if one is not None)
            return name, [rank for rank, one in enumerate(found) if one != usual]
    return None
