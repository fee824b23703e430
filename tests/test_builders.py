"""The optimizers that a config names: torch's own, fused where they can be."""

import inspect
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW

import trainer.optim
from trainer import kernels
from trainer.errors import ConfigError
from trainer.optim import Manual, adamw, parameter_groups, sgd
from trainer.optim.builders import fit_for_fused
from trainer.optim.update import Update, could_be_fused, is_fused


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(3, 2, dtype=dtype)), nn.Parameter(torch.ones(2, dtype=dtype))]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sgd_of_narrow_parameters_on_the_cpu_is_not_fused(dtype: torch.dtype) -> None:
    """Its kernel would move only what is left over after whole vectors; here all of 100 numbers move."""
    parameter = nn.Parameter(torch.ones(100, dtype=dtype))
    optimizer = sgd([parameter], lr=0.5)
    assert not is_fused(optimizer)
    assert not could_be_fused(optimizer)
    for fused in (False, True):
        optimizer.param_groups[0]["fused"] = fused
        before = parameter.detach().clone()
        parameter.grad = torch.full_like(parameter, 0.5)
        Update(optimizer).apply(1.0)
        assert torch.equal(parameter, before - 0.25)
        assert is_fused(optimizer) == fused


@pytest.mark.parametrize(
    ("build", "dtype"),
    [
        *itertools.product([adamw, sgd, lambda p: sgd(p, momentum=0.9, nesterov=True)], [torch.float32, torch.float64]),
        (adamw, torch.bfloat16),
    ],
)
def test_what_is_built_is_fused(build: Callable[..., Any], dtype: torch.dtype) -> None:
    optimizer = build(parameters(dtype))
    assert is_fused(optimizer)
    assert not could_be_fused(optimizer)
    assert kernels.can_update_directly(optimizer)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert kernels.update_directly(optimizer, None)


def test_every_builder_of_the_room_is_fused_or_by_hand() -> None:
    """One that is added later is held to it as well."""
    builders = [getattr(trainer.optim, name) for name in trainer.optim.__all__]
    builders = [b for b in builders if inspect.isfunction(b) and "parameters" in inspect.signature(b).parameters]
    assert {builder.__name__ for builder in builders} >= {"adamw", "sgd"}
    assert all(is_fused(builder(parameters())) for builder in builders)
    assert not could_be_fused(Manual(parameters()))


def test_what_torch_cannot_fuse_is_built_all_the_same() -> None:
    for dtype in (torch.complex64,):
        optimizer = sgd([torch.ones(2, dtype=dtype, requires_grad=True)])
        assert not is_fused(optimizer)
        assert not could_be_fused(optimizer)
    mixed = adamw([*parameters(), torch.ones(2, dtype=torch.complex64, requires_grad=True)])
    assert not is_fused(mixed)
    assert fit_for_fused(SGD, parameters())
    assert not fit_for_fused(SGD, [torch.ones(2, dtype=torch.complex64)])
    assert not fit_for_fused(SGD, [torch.ones(2, device="meta")])


@pytest.mark.parametrize("as_groups", [False, True])
def test_adamw_is_torchs(as_groups: bool) -> None:
    found = []
    for build in (adamw, AdamW):
        torch.manual_seed(0)
        leaves = parameters()
        given: Any = [{"params": leaves[:1]}, {"params": leaves[1:], "lr": 0.5}] if as_groups else iter(leaves)
        options = {"lr": 0.01, "betas": (0.8, 0.9), "eps": 1e-5, "weight_decay": 0.2}
        optimizer = build(given, **options) if build is adamw else build(given, fused=True, **options)
        for _ in range(4):
            for leaf in leaves:
                leaf.grad = torch.randn_like(leaf)
            optimizer.step()
        found.append((leaves, optimizer))
    (mine, built), (theirs, public) = found
    assert type(built) is AdamW
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    assert built.defaults == public.defaults


def test_sgd_is_torchs() -> None:
    built = sgd(iter(parameters()), lr=0.3, momentum=0.9, weight_decay=0.1, nesterov=True)
    public = SGD(parameters(), lr=0.3, momentum=0.9, weight_decay=0.1, nesterov=True, fused=True)
    assert type(built) is SGD
    assert built.defaults == public.defaults


def test_defaults_are_torchs() -> None:
    assert adamw(parameters()).defaults == AdamW(parameters(), fused=True).defaults
    assert sgd(parameters(), lr=1e-3).defaults == SGD(parameters(), fused=True).defaults


def test_whole_numbers_of_a_config_become_floats() -> None:
    """A rate that is no float would keep the update off its direct path."""
    for optimizer in (
        adamw(parameters(), lr=1, betas=[0, 1 / 2], weight_decay=0),  # type: ignore[arg-type]
        sgd([{"params": parameters(), "lr": 1}], lr=1, momentum=0),
        Manual(parameters(), lr=1),
    ):
        assert all(type(group["lr"]) is float for group in optimizer.param_groups)
    betas = adamw(parameters(), betas=[0, 1 / 2]).param_groups[0]["betas"]  # type: ignore[arg-type]
    assert betas == (0.0, 0.5)
    assert all(type(beta) is float for beta in betas)


@pytest.mark.parametrize("build", [adamw, sgd])
def test_every_way_to_give_parameters(build: Callable[..., Any]) -> None:
    model = nn.Linear(3, 2)
    ways: list[Any] = [
        model.parameters(),
        list(model.parameters()),
        model.named_parameters(),
        [{"params": model.parameters()}],
        [{"params": model.named_parameters()}],
        [{"params": model.weight, "lr": 0.2}, {"params": model.bias}],
        ({"params": [p]} for p in model.parameters()),
    ]
    for way in ways:
        optimizer = build(way)
        held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        assert [id(p) for p in held] == [id(model.weight), id(model.bias)]
        assert is_fused(optimizer)
    with pytest.raises(ConfigError, match=r"one tensor instead of a list of parameters: write \[tensor\]\."):
        build(model.weight)


def test_groups_of_a_model() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    optimizer = adamw(parameter_groups(model, [{"match": ["norms", "biases"], "weight_decay": 0.0}]), weight_decay=0.1)
    assert is_fused(optimizer)
    assert [(len(group["params"]), group["weight_decay"]) for group in optimizer.param_groups] == [(1, 0.1), (3, 0.0)]
