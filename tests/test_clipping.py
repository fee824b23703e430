"""Clipping as the step does it: by norm of any order, by value, by unit, by parameter group."""

import itertools
import math
from typing import Any

import pytest
import torch
from reference import cut, mlp, norm_of, rows, window_gradient
from torch import Tensor, nn

from trainer import ConfigError, Report, Step, supervised
from trainer.optim import Manual, adamw, parameter_groups, sgd

MSE = supervised(nn.MSELoss())
ORDERS = [0.5, 1.0, 2.0, 3.0, math.inf]
THRESHOLDS = torch.logspace(-4, 2, 13, dtype=torch.float64).tolist()
WINDOW = cut(rows(7), [4, 3])


def moved(groups: Any = None, make: Any = Manual, lr: float = 1.0, **toggles: Any) -> tuple[dict[str, Tensor], Report]:
    """What one step of plain descent at rate 1 took off each parameter: the gradient as it reached the optimizer."""
    model = mlp()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = make(model.parameters() if groups is None else parameter_groups(model, groups), lr=lr)
    report = Step(model, MSE, optimizer, **toggles)(WINDOW, norms=True)
    return {name: before[name] - parameter.detach() for name, parameter in model.named_parameters()}, report


def joined(gradient: dict[str, Tensor], names: Any = None) -> Tensor:
    return torch.cat([value.flatten() for name, value in gradient.items() if names is None or name in names])


TRUE = window_gradient(mlp(), WINDOW, "mean")
NAMES = list(TRUE)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("make", [Manual, torch.optim.SGD, lambda p, lr: torch.optim.SGD(p, lr=lr, fused=True)])
def test_the_norm_of_any_order_is_clipped_to_the_threshold_and_below_it_nothing_happens(
    order: float, make: Any
) -> None:
    whole = joined(TRUE).norm(order).item()
    for threshold in [*THRESHOLDS, whole * 1.0001]:
        gradient, report = moved(make=make, clip_norm=threshold, norm_order=order)
        assert report.grad_norm == pytest.approx(whole, rel=1e-9)
        assert joined(gradient).norm(order).item() == pytest.approx(min(whole, threshold), rel=1e-9)
        assert report.grad_norm_after == pytest.approx(min(whole, threshold), rel=1e-9)
        assert (report.clip_factor == 1.0) == (threshold >= whole)
        torch.testing.assert_close(joined(gradient), joined(TRUE) * min(1.0, threshold / whole), rtol=1e-7, atol=1e-12)


def test_without_a_clip_before_and_after_are_one_and_nobody_asked_means_none() -> None:
    _, report = moved()
    assert report.grad_norm == report.grad_norm_after == pytest.approx(norm_of(TRUE))
    assert (report.clip_factor, report.group_norms, report.group_clip_factors) == (None, {}, {})
    model = mlp()
    report = Step(model, MSE, Manual(model.parameters()))(WINDOW)
    assert (report.grad_norm, report.grad_norm_after) == (None, None)


def test_by_value_the_norm_after_is_that_of_what_reached_the_optimizer() -> None:
    for threshold in THRESHOLDS:
        gradient, report = moved(clip_value=threshold)
        torch.testing.assert_close(joined(gradient), joined(TRUE).clamp(-threshold, threshold))
        assert report.grad_norm == pytest.approx(norm_of(TRUE))
        assert report.grad_norm_after == pytest.approx(joined(gradient).norm().item())


@pytest.mark.parametrize("order", [1.0, 2.0, math.inf])
def test_each_group_is_clipped_by_its_own_norm_and_the_toggle_bounds_the_others(order: float) -> None:
    first, second, others = NAMES[:2], NAMES[2:3], NAMES[3:]
    for one, two, rest in itertools.product((1e-3, 0.1, 1e3), repeat=3):
        groups = [{"match": first, "clip_norm": one}, {"match": second, "clip_norm": two}]
        gradient, report = moved(groups, clip_norm=rest, norm_order=order)
        for key, names, threshold in (("1", first, one), ("2", second, two), ("others", others, rest)):
            whole = joined(TRUE, names).norm(order).item()
            assert joined(gradient, names).norm(order).item() == pytest.approx(min(threshold, whole), rel=1e-9)
            assert report.group_norms[key] == pytest.approx(whole)
            assert report.group_clip_factors[key] == pytest.approx(min(1.0, threshold / whole))
        assert report.grad_norm == pytest.approx(joined(TRUE).norm(order).item())
        assert report.grad_norm_after == pytest.approx(joined(gradient).norm(order).item())
        assert report.clip_factor is None


