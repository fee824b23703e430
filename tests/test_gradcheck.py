"""Custom Functions and modules against difference quotients: what is wrong is named, and what is right is not."""

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from trainer import ConfigError, certify, supervised
from trainer.certificate.gradcheck import Checked, gradcheck
from trainer.certificate.lab import Lab
from trainer.certificate.reference import Asked

MSE = supervised(nn.MSELoss())


class Cube(Function):
    """x³ + y; its backward for x may be another's."""

    slope = 3.0

    @staticmethod
    def forward(ctx, x: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3 + y

    @staticmethod
    def backward(ctx, gradient: Tensor):
        (x,) = ctx.saved_tensors
        return gradient * Cube.slope * x**2, gradient


class Clipped(Function):
    """min(x, 2): right below 2, wrong above. Its context comes apart from its forward."""

    right = True

    @staticmethod
    def forward(x: Tensor, most: float) -> Tensor:
        return x.clamp(max=most)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.most = inputs[1]

    @staticmethod
    def backward(ctx, gradient: Tensor):
        (x,) = ctx.saved_tensors
        return (gradient * (x < ctx.most) if Clipped.right else gradient), None


class Rounded(Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient  # straight through


class Narrow(Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return torch.from_numpy(x.detach().numpy().astype("float32") * 2)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient * 2


KEPT = Cube.apply  # many keep it, so replacing apply would miss it


class Act(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def net(function) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), Act(function), nn.Linear(8, 2))


def window() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(5, 4, generator=generator) * 2, torch.randn(5, 2, generator=generator))]


def checked(function, modules=(), meant=()) -> Checked:
    model = function if isinstance(function, nn.Module) else net(function)
    return gradcheck(Lab(model, MSE, window(), dict(model.named_parameters()), Asked()), modules, meant)


def line_of(text: str) -> int:
    lines = Path(__file__).read_text(encoding="utf-8").splitlines()
    return next(number for number, line in enumerate(lines, 1) if text in line)


def cube(x: Tensor) -> Tensor:
    return KEPT(x, x * 0.5)


@pytest.mark.parametrize(
    "function", [cube, lambda x: Clipped.apply(x, 1.0), lambda x: checkpoint(cube, x, use_reentrant=False)]
)
def test_right_ones_pass_and_are_named(function) -> None:
    found = checked(function)
    assert found.findings == []
    (note,) = found.notes
    assert (
        note.startswith("gradcheck")
        and "passed" in note
        and ("Cube" in note or "Clipped" in note)
        and "keeps 6% of rounding" in note
    )


def test_a_wrong_backward_is_named_with_its_line_its_input_and_both_numbers(monkeypatch) -> None:
    monkeypatch.setattr(Cube, "slope", 2.0)
    certificate = certify(net(cube), MSE, data=window())
    (finding,) = certificate.findings
    assert (finding.kind, finding.setting, finding.module) == ("function", None, "1")
    assert finding.error == pytest.approx(1 / 3, rel=1e-3)
    assert (
        f"Cube.backward (tests/test_gradcheck.py:{line_of('def backward(ctx, gradient: Tensor):')})" in finding.reason
    )
    found = re.search(
        r"is not the derivative of its forward: for element (\d+) of 'x' \((\S+)\) and output (\d+), "
        r"backward gives (\S+) and the difference quotient (\S+); if",
        finding.reason,
    )
    assert found is not None and found[1] == found[3]
    value, analytical, numerical = (float(found[i]) for i in (2, 4, 5))
    assert (analytical, numerical) == (pytest.approx(2 * value**2, rel=1e-2), pytest.approx(3 * value**2, rel=1e-2))
    assert "WRONG GRADIENT: a backward in module '1': Cube.backward" in certificate.verdict()
    assert certify(net(cube), MSE, data=window(), meant=["Cube"]).passed
    assert certify(net(cube), MSE, data=window(), gradcheck=None).passed


def test_a_backward_that_is_wrong_in_one_region_only_is_found_there(monkeypatch) -> None:
    monkeypatch.setattr(Clipped, "right", False)
    (finding,) = checked(lambda x: Clipped.apply(x, 1.5)).findings
    assert float(re.search(r"of 'x' \((\S+)\)", finding.reason)[1]) > 1.5
    assert "backward gives 1 and the difference quotient 0;" in finding.reason


