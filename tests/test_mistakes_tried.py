"""Scripts as beginners and careless experts write them: what is said names the right thing and the right line, and of
what is meant nothing is said."""

import copy
import functools
import inspect
import re
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from trainer import Step, TrainerError, supervised
from trainer.diagnose.audit import FirstStep, wiring
from trainer.optim import sgd

X = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
Y = torch.randn(8, 1, generator=torch.Generator().manual_seed(1))
CLASSES = torch.arange(8) % 3
MSE = supervised(nn.MSELoss())


def line_of(code: Any) -> str | None:
    lines, first = inspect.getsourcelines(code)
    marked = [first + index for index, line in enumerate(lines) if "# HERE" in line]
    return f"test_mistakes_tried.py:{marked[0]} " if marked else None


def net(outputs: int = 1) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, outputs))


class Two(nn.Module):
    """Two layers, with what a case does in between."""

    def __init__(self, between: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 1)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.between(self, self.a(x)))


def said(model: Any, objective: Any = MSE, batch: Any = (X, Y), windows: int = 1, optimizer: Any = None) -> str:
    """All that is said of the wiring, of the first step, and by the error where there is one."""
    step = Step(model, objective, optimizer or sgd(model.parameters(), lr=0.1))
    found = wiring(model, step.parameters.by_name)
    first = FirstStep(step, found.append, lambda: None)
    try:
        for index in range(windows):
            (step if index else first)([batch])
    except TrainerError as error:
        found.append(str(error))
    return "\n".join(found)


# A graph that was cut, in an objective.


def of_numbers(m: Any, b: Any) -> Tensor:
    loss = F.mse_loss(m(b[0]), b[1])
    return torch.tensor(loss.item(), requires_grad=True)  # HERE


def summed_numbers(m: Any, b: Any) -> Tensor:
    total = 0.0
    for x, y in zip(*b, strict=True):
        total += F.mse_loss(m(x), y).item()  # HERE
    return torch.tensor(total)


def through_numpy(m: Any, b: Any) -> Tensor:
    out = m(b[0]).detach().numpy()  # HERE
    return F.mse_loss(torch.from_numpy(np.clip(out, -1, 1)), b[1])


def into_numpy(m: Any, b: Any) -> Tensor:
    out = np.tanh(m(b[0]))  # HERE
    return F.mse_loss(torch.from_numpy(out), b[1])


def by_float(m: Any, b: Any) -> Tensor:
    out = [m(one).tolist() for one in b[0]]  # HERE
    return F.mse_loss(torch.tensor(out), b[1])


def of_a_list(m: Any, b: Any) -> Tensor:
    fit, size = F.mse_loss(m(b[0]), b[1]), m(b[0]).abs().mean()
    return torch.tensor([fit, size]).sum()  # HERE


def over_lines(m: Any, b: Any) -> Tensor:
    return (
        m(b[0])
        .tanh()
        .detach()  # HERE
        .square()
        .mean()
    )


def stopped(x: Tensor) -> Tensor:
    return x.detach()  # HERE


def by_accuracy(m: Any, b: Any) -> Tensor:
    right = m(b[0]).argmax(1)  # HERE
    return 1 - (right == CLASSES).float().mean()


def by_index_of_max(m: Any, b: Any) -> Tensor:
    chosen = torch.max(m(b[0]), 1)[1]  # HERE
    return (chosen - CLASSES).abs().float().mean()


def sampled(m: Any, b: Any) -> Tensor:
    chosen = torch.distributions.Categorical(logits=m(b[0]))
    action = chosen.sample()  # HERE
    return (action != CLASSES).float().mean()


def without_create_graph(m: Any, b: Any) -> Tensor:
    x = b[0].clone().requires_grad_()
    (slope,) = torch.autograd.grad(m(x).tanh().sum(), x)  # HERE
    return (slope.norm(dim=1) - 1).square().mean()


def under_vmap(m: Any, b: Any) -> Tensor:
    out = torch.vmap(m)(b[0])
    return F.mse_loss(out.detach(), b[1])  # HERE


def detached_parameters(m: Any, b: Any) -> Tensor:
    own = {name: one.detach() for name, one in m.named_parameters()}  # HERE
    return F.mse_loss(torch.func.functional_call(m, own, (b[0],)), b[1])


def by_truth(m: Any, b: Any) -> Tensor:
    right = sum(1 for one, other in zip(m(b[0]), b[1], strict=True) if one > other)  # HERE
    return torch.tensor(1.0 - right / 8)


