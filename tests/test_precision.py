"""Precision of forward: float32, bfloat16 by autocast, float64."""

import pytest
import torch
from reference import cut, farthest, mlp, rows
from torch import Tensor, nn

from trainer import ConfigError, Step
from trainer.gradient.precision import autocast, check_precision, width
from trainer.optim import Manual


def test_bf16_multiplies_in_bfloat16_and_keeps_parameters_and_gradients_in_float32() -> None:
    model = mlp(torch.float32)
    seen = []

    def objective(m: nn.Module, b: tuple[Tensor, Tensor]) -> Tensor:
        outputs = m(b[0])
        seen.append(outputs.dtype)
        return (outputs.float() - b[1]).square().mean()

    data = rows(8, torch.float32)
    Step(model, objective, Manual(model.parameters(), lr=0.0), precision="bf16")(cut(data, [4, 4]))
    assert seen == [torch.bfloat16] * 2
    assert not torch.is_autocast_enabled("cpu")
    assert all(p.dtype is p.grad.dtype is torch.float32 for p in model.parameters())
    narrow = {name: parameter.grad for name, parameter in model.named_parameters()}
    wide = mlp(torch.float32)
    objective(wide, data).backward()
    assert seen[-1] is torch.float32
    apart = farthest(narrow, {name: parameter.grad for name, parameter in wide.named_parameters()})
    assert 1e-6 < apart < 5e-2  # it took part, and it is the same gradient


def test_fp64_is_refused_where_a_parameter_is_narrower() -> None:
    model = nn.Sequential(nn.Linear(2, 2).double(), nn.Linear(2, 2))
    with pytest.raises(
        ConfigError, match=r"precision=fp64, but the parameter '1.weight' is float32: .*model.double\(\)"
    ):
        Step(model, lambda m, x: m(x).mean(), Manual(model.parameters()), precision="fp64")
    check_precision("fp64", dict(mlp().named_parameters()))
    check_precision("fp64", {"z": torch.ones(1, dtype=torch.complex128)})
    check_precision("fp32", dict(model.named_parameters()))


def test_only_bf16_has_a_context_and_only_fp64_widens_inputs() -> None:
    assert [autocast(precision, "cpu") is not None for precision in ("fp32", "bf16", "fp64")] == [False, True, False]
    assert [width(precision) for precision in ("fp32", "bf16", "fp64")] == [None, None, torch.float64]