def test_a_kink_is_no_mistake() -> None:
    from trainer.recipes.custom_relu import ReLU

    found = checked(lambda x: ReLU.apply(x * 0.0 + x.relu()))  # half of what it meets is exactly zero
    assert found.findings == []
    assert any("ReLU.backward" in note and "lies on a kink" in note for note in found.notes)


def test_a_straight_through_estimator_is_wrong_until_it_is_meant() -> None:
    found = checked(Rounded.apply)
    assert "say --meant Rounded." in found.findings[0].reason
    found = checked(Rounded.apply, meant=["Rounded"])
    assert found.findings == [] and any("Rounded is not the derivative" in note for note in found.notes)
    with pytest.raises(ConfigError, match="forward calls no Function 'Round': did you mean 'Rounded'"):
        checked(Rounded.apply, meant=["Round"])


def test_what_does_not_run_in_float64_is_said_and_left() -> None:
    found = checked(Narrow.apply)
    assert found.findings == []
    assert any("Narrow.backward" in note and note.endswith("it is not checked.") for note in found.notes)


class Square(nn.Module):
    """A module with a parameter, dropout and a buffer that it changes; its gradient may be cut."""

    def __init__(self, cut: bool) -> None:
        super().__init__()
        self.cut = cut
        self.scale = nn.Parameter(torch.linspace(0.5, 2.0, 8))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1.0
        scale = self.scale * 0.5 + self.scale.detach() * 0.5 if self.cut else self.scale
        return F.dropout(x.square() * scale, 0.3, training=True) + self.calls * x


@pytest.mark.parametrize("cut", [False, True])
def test_a_module_on_request(cut) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), Square(cut), nn.Linear(8, 2))
    before = [tensor.clone() for tensor in model.state_dict().values()]
    state = torch.get_rng_state()
    found = checked(model, ["1", "2"])
    assert all(torch.equal(one, other) for one, other in zip(before, model.state_dict().values(), strict=True))
    assert torch.equal(state, torch.get_rng_state())
    assert any("the module '2'" in note and "passed" in note for note in found.notes)
    assert len(found.findings) == cut
    if cut:
        assert found.findings[0].module == "1" and "of 'scale'" in found.findings[0].reason
        assert found.findings[0].error == pytest.approx(0.5, rel=1e-3)


def test_a_module_that_is_another_each_time_is_said_and_left() -> None:
    calls = iter(range(10**6))
    model = nn.Sequential(nn.Linear(4, 8), Act(lambda x: x * (1 + next(calls) % 7)), nn.Linear(8, 2))
    found = checked(model, ["1"])
    assert any("comes out otherwise each time" in note for note in found.notes)


def test_modules_that_are_not_there_or_not_called_are_refused() -> None:
    with pytest.raises(ConfigError, match="there is no module '7': choose one of"):
        checked(cube, ["7"])
    model = nn.Sequential(nn.Linear(4, 2))
    model.aside = nn.Linear(1, 1)
    model.forward = lambda x: model[0](x)
    with pytest.raises(ConfigError, match="forward calls no module 'aside'"):
        checked(model, ["aside"])
    assert Cube.forward.__name__ == "forward"  # as it was


class Masked(Function):
    """x where y is above zero, minus infinity elsewhere; wrong for x on request."""

    factor = 1.0

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.cat([x, torch.full_like(x, float("-inf"))])

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient[: len(gradient) // 2] * Masked.factor


@pytest.mark.parametrize("factor", [1.0, 1.01])
def test_outputs_that_are_not_finite_hide_no_mistake(monkeypatch, factor) -> None:
    monkeypatch.setattr(Masked, "factor", factor)
    found = checked(lambda x: Masked.apply(x)[: len(x)])
    assert len(found.findings) == (factor != 1.0) and len(found.notes) == (factor == 1.0)


def test_a_derivative_of_zero_is_not_taken_for_a_wrong_one() -> None:
    """A bias before a norm does nothing: its quotient is rounding alone."""
    inner = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU())
    found = checked(nn.Sequential(inner, nn.Linear(8, 2)), ["0"])
    assert found.findings == [] and "the module '0' passed" in found.notes[0]


def test_small_derivatives_are_checked_as_closely() -> None:
    model = net(lambda x: cube(x * 1e-4) * 1e-4)
    Cube.slope = 2.9
    try:
        assert len(checked(model).findings) == 1
    finally:
        Cube.slope = 3.0
    assert checked(model).findings == []
