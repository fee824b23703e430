"""The recompute sentinel: what comes out otherwise is named with its line and the reason; what is equal passes."""

import copy
import inspect
import itertools
import random
import re
from typing import Any

import numpy as np
import pytest
import torch
from test_segments import MODELS
from torch import Tensor, nn

from trainer import GradientError, Step, Trainer, certify, supervised
from trainer.activations.sentinel import RecomputeError
from trainer.bits import checksum
from trainer.optim import sgd
from trainer.settings import ActivationCheckpointingSettings

CALLS = 0
TURNS = itertools.count()


def line_of(code: Any) -> str:
    lines, first = inspect.getsourcelines(code)
    return f"test_sentinel.py:{first + next(index for index, line in enumerate(lines) if '# HERE' in line)}"


class PythonsRandom(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x = x * random.random()  # HERE
        return x.tanh()


class NumpysRandom(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        noise = torch.tensor(np.random.randn(*x.shape))  # HERE
        return (x + noise.float()).tanh()


class OwnGenerator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, x: Tensor) -> Tensor:
        return (x * torch.rand(x.shape, generator=self.generator)).tanh()  # HERE


class NumpysOwn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.draw = np.random.default_rng(0)

    def forward(self, x: Tensor) -> Tensor:
        return (x * float(self.draw.random())).tanh()  # HERE


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return (x / self.calls).tanh()  # HERE


class CountingGlobally(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        global CALLS
        CALLS += 1
        return (x / CALLS).tanh()  # HERE


def warmth() -> float:
    return 1.0 / (1 + next(TURNS))


class CountingElsewhere(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x * warmth()).tanh()  # HERE


class Alternating(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls % 2:
            return x.tanh()
        return x.sigmoid().exp()  # HERE


class Stopping(nn.Module):
    """Does less the second time: torch misses what it saved."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls % 2:
            x = x.exp()
        return x.neg()  # HERE


class Running(nn.Module):
    """A statistic kept as a plain tensor, where a buffer would be put back."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = torch.ones(())

    def forward(self, x: Tensor) -> Tensor:
        y = (x / self.largest).tanh()  # HERE
        self.largest = x.detach().abs().max()
        return y


class OtherType(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.low = True

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.low):
            y = x @ torch.ones(4, 4)  # HERE
        self.low = False
        return y.float().exp()


@pytest.mark.parametrize(
    ("kind", "operation", "reason"),
    [
        (PythonsRandom, "first by mul()", "draws from Python's random"),
        (NumpysRandom, "first by tensor()", "draws from numpy.random"),
        (OwnGenerator, "first by rand()", r"draws from the generator '1\.generator'"),
        (NumpysOwn, "first by mul()", r"draws from the generator '1\.draw'"),
        (Counting, "first by div()", r"'1\.calls' was 0 in forward and is 1 in the recompute"),
        (CountingGlobally, "first by div()", r"the variable 'CALLS' was \d+ in forward and is \d+ in"),
        (CountingElsewhere, "first by mul()", r"the variable 'TURNS' was count\(\d+\) in forward and is count\(\d+\)"),
        (Alternating, "by sigmoid()", r"where forward did tanh\(\); '1\.calls' was 0"),
        (Stopping, "by neg()", r"where forward did exp\(\); '1\.calls' was 0"),
        (Running, "first by div()", r"'1\.largest' was changed in between"),
        (OtherType, "by mm()", r"'1\.low' was True in forward and is False"),
    ],
)
@pytest.mark.parametrize("modules", [None, ["1"]])
def test_what_comes_out_otherwise_is_named(kind, operation, reason, modules) -> None:
    model = nn.Sequential(nn.Linear(4, 4), kind(), nn.Linear(4, 4), nn.Tanh())
    how = {"modules": modules} if modules else {"segments": 2}
    settings = ActivationCheckpointingSettings(mode="segments", verify=True, **how)
    before = copy.deepcopy(model.state_dict())
    step = Step(
        model, lambda m, x: m(x).square().mean(), sgd(model.parameters(), lr=0.1), activation_checkpointing=settings
    )
    with pytest.raises(GradientError) as found:
        step([torch.randn(6, 4)])
    said = str(found.value)
    assert "the segment '1'" in said if modules else "the segment '0' to '1'" in said, said
    assert line_of(kind) in said, said
    assert operation in said and re.search(reason, said), said
    assert "in module '1'" in said and isinstance(found.value, RecomputeError) and found.value.module == "1"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert step._open is None


@pytest.mark.parametrize("name", MODELS)
def test_an_equal_recompute_passes_and_gives_the_same_bits(name: str) -> None:
    make, how = MODELS[name]
    modules = {"segments": how} if isinstance(how, int) else {"modules": how}
    gradients = []
    for verify in (False, True):
        torch.manual_seed(0)
        model = make()
        settings = ActivationCheckpointingSettings(mode="segments", verify=verify, **modules)
        step = Step(model, loss, sgd(model.parameters(), lr=0.1), activation_checkpointing=settings)
        torch.manual_seed(1)
        rows = torch.randint(0, 11, (4, 5)) if name == "transformer" else torch.randn(8, 16)
        for one in (rows, rows.clone()):
            step([one])
        gradients.append({key: value.clone() for key, value in model.state_dict().items()})
    assert all(torch.equal(value, gradients[1][key]) for key, value in gradients[0].items())


def loss(model: nn.Module, rows: Tensor) -> Tensor:
    return model(rows).float().square().mean()


class Noting(nn.Module):
    """What it draws and counts goes nowhere near the gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.seen: Any = None

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen = x.detach().mean() * random.random() * self.calls
        if self.calls % 2:
            self.seen = self.seen.neg()
        return x.tanh()


def test_a_segment_may_be_walked_twice() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Tanh(), nn.Linear(4, 1))

    def penalised(model: nn.Module, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        out = model(x).mean()
        (slope,) = torch.autograd.grad(out, x, retain_graph=True)
        return out + slope.square().sum()

    settings = ActivationCheckpointingSettings(mode="segments", segments=2, verify=True)
    step = Step(model, penalised, sgd(model.parameters(), lr=0.1), activation_checkpointing=settings)
    assert not step([torch.randn(6, 4)]).skipped


def test_an_input_that_was_changed_behind_torchs_back_is_named() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.first(x)
            out = self.second(hidden)
            hidden.data.mul_(2)
            return out

    model = Net()
    settings = ActivationCheckpointingSettings(mode="segments", modules=["second"], verify=True)
    step = Step(model, loss, sgd(model.parameters(), lr=0.1), activation_checkpointing=settings)
    with pytest.raises(RecomputeError, match="the segment 'second' .*; its input 0 was changed in between"):
        step([torch.randn(6, 4)])


def test_the_workspace_of_a_kernel_is_not_compared() -> None:
    """That of an LSTM on the CPU (mkldnn) has bytes that nobody wrote."""

    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.leave = nn.LSTM(8, 8, num_layers=2, batch_first=True, dropout=0.2), nn.Linear(8, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.leave(self.inner(x)[0])

    model = Last()
    settings = ActivationCheckpointingSettings(mode="segments", modules=["inner"], verify=True)
    step = Step(model, loss, sgd(model.parameters(), lr=0.1), activation_checkpointing=settings)
    for _ in range(5):
        assert not step([torch.randn(3, 6, 8)]).skipped


def test_what_does_not_matter_to_the_gradient_is_not_said() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Noting(), nn.Linear(4, 1))
    settings = ActivationCheckpointingSettings(mode="segments", segments=1, verify=True)
    step = Step(model, loss, sgd(model.parameters(), lr=0.1), activation_checkpointing=settings)
    for _ in range(2):
        assert not step([torch.randn(6, 4)]).skipped


def test_without_it_the_wrong_gradient_is_taken_silently() -> None:
    """The control: what the sentinel says is not said otherwise, and the gradient is another."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), Counting(), nn.Linear(4, 1))
    gradients = []
    for segments in (None, 1):
        one = copy.deepcopy(model)
        step = Step(one, loss, sgd(one.parameters(), lr=0.1), activation_checkpointing=segments)
        step.accumulate(torch.ones(2, 4))
        gradients.append(step.gradient()["0.weight"])
    assert not torch.allclose(*gradients)


def test_check_always_looks() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), PythonsRandom(), nn.Linear(4, 1))
    window = [(torch.randn(8, 4), torch.randn(8, 1))]
    certificate = certify(model, supervised(nn.MSELoss()), None, window, activation_checkpointing=1)
    (finding,) = certificate.findings
    assert (finding.kind, finding.setting, finding.module) == ("recompute", "activation_checkpointing", "1")
    assert line_of(PythonsRandom) in finding.reason and "Python's random" in finding.reason
    assert certify(model, supervised(nn.MSELoss()), None, window).passed


def test_trainer_takes_it_flat() -> None:
    model = nn.Sequential(nn.Linear(4, 4), PythonsRandom(), nn.Linear(4, 1))
    trainer = Trainer(
        model,
        supervised(nn.MSELoss()),
        sgd(model.parameters(), lr=0.1),
        data=(torch.randn(8, 4), torch.randn(8, 1)),
        steps=1,
        console=False,
        activation_checkpointing="segments",
        segments=1,
        verify_recompute=True,
    )
    with pytest.raises(RecomputeError, match="Python's random"):
        trainer.fit()


def test_a_checksum_is_of_the_bits_in_their_order() -> None:
    one = torch.tensor([1.0, 2.0, 3.0])
    assert checksum(one) == checksum(one.clone())
    assert checksum(one) != checksum(one.flip(0))
    assert checksum(torch.tensor(0.0)) != checksum(torch.tensor(-0.0))
    assert checksum(torch.tensor([float("nan")])) == checksum(torch.tensor([float("nan")]))
    assert checksum(one[::2]) == checksum(torch.tensor([1.0, 3.0]))
    assert checksum(torch.zeros(0)) == checksum(torch.zeros(0))
    assert checksum(torch.tensor([1 + 2j]).conj()) == checksum(torch.tensor([1 - 2j]))