def scaled(m: Any, b: Any, factor: float) -> Tensor:
    return F.mse_loss(m(b[0]), b[1]).data * factor  # HERE


# Graphs that were walked already.


def freed_by_a_derivative(m: Any, b: Any) -> Tensor:
    x = b[0].clone().requires_grad_()
    out = m(x).tanh().sum()
    (slope,) = torch.autograd.grad(out, x)  # HERE
    return out + slope.sum()


def derived_twice(m: Any, b: Any) -> Tensor:
    x = b[0].clone().requires_grad_()
    out = m(x).tanh().sum()
    (slope,) = torch.autograd.grad(out, x)  # HERE
    (again,) = torch.autograd.grad(out, x)
    return (slope + again).sum() + m(x).sum()


class Averaged:
    seen: Any = None

    def __call__(self, m: Any, b: Any) -> Tensor:
        loss = F.mse_loss(m(b[0]), b[1])
        self.seen = loss if self.seen is None else 0.9 * self.seen + 0.1 * loss  # HERE
        return self.seen


# Changes in place.


def of_the_input(m: Any, b: Any) -> Tensor:
    x = b[0]
    out = m(x)
    x -= x.mean()  # HERE
    return F.mse_loss(out, b[1])


def under_inference_mode(m: Any, b: Any) -> Tensor:
    with torch.inference_mode():
        hidden = m[0](b[0])  # HERE
    return F.mse_loss(m[2](hidden), b[1])


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True")
@pytest.mark.parametrize(
    ("objective", "marked", "words"),
    [
        (of_numbers, of_numbers, r"no gradient reached '0.weight'.*left torch as a number by item\(\)"),
        (summed_numbers, summed_numbers, r"^(?!.* or by ).*left torch as a number by item\(\)"),  # once, not 8 times
        (through_numpy, through_numpy, r"left torch as a number by numpy\(\)"),
        (into_numpy, into_numpy, r"goes into numpy in .*use torch's operation there"),
        (by_float, by_float, r"left torch as a number by tolist\(\)"),
        (of_a_list, of_a_list, r"cut by tensor\(\)"),
        (over_lines, over_lines, r"cut by detach\(\)"),
        (lambda m, b: F.mse_loss(stopped(m(b[0])), b[1]), stopped, r"cut by detach\(\)"),
        (by_accuracy, by_accuracy, r"cut by argmax\(\).*whole numbers"),
        (by_index_of_max, by_index_of_max, r"cut by max\(\).*whole numbers"),
        (sampled, sampled, r"cut by multinomial\(\)"),
        (without_create_graph, without_create_graph, r"cut by grad\(\).*without create_graph=True"),
        (under_vmap, under_vmap, r"cut by detach\(\)"),
        (detached_parameters, detached_parameters, r"cut by detach\(\)"),
        (by_truth, by_truth, r"left torch as a number by __bool__\(\)"),
        (functools.partial(scaled, factor=2.0), scaled, r"the objective scaled returned .*cut by data\(\)"),
        (freed_by_a_derivative, freed_by_a_derivative, r"was freed by grad\(\) in .*create_graph=True"),
        (derived_twice, derived_twice, r"was freed by grad\(\) in .*create_graph=True"),
        (Averaged(), Averaged, r"the old 'objective.seen' goes into mul\(\)"),
        (of_the_input, of_the_input, r"needs tensor 0 of the micro-batch.* by sub_\(\)"),
        (under_inference_mode, under_inference_mode, r"^linear\(\) in .* runs under inference mode"),
    ],
)
def test_an_objective_is_told_what_and_where(objective, marked, words) -> None:
    found = said(net(), objective, batch=(X.clone(), Y), windows=2)
    assert re.search(words, found), found
    assert line_of(marked) in found, found


# In a model, between two layers.


def signs(m: Any, x: Tensor) -> Tensor:
    return torch.sign(x)  # HERE


def mask(m: Any, x: Tensor) -> Tensor:
    open_ = x > 0  # HERE
    return open_.float()


def dead(m: Any, x: Tensor) -> Tensor:
    return (x - 1e3).relu()  # HERE


def drawn(m: Any, x: Tensor) -> Tensor:
    around = torch.distributions.Normal(x, 1.0)
    return around.sample()  # HERE


def into_data(m: Any, x: Tensor) -> Tensor:
    kept = torch.zeros(8, 4)
    kept.data.copy_(x)  # HERE
    return kept


