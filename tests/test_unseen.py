"""Changes behind torch's back: `trainer check` names the tensor, who changed it and the line."""

import inspect
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from trainer import certify, supervised
from trainer.diagnose.forward import Forward
from trainer.diagnose.unseen import unseen
from trainer.gradient.parameters import named_parameters
from trainer.optim import sgd

X = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
Y = torch.randn(8, 1, generator=torch.Generator().manual_seed(1))
MSE = supervised(nn.MSELoss())


def line_of(code: Any) -> str:
    lines, first = inspect.getsourcelines(code)
    return f"test_unseen.py:{first + next(index for index, line in enumerate(lines) if '# HERE' in line)} "


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 1)
        self.register_buffer("scale", torch.full((4,), 2.0))


class ThroughData(Net):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.a(x).exp()
        out = self.b(hidden)
        hidden.data.mul_(2)  # HERE
        return out


class ThroughDataByIndex(Net):
    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.sigmoid(self.a(x))
        hidden.data[:, 0] = 0  # HERE
        return self.b(hidden)


class ThroughNumpy(Net):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.a(x).exp()
        array = hidden.detach().numpy()  # HERE
        array *= 2
        return self.b(hidden)


class Weight(Net):
    def forward(self, x: Tensor) -> Tensor:
        out = self.b(self.a(x).tanh())
        self.b.weight.data.mul_(0.5)  # HERE
        return out


class Buffer(Net):
    def forward(self, x: Tensor) -> Tensor:
        out = self.b(self.a(x) * self.scale)
        self.scale.data.zero_()  # HERE
        return out


class Input(Net):
    def forward(self, x: Tensor) -> Tensor:
        out = self.b(self.a(x))
        x.data.clamp_(0, 1)  # HERE
        return out


@pytest.mark.parametrize(
    ("kind", "what", "by"),
    [
        (ThroughData, "the result of exp() in", "by mul_() in"),
        (ThroughDataByIndex, "backward of sigmoid()", "by __setitem__() in"),
        (ThroughNumpy, "the result of exp() in|its own result", "through the array that numpy() in"),
        (Weight, "the parameter 'b.weight'", "by mul_() in"),
        (Buffer, "the buffer 'scale'", "by zero_() in"),
        (Input, "tensor 0 of the micro-batch", "by clamp_() in"),
    ],
)
def test_a_change_behind_torchs_back_fails_the_check(kind: type[Net], what: str, by: str) -> None:
    model = kind()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    certificate = certify(model, MSE, sgd(model.parameters(), lr=0.1), [(X.clone(), Y)])
    assert not certificate.passed
    (finding,) = certificate.findings
    assert finding.kind == "changed"
    assert any(one in finding.reason for one in what.split("|")) and by in finding.reason, finding.reason
    assert line_of(kind) in finding.reason, finding.reason
    assert "which torch does not see" in finding.reason
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_parameter_changed_while_the_forward_runs() -> None:
    class Clipped(Net):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                self.a.weight.clamp_(-0.1, 0.1)  # HERE
            return self.b(self.a(x))

    model = Clipped()
    certificate = certify(model, MSE, None, [(X, Y)])
    assert certificate.passed
    (said,) = certificate.audit
    assert said.startswith("the parameter 'a.weight' is changed while the forward runs, by clamp_() in")
    assert line_of(Clipped) in said and "change it after the step" in said


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.n = nn.Linear(4, 4), nn.InstanceNorm1d(2, track_running_stats=True)
        self.m, self.b = nn.BatchNorm1d(4), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.m(self.n(self.a(x).reshape(8, 2, 2)).reshape(8, 4)).relu_())


class BeforeUse(Net):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.a(x)
        hidden.data.clamp_(-1, 1)
        return self.b(hidden.tanh())


@pytest.mark.parametrize("make", [Norm, BeforeUse])
def test_of_what_backward_does_not_need_nothing_is_said(make: Any) -> None:
    model = make()
    assert unseen(Forward(model, MSE, (X, Y), named_parameters(model))) == []


# The audit inside the check.


class Careless(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.unused = nn.Linear(4, 4), nn.Linear(4, 1), nn.Linear(4, 4)
        self.listed = [nn.Linear(4, 4)]

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.a(x).detach()  # HERE
        return self.b(self.listed[0](hidden)).squeeze(1)


@pytest.mark.filterwarnings("ignore:Using a target size")
def test_check_says_what_the_first_step_would_say() -> None:
    model = Careless()
    model.b.bias.requires_grad_(False)
    optimizer = sgd([*model.a.parameters(), *model.b.parameters(), *model.unused.parameters()], lr=0.1)
    model.extra = nn.Parameter(torch.zeros(1))
    certificate = certify(model, lambda m, b: F.mse_loss(m(b[0]), b[1]), optimizer, [(X, Y)])
    assert certificate.passed
    text, plain = str(certificate), json.loads(json.dumps(certificate.as_dict()))
    for words in (
        "in the model but in no optimizer, so not trained: 'extra'.",
        "in the optimizer but with requires_grad off, so not trained: 'b.bias'.",
        f"no gradient reached 'a.weight', 'a.bias': the graph was cut by detach() in tests/{line_of(Careless)}",
        "no gradient reached 'unused.weight', 'unused.bias': no operation of the forward used it.",
        "is in no optimizer, so not trained: 'listed[0].weight', 'listed[0].bias'.",
        "takes every output with every target, (8, 8)",
    ):
        assert words in text, text
        assert any(words in one for one in plain["audit"]), plain["audit"]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_reentrant_checkpoint_is_audited_too() -> None:
    class Reentrant(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.b(checkpoint(self.a.forward, x.requires_grad_(), use_reentrant=True).detach())  # HERE

    model = Reentrant()
    model.b.bias.grad = kept = torch.ones(1)
    (said,) = certify(model, MSE, None, [(X.clone(), Y)]).audit
    assert "'a.weight', 'a.bias': the graph was cut by " in said and line_of(Reentrant) in said, said
    assert model.b.bias.grad is kept


def test_a_sound_model_has_no_audit() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(0.5), nn.Linear(4, 1))
    assert certify(model, MSE, sgd(model.parameters(), lr=0.1), [(X, Y)]).audit == []
