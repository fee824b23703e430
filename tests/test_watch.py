"""Gradients over time: what vanished, exploded or stopped is said once; what is well is not mentioned."""

import math

import pytest
import torch
from torch import Tensor, nn

from trainer import Step
from trainer.diagnose.watch import Watch
from trainer.optim import sgd


def said_by(model: nn.Module, steps: int = 12, lr: float = 0.01, rows: Tensor | None = None) -> tuple[list[str], Watch]:
    torch.manual_seed(0)
    watch, said = Watch(), []
    step = Step(model, lambda m, x: m(x).square().mean(), sgd(model.parameters(), lr=lr))
    for _ in range(steps):
        report = step([torch.randn(8, 4) if rows is None else rows])
        said += watch.look(step.parameters.by_name, report)
    return said, watch


def test_a_deep_chain_of_sigmoids_has_vanishing_gradients() -> None:
    torch.manual_seed(0)
    layers = [layer for _ in range(12) for layer in (nn.Linear(4, 4), nn.Sigmoid())]
    said, watch = said_by(nn.Sequential(*layers))
    assert len(said) == 1
    assert said[0].startswith("the gradient of '0.weight'")
    assert "has vanished" in said[0]
    assert "at step 3" in said[0]
    ((word, line),) = watch.troubles()
    assert word == "vanishing"
    assert line.startswith("'0.weight', '2.weight'")
    assert "since step 3; " in line


@pytest.mark.parametrize("between", [nn.ReLU, nn.Tanh, nn.Identity])
def test_a_sound_net_is_not_mentioned(between: type[nn.Module]) -> None:
    torch.manual_seed(0)
    said, watch = said_by(nn.Sequential(nn.Linear(4, 16), between(), nn.Linear(16, 16), between(), nn.Linear(16, 2)))
    assert said == []
    assert len(watch.words()) == 1
    assert watch.words()[0].startswith("median norm ")
    assert watch.troubles() == []


def test_biases_that_have_no_gradient_by_design_are_not_mentioned() -> None:
    torch.manual_seed(0)
    said, _ = said_by(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)))
    assert said == []


def test_a_gradient_of_zero_is_called_so() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].bias.fill_(-1e3)  # every unit is dead
    said, _ = said_by(model)
    assert said == ["the gradient of '0.weight', '2.weight' is zero at step 3 and was so in the last 3 looks."]


def test_an_explosion_is_said_once() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    watch = Watch()
    step = Step(model, lambda m, x: m(x).square().mean(), sgd(model.parameters(), lr=1e-9))
    said = []
    for scale in (1, 1, 1, 1, 1000, 1000):
        said += watch.look(step.parameters.by_name, step([scale * torch.ones(2, 4)]))
    assert len(said) == 1
    assert said[0].startswith("the gradient exploded: its norm is")
    assert "at step 5" in said[0]
    assert watch.troubles() == [("exploding", "since step 5, up to 2.06e+06 where 3.16 was usual")]
    watch.look(step.parameters.by_name, step([torch.ones(2, 4)]))
    assert watch.troubles() == [("exploded", "at step 5, up to 2.06e+06 where 3.16 was usual; it came down again")]


def test_a_layer_that_no_gradient_reaches_any_more() -> None:
    class Early(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.count = nn.Linear(4, 1), nn.Linear(4, 1), 0

        def forward(self, x: Tensor) -> Tensor:
            self.count += 1
            return self.second(x) + (self.first(x) if self.count <= 2 else 0)

    said, watch = said_by(Early())
    assert len(said) == 1
    assert said[0].startswith("no gradient reaches 'first.")
    assert said[0].endswith("any more, at step 5; before, one did.")
    assert watch.troubles() == [("stopped", "no gradient reaches 'first.weight', 'first.bias' since step 5")]


def test_skips_are_not_looked_at() -> None:
    said, watch = said_by(nn.Linear(4, 1), rows=torch.full((2, 4), float("nan")))
    assert said == []
    assert watch.words() == []
    assert watch.troubles() == []


def test_a_layer_that_vanished_for_a_while_has_not_vanished_any_more() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].weight.register_hook(lambda gradient: gradient * factor[0])
    watch, factor, said = Watch(), [1.0], []
    step = Step(model, lambda m, x: m(x).square().mean(), sgd(model.parameters(), lr=0.0))
    for factor[0] in (1.0, 1e-7, 1e-7, 1e-7, 1e-7):
        said += watch.look(step.parameters.by_name, step([torch.ones(2, 4)]))
    assert [word for word, _ in watch.troubles()] == ["vanishing"]
    went_on = Watch()
    went_on.load_state_dict(watch.state_dict())
    assert went_on.troubles() == watch.troubles()
    factor[0] = 1.0
    for one in (watch, went_on):
        said += one.look(step.parameters.by_name, step([torch.ones(2, 4)]))
        assert one.troubles() == [("vanished", "'0.weight' for a while, from step 4 on")]
    assert len(said) == 1


def test_how_often_it_was_clipped() -> None:
    model = nn.Linear(4, 1)
    watch = Watch()
    step = Step(model, lambda m, x: m(x).square().mean(), sgd(model.parameters(), lr=0.0), clip_norm=1.0)
    for scale in (100.0, 1e-3, 100.0, 1e-3):
        watch.look(step.parameters.by_name, step([scale * torch.ones(2, 4)]))
    assert watch.words()[0].endswith(", clipped in 2 of the 4 steps looked at")
    for _ in range(6):
        watch.look(step.parameters.by_name, step([1e-3 * torch.ones(2, 4)]))
    assert watch.words()[0].endswith(", clipped in 2 of the 10 steps looked at (20%)")


def test_a_norm_that_is_not_finite_and_was_let_in_is_said_once_and_spoils_no_figure() -> None:
    model = nn.Linear(4, 1)
    watch, said = Watch(), []
    step = Step(model, lambda m, x: m(x).square().mean(), sgd(model.parameters(), lr=0.0), nonfinite="allow")
    for value in (1.0, math.nan, 1.0, math.inf):
        said += watch.look(step.parameters.by_name, step([torch.full((2, 4), value)]))
    assert said == ["the gradient's norm is nan at step 2, and the step was taken (gradient.nonfinite=allow)."]
    assert watch.troubles() == [("not finite", "the norm at step 2, and the step was taken")]
    assert "nan" not in watch.words()[0] and "inf" not in watch.words()[0]


def test_finite_gradients_that_are_too_large_for_a_norm_are_told() -> None:
    model = nn.Linear(4, 1)
    watch = Watch()
    step = Step(model, lambda m, x: m(x).square().mean(), sgd(model.parameters(), lr=0.0))
    said = watch.look(step.parameters.by_name, step([torch.full((2, 4), 1e18)]))
    assert said == [
        "the gradient's norm is inf at step 1, and the step was taken (gradient.clip_norm would have bounded it)."
    ]
