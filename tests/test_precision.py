"""Precision of forward: float32, bfloat16 and float16 by autocast, float64."""

import pytest
import torch
from reference import cut, farthest, mlp, rows
from torch import Tensor, nn

from trainer import ConfigError, Step
from trainer.gradient.precision import autocast, check_precision, slow_here, width
from trainer.optim import Manual


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_it_multiplies_narrow_and_keeps_parameters_and_gradients_in_float32(precision, dtype) -> None:
    model = mlp(torch.float32)
    seen = []

    def objective(m: nn.Module, b: tuple[Tensor, Tensor]) -> Tensor:
        outputs = m(b[0])
        seen.append(outputs.dtype)
        return (outputs.float() - b[1]).square().mean()

    data = rows(8, torch.float32)
    Step(model, objective, Manual(model.parameters(), lr=0.0), precision=precision, loss_scale=256.0)(cut(data, [4, 4]))
    assert seen == [dtype] * 2
    assert not torch.is_autocast_enabled("cpu")
    assert all(p.dtype is p.grad.dtype is torch.float32 for p in model.parameters())
    narrow = {name: parameter.grad for name, parameter in model.named_parameters()}
    wide = mlp(torch.float32)
    objective(wide, data).backward()
    assert seen[-1] is torch.float32
    apart = farthest(narrow, {name: parameter.grad for name, parameter in wide.named_parameters()})
    assert 1e-6 < apart < 5e-2, precision  # it took part, and it is the same gradient


def test_fp64_is_refused_where_a_parameter_is_narrower() -> None:
    model = nn.Sequential(nn.Linear(2, 2).double(), nn.Linear(2, 2))
    with pytest.raises(
        ConfigError, match=r"precision=fp64, but the parameter '1.weight' is float32: .*model.double\(\)"
    ):
        Step(model, lambda m, x: m(x).mean(), Manual(model.parameters()), precision="fp64")
    check_precision("fp64", dict(mlp().named_parameters()))
    with pytest.raises(ConfigError, match=r"precision=bf16_true, but .* '1.weight' is float32: .*model.bfloat16\(\)"):
        check_precision("bf16_true", {"1.weight": torch.ones(1)})
    check_precision("bf16_true", dict(model.bfloat16().named_parameters()))
    check_precision("fp64", {"z": torch.ones(1, dtype=torch.complex128)})
    check_precision("fp32", dict(model.named_parameters()))


def test_autocast_has_a_context_and_the_others_turn_inputs_into_their_dtype() -> None:
    every = ("fp32", "bf16", "bf16_true", "fp16", "fp64")
    assert [autocast(precision, "cpu") is not None for precision in every] == [False, True, False, True, False]
    assert [width(precision) for precision in every] == [None, None, torch.bfloat16, None, torch.float64]


def test_it_says_where_the_cpu_has_no_arithmetic_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for has, slow in (
        ((), ("bf16", "bf16_true", "fp16")),
        (("avx512_bf16",), ("fp16",)),
        (("bf16", "fp16_arith"), ()),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda has=has: {"avx2": True, **dict.fromkeys(has, True)})
        for precision in ("fp32", "bf16", "bf16_true", "fp16", "fp64"):
            said = slow_here(precision, "cpu")
            assert (said is not None) == (precision in slow)
            assert said is None or said.startswith(f"this CPU has no instructions for {precision}: it is slower here")
            assert slow_here(precision, "cuda") is None
