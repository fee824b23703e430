"""The order of rows: a pure function of (seed, epoch, position), so that a resumed run needs no replay."""

import torch
from torch import Tensor

_MASK = (1 << 64) - 1


def mixed(*numbers: int) -> int:
    """One 63-bit seed out of several numbers, far apart for neighbouring ones (splitmix64; Steele et al. 2014)."""
    state = 0
    for number in numbers:
        state = (state + (number & _MASK) + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state >> 1


def order(seed: int, epoch: int, position: int, rows: int, shuffle: bool = True) -> Tensor:
    """The rows of an epoch from `position` on.

    Args:
        seed: of the run.
        epoch: counted from 0.
        position: how many rows of the epoch lie behind.
        rows: rows of the whole data.
        shuffle: whether each epoch has an order of its own, or all have the data's.

    Returns:
        int64 row numbers of shape (rows - position,).
    """
    if not shuffle:
        return torch.arange(position, rows)
    permutation = torch.randperm(rows, generator=torch.Generator().manual_seed(mixed(seed, epoch)))
    return permutation[position:] if position else permutation


def cut_rows(
    rows: int, used: int, batch_size: int, shuffle: bool, seed: int, epoch: int, position: int
) -> tuple[Tensor, ...]:
    """The rows of each micro-batch of an epoch from the micro-batch `position` on; `used` of them come in an epoch."""
    start = position * batch_size
    if start >= used:
        return ()
    own: tuple[Tensor, ...] = order(seed, epoch, start, rows, shuffle)[: used - start].split(batch_size)
    return own
