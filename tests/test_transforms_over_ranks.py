"""Transforms and clips on two ranks: every rank comes to the same, which is what one process comes to."""

import pytest
import torch
from ranks import over_ranks
from reference import differing, mlp, rows, state_of
from torch import Tensor, nn

from trainer import Report, Step, supervised
from trainer.distributed import ManyProcesses
from trainer.gradient.transforms import centralise, freeze, noise
from trainer.optim import adamw, parameter_groups

TOGGLES = {
    "adaptive": {"clip_adaptive": 0.01},
    "groups": {"clip_norm": 0.05},
    "transforms": {"clip_norm": 0.5},
}


def trained(ranks: ManyProcesses | None, part: slice, kind: str) -> tuple[dict[str, Tensor], list[tuple[object, ...]]]:
    model = mlp()
    groups = [{"match": "biases", "clip_norm": 0.01}] if kind == "groups" else []
    shaping = [noise(0.05, seed=4), centralise(), freeze("0.*", until=2)] if kind == "transforms" else []
    optimizer = adamw(parameter_groups(model, groups), lr=0.01)
    step = Step(model, supervised(nn.MSELoss()), optimizer, ranks=ranks, transforms=shaping, **TOGGLES[kind])
    told = []
    for seed in range(4):
        inputs, targets = rows(12, seed=seed)
        report: Report = step([(inputs[part], targets[part])], norms=True)
        told.append((report.grad_norm, report.grad_norm_after, report.group_norms, report.divisor, report.rows))
        assert report.reductions == (0 if ranks is None else 1) and report.backward_calls == 1
    return state_of(model, optimizer), told


def dealt(rank: int, world: int, parts: list[slice], kind: str) -> tuple[dict[str, Tensor], list[tuple[object, ...]]]:
    return trained(ManyProcesses(), parts[rank], kind)


@pytest.mark.parametrize("kind", TOGGLES)
def test_two_ranks_come_to_what_one_comes_to(kind: str) -> None:
    left, right = over_ranks(dealt, [slice(0, 5), slice(5, 12)], kind)
    assert differing(left[0], right[0]) == [] and left[1] == right[1]
    alone, told = trained(None, slice(0, 12), kind)
    for name, value in alone.items():
        torch.testing.assert_close(left[0][name], value, rtol=1e-9, atol=1e-12)
    for one, other in zip(left[1], told, strict=True):
        assert list(one) == [pytest.approx(fact, rel=1e-9) for fact in other]