def test_a_group_may_be_bounded_in_another_way_than_the_others_or_not_at_all() -> None:
    groups = [{"match": NAMES[0], "clip_value": 0.01}, {"match": NAMES[1], "clip_norm": None}, {"match": NAMES[2:]}]
    gradient, report = moved(groups, clip_norm=0.02)
    assert gradient[NAMES[0]].abs().max() == pytest.approx(0.01)
    torch.testing.assert_close(gradient[NAMES[1]], TRUE[NAMES[1]])
    assert joined(gradient, NAMES[2:]).norm() == pytest.approx(0.02)
    assert list(report.group_norms) == ["others"]
    gradient, report = moved([{"match": NAMES[0], "clip_adaptive": 1e-3}])
    parameter = dict(mlp().named_parameters())[NAMES[0]]
    torch.testing.assert_close(gradient[NAMES[0]].norm(dim=1), 1e-3 * parameter.detach().norm(dim=1))
    torch.testing.assert_close(joined(gradient, NAMES[1:]), joined(TRUE, NAMES[1:]))
    assert report.group_norms == {}


def test_groups_of_several_optimizers_have_one_numbering() -> None:
    model = mlp()
    parameters = list(model.parameters())
    optimizers = [
        torch.optim.SGD([{"params": parameters[:2], "clip_norm": 0.01}], lr=1.0),
        torch.optim.SGD([{"params": parameters[2:4]}, {"params": parameters[4:], "clip_norm": 1e9}], lr=1.0),
    ]
    report = Step(model, MSE, optimizers)(WINDOW)
    assert list(report.group_norms) == ["0", "2"]
    assert report.group_clip_factors["0"] < 1.0 == report.group_clip_factors["2"]
    assert report.grad_norm == pytest.approx(norm_of(TRUE))


def test_a_group_that_joins_later_or_comes_with_a_checkpoint_counts() -> None:
    model = mlp()
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters[:2], lr=0.0)
    step = Step(model, MSE, optimizer)
    assert step(WINDOW, norms=True).group_norms == {}
    optimizer.add_param_group({"params": parameters[2:], "clip_norm": 0.01})
    assert list(step(WINDOW).group_norms) == ["1"]
    state = optimizer.state_dict()
    state["param_groups"][1]["clip_norm"] = 0.02
    optimizer.load_state_dict(state)
    assert step(WINDOW).grad_norm_after == pytest.approx(math.hypot(0.02, joined(TRUE, NAMES[:2]).norm()), rel=1e-6)
    state["param_groups"][1].pop("clip_norm")
    optimizer.load_state_dict(state)
    assert step(WINDOW).grad_norm is None


@pytest.mark.parametrize("make", [adamw, sgd, Manual])
def test_our_optimizers_know_the_three_options_and_still_refuse_others(make: Any) -> None:
    for option in ("clip_norm", "clip_value", "clip_adaptive"):
        make(parameter_groups(mlp(), [{"match": "biases", option: 0.5}]))
    with pytest.raises(ConfigError, match="has no option 'clip_nrm'"):
        make(parameter_groups(mlp(), [{"match": "biases", "clip_nrm": 0.5}]))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"clip_norm": -1.0}, "parameter group 1: clip_norm=-1.0 is not possible"),
        ({"clip_value": math.inf}, "parameter group 1: clip_value=inf is not possible"),
        ({"clip_adaptive": True}, "parameter group 1: clip_adaptive=True is not possible"),
        ({"clip_norm": 1.0, "clip_value": 1.0}, "parameter group 1 has clip_norm and clip_value: choose one"),
    ],
)
def test_a_bound_that_is_not_possible_is_refused_when_the_step_is_made(options: dict[str, Any], sentence: str) -> None:
    model = mlp()
    with pytest.raises(ConfigError, match=sentence):
        Step(model, MSE, sgd(parameter_groups(model, [{"match": "biases", **options}])))