def reentrant(m: Any, x: Tensor) -> Tensor:
    return checkpoint(torch.tanh, x.detach(), use_reentrant=True)  # HERE


def in_a_thread(m: Any, x: Tensor) -> Tensor:
    made = {}
    thread = threading.Thread(target=lambda: made.update(x=m.a(X).detach()))
    thread.start()
    thread.join()
    return made["x"]


def halves(m: Any, x: Tensor) -> Tensor:
    left, right = torch.chunk(x, 2, dim=1)
    left = left.detach()  # HERE
    return torch.cat([left, right.sign().detach()], 1)


def on_its_result(m: Any, x: Tensor) -> Tensor:
    x = F.relu(x, inplace=True)
    x += 1  # HERE
    return x


def overwritten(m: Any, x: Tensor) -> Tensor:
    x = x.exp()  # HERE
    return X


@pytest.mark.filterwarnings("ignore:None of the inputs")
@pytest.mark.parametrize(
    ("between", "words"),
    [
        (signs, r"the gradient of 'a.weight', 'a.bias' is zero: the derivative of sign\(\) in .* is 0 everywhere"),
        (mask, r"no gradient reached 'a.weight', 'a.bias': the graph was cut by gt\(\).*bool"),
        (dead, r"the gradient of 'a.weight', 'a.bias' is zero: every output of relu\(\) in .* is 0 for this"),
        (drawn, r"'a.bias': the graph was cut by normal\(\).*no_grad"),
        (into_data, r"'a.bias': the graph was cut by copy_\(\).*writes through .data"),
        (reentrant, r"'a.bias': the graph was cut by detach\(\)"),
        (in_a_thread, r"'a.bias': where the graph was cut could not be seen"),
        (halves, r"'a.bias': the graph was cut by detach\(\)"),
        (on_its_result, r"^backward of relu\(\) in .* needs its own result .* changed in place since, by add_\(\)"),
        (overwritten, r"'a.bias': what was made of it does not reach the loss: the last that it went into is exp\(\)"),
    ],
)
def test_a_layer_without_a_gradient_is_told_what_and_where(between, words) -> None:
    found = said(Two(between))
    assert re.search(words, found), found
    line = line_of(between)
    assert line in found if line else ".py:" not in found, found


def test_what_the_model_keeps_from_its_first_forward() -> None:
    class Caching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head, self.cache = nn.Linear(4, 4), nn.Linear(4, 1), {}

        def forward(self, x: Tensor) -> Tensor:
            if "x" not in self.cache:
                self.cache["x"] = self.body(x).tanh()
            return self.head(self.cache["x"])  # HERE

    found = said(Caching(), windows=2)
    assert "'model.cache['x']' goes into linear()" in found and line_of(Caching) in found
    assert "was computed before this forward" in found


class Manual:
    """A plain object whose weight is no leaf."""

    def __init__(self) -> None:
        self.w = torch.randn(4, 1, requires_grad=True) * 0.1
        self.b = torch.zeros(1, requires_grad=True)

    def __call__(self, x: Tensor) -> Tensor:
        return x @ self.w + self.b  # HERE


def test_a_weight_that_is_no_leaf() -> None:
    model = Manual()
    found = said(model, optimizer=sgd([model.b], lr=0.1), windows=2)
    assert "requires a gradient but is the result of an operation, so no optimizer can train it: 'w'." in found
    assert "'model.w' goes into matmul()" in found and line_of(Manual) in found


