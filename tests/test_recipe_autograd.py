"""The recipes scalar, vjp, custom_relu and quadratic: the tutorial's figures, by the command and by a step."""

import pytest
import torch
from torch import nn
from trainer.recipes import custom_relu, digits, quadratic, scalar, vjp

from tests.test_recipes import trainer_of
from trainer import Step
from trainer.cli import main
from trainer.errors import ConfigError
from trainer.optim import sgd

SILENT = ["loggers.console=false", "loggers.metrics=false"]


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """`trainer train recipe=…` in an empty folder; returns what it printed."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> str:
        assert main(["train", *words, *SILENT]) == 0
        return capsys.readouterr().out

    return run


# Row 1.


def test_scalar_prints_42_28_and_14_and_moves_nothing(command):
    assert command("recipe=scalar").split("\n")[:3] == ["  dz/dx = 42", "  dz/dw = 28", "  dz/db = 14"]
    trainer = trainer_of("recipe=scalar")
    stop = trainer.fit()
    model = trainer.model
    assert [leaf.grad.item() for leaf in (model.x, model.w, model.b)] == [42.0, 28.0, 14.0]
    assert [leaf.item() for leaf in (model.x, model.w, model.b)] == [2.0, 3.0, 1.0]
    assert stop.clocks["steps"] == 1 and stop.metrics == {"loss": 49.0}


def test_scalar_at_another_point_and_down_to_zero(command):
    # z = (2·1 + 1)² = 9, dz/dx = 2·3·2, dz/dw = 2·3·1, dz/db = 2·3
    said = command("recipe=scalar", "model.x=1", "model.w=2")
    assert said.split("\n")[:3] == ["  dz/dx = 12", "  dz/dw = 6", "  dz/db = 6"]
    stop = trainer_of("recipe=scalar", "optimizer.lr=0.01", "limits.steps=100").fit()
    assert 0 <= stop.metrics["loss"] < 1e-6


def test_scalars_figures_by_a_step_alone():
    model = scalar.Scalar(2, 3, 1)
    report = Step(model, scalar.z, sgd([model.x, model.w, model.b], lr=0.0))([torch.zeros(1)])
    assert report.loss == 49.0
    assert (model.x.grad.item(), model.w.grad.item(), model.b.grad.item()) == (42.0, 28.0, 14.0)


# Row 4.


def test_vjp_prints_2_and_6(command):
    said = command("recipe=vjp")
    assert "x.grad = vᵀJ = [2, 6] for v = [1, 0.5]" in said and "[[2, 0], [0, 12]]" in said
    trainer = trainer_of("recipe=vjp")
    assert trainer.fit().metrics == {"loss": 5.0}  # v · y = 1·1 + 0.5·8
    assert trainer.model.x.grad.tolist() == [2.0, 6.0] and trainer.model.x.tolist() == [1.0, 2.0]


def test_vjp_with_another_vector_and_with_several(command):
    assert "x.grad = vᵀJ = [-6, 96] for v = [-1, 2]" in command("recipe=vjp", "model.x=[3,4]", "data.source.v=[-1,2]")
    model = vjp.Powers([1.0, 2.0])
    window = [(torch.tensor([[1.0, 0.5], [3.0, 0.0]]),), (torch.tensor([[5.0, 1.0]]),)]
    Step(model, vjp.products, sgd([model.x], lr=0.0))(window)
    # The mean of [2, 6], [6, 0] and [10, 12], however the three rows are cut.
    assert model.x.grad.tolist() == pytest.approx([6.0, 6.0])


def test_vjp_wants_two_numbers():
    for wrong in ([1.0], [1.0, 2.0, 3.0], 1.0, ["a", 2.0]):
        with pytest.raises(ConfigError, match=r"data.source.v=.* is not possible: write two numbers"):
            vjp.vectors(wrong)
        with pytest.raises(ConfigError, match="model.x="):
            vjp.Powers(wrong)


# Row 5.


def test_the_custom_relus_gradient_is_0_1_1():
    x = torch.tensor([-1.0, 2.0, 0.5], requires_grad=True)
    y = custom_relu.ReLU.apply(x)
    assert type(y.grad_fn).__name__ == "ReLUBackward" and y.tolist() == [0.0, 2.0, 0.5]
    y.sum().backward()
    assert x.grad.tolist() == [0.0, 1.0, 1.0]


def test_the_custom_relu_equals_torchs_at_every_kind_of_number_and_passes_gradcheck():
    numbers = torch.tensor([-torch.inf, -1.0, -0.0, 0.0, 1e-45, 3.0, torch.inf, torch.nan])
    arriving = torch.tensor([torch.inf, torch.inf, 1.0, 1.0, 2.0, -torch.inf, 1.0, 1.0])
    ours, torchs = (numbers.clone().requires_grad_() for _ in range(2))
    left, right = custom_relu.ReLU.apply(ours), torch.relu(torchs)
    torch.testing.assert_close(left, right, rtol=0, atol=0, equal_nan=True)
    left.backward(arriving)
    right.backward(arriving)
    torch.testing.assert_close(ours.grad, torchs.grad, rtol=0, atol=0, equal_nan=True)
    points = torch.tensor([-1.0, 2.0, 0.5], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(custom_relu.ReLU.apply, (points,), eps=1e-6)
    assert torch.autograd.gradgradcheck(custom_relu.ReLU.apply, (points,), eps=1e-6)


def test_custom_relu_trains_bit_for_bit_as_torchs_relu_does():
    words = ["limits.epochs=2", "evaluation.every=null"]
    ours = trainer_of("recipe=custom_relu", *words)
    torchs = trainer_of("recipe=digits", *words, "model.width=64", "model.depth=1")
    assert isinstance(ours.model[1], custom_relu.CustomReLU) and isinstance(torchs.model[1], nn.ReLU)
    assert ours.fit().metrics == torchs.fit().metrics
    for left, right in zip(ours.model.parameters(), torchs.model.parameters(), strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("seed", range(3))
def test_custom_relu_learns_the_digits(seed):
    stop = trainer_of("recipe=custom_relu", f"seed={seed}", "evaluation.every=null").fit()
    assert stop.metrics["accuracy"] >= 0.96


# Row 6.


def test_the_quadratics_figures_are_25_and_13_9_3_1():
    leaves = [torch.tensor(value, requires_grad=True) for value in (3.0, 2.0, 1.0, 4.0)]
    y = quadratic.Quadratic.apply(*leaves)
    y.backward()
    assert y.item() == 25.0 and [leaf.grad.item() for leaf in leaves] == [13.0, 9.0, 3.0, 1.0]


def test_the_quadratic_passes_gradcheck_in_float64_and_cannot_in_float32(monkeypatch):
    assert quadratic.gradcheck()
    with pytest.warns(UserWarning, match="not a double precision floating point"):
        assert not quadratic.gradcheck(torch.float32)
    near = torch.tensor(25.0)
    assert (torch.nextafter(near, near + 1) - near).item() == pytest.approx(1.9e-6, rel=0.01)  # as its docstring says
    monkeypatch.setattr(quadratic.Quadratic, "backward", lambda ctx, g: (g * 13.1, g * 9, g * 3, g))
    assert not quadratic.gradcheck()


def test_the_quadratics_parameters_get_the_sum_over_all_points():
    x = torch.linspace(-2, 2, 7, dtype=torch.float64).reshape(7, 1).requires_grad_()
    a, b, c = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (2.0, 1.0, 4.0))
    assert torch.autograd.gradcheck(quadratic.Quadratic.apply, (x, a, b, c), eps=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_quadratic_finds_a_b_and_c(seed):
    trainer = trainer_of("recipe=quadratic", f"seed={seed}", f"data.source.seed={seed}", "evaluation.every=null")
    trainer.fit()
    found = torch.stack((trainer.model.a, trainer.model.b, trainer.model.c)).detach().double()
    x, y = (part.double() for part in quadratic.points(2.0, 1.0, 4.0, seed=seed).train)
    design = torch.cat((x**2, x, torch.ones_like(x)), dim=1)
    least_squares = torch.linalg.lstsq(design, y).solution.flatten()
    # The end of descent is the least-squares line to within its last steps, and the truth to within 4 standard errors.
    torch.testing.assert_close(found, least_squares, rtol=0, atol=0.02)
    errors = 0.5 * torch.linalg.inv(design.T @ design).diag().sqrt()
    truth = torch.tensor([2.0, 1.0, 4.0], dtype=torch.float64)
    assert ((found - truth).abs() < 4 * errors).all()


def test_quadratic_says_what_it_found_beside_the_truth(command):
    said = command("recipe=quadratic", "limits.epochs=2", "data.source.a=-1", "data.source.noise=0", "seed=1")
    assert "gradcheck in float64, eps 1e-6: backward agrees with finite differences" in said
    assert said.count("in truth") == 3 and "in truth -1\n" in said and "in truth 4\n" in said
    exact = quadratic.points(-1.0, 1.0, 4.0, noise=0.0).evaluation
    torch.testing.assert_close(exact[1], -(exact[0] ** 2) + exact[0] + 4)


def test_a_wrong_backward_is_said_at_the_start(monkeypatch, capsys):
    monkeypatch.setattr(quadratic, "gradcheck", lambda: False)
    quadratic.Compare(2, 1, 4).start(None)
    assert "DIFFERS FROM" in capsys.readouterr().out


def test_the_data_of_custom_relu_is_that_of_digits():
    assert len(trainer_of("recipe=custom_relu")._held_out.source.tensors[0]) == len(digits.images().evaluation[0])
