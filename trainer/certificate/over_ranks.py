"""The certificate of several processes: the reference is of all their rows, and the verdict is one for all.

Every rank measures the same things in the same order, as the path in each measurement asks the others: so whatever
decides what is measured next is agreed on.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trainer.certificate.batches import mapped
from trainer.certificate.certificate import Finding
from trainer.distributed.ranks import Ranks

SETTING = "distributed"


def of_all(ranks: Ranks, window: Sequence[Any], device: torch.device) -> list[Any]:
    """The micro-batches of every rank, in the order of ranks."""
    if ranks.world_size == 1:
        return list(window)
    sent = [mapped(one, lambda tensor: tensor.detach().cpu()) for one in window]
    return [mapped(one, lambda tensor: tensor.to(device)) for own in ranks.gather(sent) for one in own]


def every(ranks: Ranks, holds: bool) -> bool:
    """Whether it holds on every rank."""
    return holds if ranks.world_size == 1 else all(ranks.gather(holds))


def replicas(ranks: Ranks, parameters: Mapping[str, Tensor]) -> Finding | None:
    """The first parameter that is not the same on every rank."""
    if ranks.world_size == 1:
        return None
    found = ranks.gather({name: _digest(parameter) for name, parameter in parameters.items()})
    for name, own in found[0].items():
        for rank, other in enumerate(found):
            if other.get(name) != own:
                reason = f"the parameter '{name}' of rank {rank} is not that of rank 0: they train two models."
                return Finding("ranks", SETTING, name.rpartition(".")[0], reason, 1.0)
    return None


def told_otherwise(ranks: Ranks, told: Sequence[Mapping[str, float]], error: float) -> Finding | None:
    """The rank whose objective weighs the same micro-batches otherwise than those of most ranks do."""
    if ranks.world_size == 1:
        return None
    found = ranks.gather([sum(weights.values()) for weights in told])
    usual = max(found, key=lambda one: (found.count(one), -found.index(one)))
    for rank, own in enumerate(found):
        if own != usual:
            has, wants = (", ".join(f"{weight:.4g}" for weight in one) for one in (own, usual))
            reason = (
                f"rank {rank} counts the window's micro-batches {has} where rank {found.index(usual)} counts {wants}."
            )
            return Finding("ranks", SETTING, "objective", reason, error)
    return None


def agreed(ranks: Ranks, findings: Sequence[Finding]) -> list[Finding]:
    """What any rank has found, each once."""
    if ranks.world_size == 1:
        return list(findings)
    return list(dict.fromkeys(one for own in ranks.gather(list(findings)) for one in own))


def _digest(parameter: Tensor) -> str:
    held = parameter.detach().cpu().contiguous()
    return hashlib.sha256(held.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