@pytest.mark.parametrize("toggles", [{"clip_norm": 0.05}, {"clip_value": 0.01}, {"clip_adaptive": 0.01}, {}])
def test_under_never_the_next_window_adds_to_what_was_clipped(toggles: dict[str, float]) -> None:
    groups = None if toggles else [{"match": "biases", "clip_norm": 0.01}]
    model = mlp()
    optimizer = Manual(model.parameters() if groups is None else parameter_groups(model, groups), lr=0.0)
    step = Step(model, MSE, optimizer, zero_grad="never", **toggles)
    parameters = dict(model.named_parameters())
    standing = {name: torch.zeros_like(value) for name, value in TRUE.items()}
    for _ in range(3):
        report = step(WINDOW, norms=True)
        expected = {name: standing[name] + TRUE[name] for name in TRUE}
        assert report.grad_norm == pytest.approx(norm_of(expected), rel=1e-9)
        if "clip_norm" in toggles:
            expected = {name: value * min(1.0, 0.05 / norm_of(expected)) for name, value in expected.items()}
        elif "clip_value" in toggles:
            expected = {name: value.clamp(-0.01, 0.01) for name, value in expected.items()}
        elif "clip_adaptive" in toggles:
            for name, value in expected.items():
                dims = tuple(range(1, value.dim())) or None
                limit = 0.01 * parameters[name].detach().norm(dim=dims, keepdim=bool(dims))
                expected[name] = value * (limit / value.norm(dim=dims, keepdim=bool(dims))).clamp(max=1.0)
        else:
            biases = [name for name in expected if name.endswith("bias")]
            factor = min(1.0, 0.01 / joined(expected, biases).norm().item())
            expected |= {name: expected[name] * factor for name in biases}
        for name, parameter in parameters.items():
            torch.testing.assert_close(parameter.grad, expected[name])
        assert report.grad_norm_after == pytest.approx(norm_of(expected), rel=1e-9)
        standing = expected


def test_a_finite_gradient_whose_group_norm_overflows_is_a_skip_and_not_zeros() -> None:
    for number, skipped in ((1e18, False), (1e30, True)):
        model = nn.Linear(2, 1)
        before = model.weight.detach().clone()
        optimizer = torch.optim.SGD([{"params": [model.weight], "clip_norm": 1.0}, {"params": [model.bias]}], lr=1.0)
        report = Step(model, lambda m, x: m(x).sum(), optimizer, reduction="sum")([torch.full((2, 2), number)])
        assert report.skipped == skipped
        if skipped:
            assert report.reason == "the gradient is finite, but too large for its norm"
            assert report.grad_norm_after is None and torch.equal(before, model.weight)
        else:
            assert (before - model.weight).norm().item() == pytest.approx(1.0)


def test_sparse_complex_and_mixed_gradients_are_clipped_alike() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.table = nn.Embedding(6, 3, sparse=True)
            self.turn = nn.Parameter(torch.randn(3, dtype=torch.complex64))
            self.wide = nn.Parameter(torch.randn(3, dtype=torch.float64))
            self.narrow = nn.Parameter(torch.randn(3).bfloat16())

        def forward(self, words: Tensor) -> Tensor:
            turned = (self.table(words) * self.turn).abs() * self.wide
            return turned.float() * self.narrow.float()

    words = torch.tensor([[0, 2], [2, 5]])
    for toggles in ({"clip_norm": 0.1}, {"clip_value": 0.01}, {"clip_adaptive": 0.001}, {"norm_order": math.inf}):
        model = Mixed()
        step = Step(model, lambda m, b: m(b).square().mean(), torch.optim.SGD(model.parameters(), lr=0.0), **toggles)
        report = step([words, words], norms=True)
        gradients = [p.grad.coalesce().values() if p.grad.is_sparse else p.grad for p in model.parameters()]
        parts = [torch.view_as_real(g).flatten() if g.is_complex() else g.flatten() for g in gradients]
        after = torch.cat([part.double() for part in parts]).norm(toggles.get("norm_order", 2.0)).item()
        assert report.grad_norm_after == pytest.approx(after, rel=1e-2 if "clip_value" in toggles else 1e-3)
        assert report.grad_norm > report.grad_norm_after or "norm_order" in toggles