def test_what_is_in_no_optimizer() -> None:
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers, self.head = [nn.Linear(4, 4)], nn.Linear(4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.layers[0](x))

    class Fresh(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            w = nn.Parameter(torch.ones(4, 1))  # HERE
            return self.a(x) @ w

    class Clamping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.b = nn.Parameter(torch.ones(4, 1)), nn.Parameter(torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            self.w = nn.Parameter(self.w.clamp(-1, 1))  # HERE
            return x @ self.w + self.b

    class Tempered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.t = nn.Parameter(torch.ones(1))

        def forward(self, model: nn.Module, batch: Any) -> Tensor:
            return F.mse_loss(model(batch[0]) * self.t, batch[1])

    found = said(Listed())
    assert "is in no optimizer, so not trained: 'layers[0].weight', 'layers[0].bias'." in found, found
    assert "nn.ModuleList" in found
    found = said(Fresh())
    assert "a parameter is made anew in every forward, in " in found and line_of(Fresh) in f"{found} ", found
    found = said(Clamping())
    assert "'w' of the model is replaced by another parameter while" in found and line_of(Clamping) in found, found
    assert "is in no optimizer, so not trained: 'objective.t'." in said(net(), Tempered())


def test_a_parametrization_that_detaches() -> None:
    class Held(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return w.detach().clamp(-1, 1)  # HERE

    model = net()
    parametrize.register_parametrization(model[0], "weight", Held())
    found = said(model)
    assert "'0.parametrizations.weight.original': the graph was cut by detach()" in found
    assert line_of(Held) in found


def test_a_hook_that_detaches() -> None:
    def cuts(module: Any, given: Any, out: Tensor) -> Tensor:
        return out.detach()  # HERE

    model = net()
    model[1].register_forward_hook(cuts)
    assert line_of(cuts) in said(model)


def test_what_is_compiled_is_looked_into() -> None:
    def cuts(m: Any, x: Tensor) -> Tensor:
        return x.detach()  # HERE

    model = Two(cuts)
    compiled = torch.compile(model, backend="eager")
    found = said(model, lambda m, b: F.mse_loss(compiled(b[0]), b[1]))
    assert "cut by detach()" in found and line_of(cuts) in found, found


def test_a_checkpoint_of_ones_own_that_takes_another_way() -> None:
    turns: list[int] = []

    def inner(x: Tensor) -> Tensor:
        turns.append(1)
        return (x.exp().tanh() if len(turns) % 2 else x).sigmoid()

    found = said(Two(lambda m, x: checkpoint(inner, x, use_reentrant=False)))
    assert re.search(r"saves other tensors \(\d in forward, \d in the recompute\)", found), found


# What is meant, or harmless: nothing is said.


def straight_through(m: Any, x: Tensor) -> Tensor:
    return x + (x.round() - x).detach()


def looked_at(m: Any, x: Tensor) -> Tensor:
    m.seen = x.detach().abs().max().item()
    return x


def into_zeros(m: Any, x: Tensor) -> Tensor:
    out = torch.zeros(8, 4)
    out[:4], out[4:] = x[:4], x[4:]
    return out


def in_place_where_it_may(m: Any, x: Tensor) -> Tensor:
    x += 1
    return F.relu(x, inplace=True)


def penalty(m: Any, b: Any) -> Tensor:
    x = b[0].clone().requires_grad_()
    out = m(x).tanh()
    (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    return F.mse_loss(out, b[1]) + slope.square().mean()


def first_order(m: Any, b: Any) -> Tensor:
    own = dict(m.named_parameters())
    slopes = torch.autograd.grad(F.mse_loss(m(b[0]), b[1]), list(own.values()))
    fast = {name: one - 0.1 * slope for (name, one), slope in zip(own.items(), slopes, strict=True)}
    return F.mse_loss(torch.func.functional_call(m, fast, (b[0],)), b[1])


def stop_gradient(m: Any, b: Any) -> Tensor:
    out = m(b[0])
    return F.mse_loss(out, 0.5 * (out.detach() + b[1]))


class LowRank(nn.Module):
    """Begins at zero, so half of it has no slope in the first step."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.w = nn.Parameter(torch.ones(4, 2)), nn.Parameter(torch.zeros(2, 1)), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.w(x) + x @ self.a @ self.b


def old_weight_norm() -> nn.Module:
    with pytest.warns(FutureWarning, match="weight_norm"):
        return nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 1))


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Tanh(), nn.Linear(4, 4, bias=False), nn.Linear(4, 1))
    model[2].weight = model[0].weight
    return model


@pytest.mark.parametrize(
    ("make", "objective"),
    [
        (lambda: Two(straight_through), MSE),
        (lambda: Two(looked_at), MSE),
        (lambda: Two(into_zeros), MSE),
        (lambda: Two(in_place_where_it_may), MSE),
        (net, penalty),
        (net, first_order),
        (net, stop_gradient),
        (LowRank, MSE),
        (old_weight_norm, MSE),
        (tied, MSE),
        (lambda: copy.deepcopy(net()).eval(), MSE),
        (net, lambda m, b: F.mse_loss(m(b[0]), b[1]) * np.float64(0.5)),
    ],
)
def test_of_what_is_meant_nothing_is_said(make, objective) -> None:
    assert said(make(), objective, windows=2) == ""
