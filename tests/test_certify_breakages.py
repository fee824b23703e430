"""The certificate on models that break the gradient, in many disguises: it must name the setting and the module.

No name here says what a module does: it is always `q`, somewhere in a net, so that only measurement can find it.
"""

import itertools
import os
import random
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from trainer import Sum, certify, supervised
from trainer.certificate import Certificate

Make = Callable[[], nn.Module]


class Net(nn.Module):
    """A net with `q` between two layers, as deep inside as the name says."""

    def __init__(self, q: nn.Module, width: int = 5) -> None:
        super().__init__()
        self.a = nn.Linear(6, 5)
        self.w = nn.Sequential(nn.Tanh(), nn.Sequential())
        self.w[1].add_module("q", q)
        self.z = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.z(self.w(self.a(x)).tanh())


Q = "w.1.q"


class Does(nn.Module):
    """A module with one parameter that does what the function says."""

    def __init__(self, function: Callable[["Does", Tensor], Tensor]) -> None:
        super().__init__()
        self.v = nn.Parameter(torch.linspace(0.5, 1.5, 5))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x * self.v)


def window(*sizes: int, seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    drawn = torch.Generator().manual_seed(seed)
    return [(torch.randn(n, 6, generator=drawn), torch.randn(n, 2, generator=drawn)) for n in sizes]


def certified(q: nn.Module, sizes: tuple[int, ...] = (4, 4, 3), width: int = 5, **settings: Any) -> Certificate:
    torch.manual_seed(0)
    return certify(Net(q, width), supervised(nn.MSELoss()), data=window(*sizes), **settings)


def names(certificate: Certificate, setting: str | None, module: str | None, *kinds: str) -> None:
    """The first finding is that one, and no other module is blamed."""
    assert not certificate.passed, str(certificate)
    found = certificate.findings[0]
    assert found.kind in kinds, str(certificate)
    assert (found.setting, found.module) == (setting, module), str(certificate)
    assert {one.module for one in certificate.findings} == {module}, str(certificate)
    assert found.reason and str(found) in str(certificate)


# A row's output depends on the rows beside it.


def by_hand(q: Does, x: Tensor) -> Tensor:
    return (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt()


def expert_choice(q: Does, x: Tensor) -> Tensor:
    chosen = x.sum(1).topk(2).indices
    return x + torch.zeros_like(x).index_add(0, chosen, x[chosen].square())


def rows_as_a_sequence(q: Does, x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x[None], x[None], x[None])[0]


BATCH_STATISTICS: dict[str, Callable[[Does, Tensor], Tensor]] = {
    "by hand": by_hand,
    "functional": lambda q, x: F.batch_norm(x, None, None, training=True),
    "norm over all": lambda q, x: F.layer_norm(x, x.shape),
    "neighbour": lambda q, x: x + 0.1 * x.roll(1, 0),
    "gate over rows": lambda q, x: x * x.softmax(0),
    "scale of the whole tensor": lambda q, x: (x / x.detach().abs().amax() * 7).tanh(),
    "median": lambda q, x: x - x.detach().median(0).values,
    "rows as a sequence": rows_as_a_sequence,
    "expert choice": expert_choice,
    "mixed up": lambda q, x: 0.7 * x + 0.3 * x.flip(0),
    "number of rows": lambda q, x: x * (4 / len(x)),
    "first row": lambda q, x: x - x[:1].detach(),
    "shuffled at random": lambda q, x: x + 0.1 * x[torch.randperm(len(x))],
    "rank among rows": lambda q, x: x + x.argsort(0).argsort(0).to(x.dtype) / 10,
}


@pytest.mark.parametrize("name", BATCH_STATISTICS)
def test_rows_that_see_each_other(name: str) -> None:
    names(certified(Does(BATCH_STATISTICS[name])), "accumulation_steps", Q, "batch_statistics")


@pytest.mark.parametrize("settings", [{}, {"activation_checkpointing": [Q]}, {"precision": "bf16"}])
def test_batch_norm_under_accumulation(settings: dict[str, Any]) -> None:
    names(certified(nn.BatchNorm1d(5), **settings), "accumulation_steps", Q, "batch_statistics")


def test_batch_norm_of_one_micro_batch_and_in_eval_is_right() -> None:
    assert certified(nn.BatchNorm1d(5), (8,)).passed
    assert certified(nn.BatchNorm1d(5).eval()).passed


# The loss looks at pairs of rows.


def contrastive(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    one, other = F.normalize(model(batch[0]), dim=1), F.normalize(batch[1], dim=1)
    return F.cross_entropy(one @ other.T / 0.1, torch.arange(len(one)))


def spread(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    outputs = model(batch[0])
    return F.mse_loss(outputs, batch[1]) + F.relu(1 - outputs.std(0)).mean()


def ranking(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    score, wanted = model(batch[0])[:, 0], batch[1][:, 0]
    return F.softplus(-(score[:, None] - score) * (wanted[:, None] - wanted).sign()).mean()


def root(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1]).sqrt()


def dice(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    chance, wanted = model(batch[0]).sigmoid(), (batch[1] > 0).to(batch[1].dtype)
    return 1 - 2 * (chance * wanted).sum() / (chance + wanted).sum()


@pytest.mark.parametrize("objective", [contrastive, spread, ranking, root, dice])
def test_a_loss_that_is_no_sum_over_rows(objective: Any) -> None:
    torch.manual_seed(0)
    certificate = certify(Net(nn.Identity()), objective, data=window(4, 4, 4))
    names(certificate, "accumulation_steps", "objective", "objective")


def test_pairs_by_a_product_inside_a_module() -> None:
    """The objective is innocent: `q` answers with what each row has to do with each other one."""

    class Pairs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.v = nn.Parameter(torch.eye(5))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.v @ x.T

    class Host(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(6, 5)
            self.q = Pairs()

        def forward(self, x: Tensor) -> Tensor:
            return self.q(self.a(x))

    def objective(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        scores = model(batch[0])
        return F.cross_entropy(scores, torch.arange(len(scores)))

    torch.manual_seed(0)
    certificate = certify(Host(), objective, data=window(4, 4, 4))
    names(certificate, "accumulation_steps", "q", "batch_statistics")


# Means over other things than are counted.


def masked(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    wrong = (model(batch[0]) - batch[1]).square()
    keep = (batch[1] > 0).to(wrong.dtype)
    return (wrong * keep).sum() / keep.sum()


def importance(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    weights = batch[0][:, 0].abs()
    return ((model(batch[0]) - batch[1]).square().mean(1) * weights).sum() / weights.sum()


@pytest.mark.parametrize("objective", [masked, importance])
def test_a_mean_over_other_things_than_rows(objective: Any) -> None:
    torch.manual_seed(0)
    certificate = certify(Net(nn.Identity()), objective, data=window(4, 4, 3))
    names(certificate, "accumulation_steps", "objective", "weights")


def test_a_model_that_takes_its_own_mean() -> None:
    class Own(Net):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
            wrong = (super().forward(x) - y).square()
            return wrong[y > 0].mean()

    torch.manual_seed(0)
    certificate = certify(Own(nn.Identity()), lambda model, batch: model(*batch), data=window(4, 4, 3))
    assert not certificate.passed
    assert certificate.findings[0].setting == "accumulation_steps"
    assert certificate.findings[0].kind == "weights", str(certificate)


def test_the_same_mean_with_its_count_is_right() -> None:
    def objective(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Sum:
        keep = batch[1] > 0
        return Sum((model(batch[0]) - batch[1]).square()[keep].sum(), keep.sum())

    torch.manual_seed(0)
    certificate = certify(Net(nn.Identity()), objective, data=window(4, 4, 3))
    assert certificate.passed, str(certificate)


# Another result each time.

SYSTEM = random.SystemRandom()


def noise_of_the_clock(q: Does, x: Tensor) -> Tensor:
    return x * (1 + (time.perf_counter_ns() % 1000) / 1e4)


def fresh_generator(q: Does, x: Tensor) -> Tensor:
    drawn = torch.Generator()
    drawn.seed()
    return x + 0.1 * torch.randn(x.shape, generator=drawn).to(x)


def fresh_numpy(q: Does, x: Tensor) -> Tensor:
    return x + 0.1 * torch.from_numpy(np.random.default_rng().normal(size=x.shape)).to(x)


def from_the_system(q: Does, x: Tensor) -> Tensor:
    return x * (1 + os.urandom(1)[0] / 2560)


STOCHASTIC = [noise_of_the_clock, fresh_generator, fresh_numpy, from_the_system]


@pytest.mark.parametrize("function", STOCHASTIC)
@pytest.mark.parametrize("sizes", [(4, 4, 3), (6,)])
def test_a_forward_that_comes_out_otherwise_each_time(function: Any, sizes: tuple[int, ...]) -> None:
    names(certified(Does(function), sizes), None, Q, "stochastic")


# Something is carried over from one micro-batch to the next.


def in_a_closure() -> nn.Module:
    kept: list[Tensor] = []

    def function(q: Does, x: Tensor) -> Tensor:
        before = kept[-1] if kept else torch.zeros_like(x[0])
        kept.append(x.detach().mean(0))
        return x + 0.3 * before.to(x)

    return Does(function)


def in_an_attribute() -> nn.Module:
    def function(q: Any, x: Tensor) -> Tensor:
        before = getattr(q, "last", None)
        q.last = x.detach().mean(0)
        return x if before is None else x + 0.3 * before.to(x)

    return Does(function)


def in_a_buffer() -> nn.Module:
    def function(q: Any, x: Tensor) -> Tensor:
        y = x - q.mean.to(x)
        q.mean.mul_(0.5).add_(x.detach().mean(0).to(q.mean), alpha=0.5)
        return y

    q = Does(function)
    q.register_buffer("mean", torch.zeros(5))
    return q


def in_a_default(kept: dict[str, Any] | None = None) -> nn.Module:
    def function(q: Does, x: Tensor, kept: dict[str, Any] = {"n": 0}) -> Tensor:  # noqa: B006
        kept["n"] += 1
        return x / kept["n"]

    return Does(function)


MEMORY: dict[str, Tensor] = {}


def in_the_module_of_the_code() -> nn.Module:
    MEMORY.clear()

    def function(q: Does, x: Tensor) -> Tensor:
        before = MEMORY.get("last")
        MEMORY["last"] = x.detach().mean(0)
        return x if before is None else x + 0.3 * before.to(x)

    return Does(function)


def in_a_class() -> nn.Module:
    class Counts(Does):
        calls = 0

    def function(q: Any, x: Tensor) -> Tensor:
        Counts.calls += 1
        return x / Counts.calls

    return Counts(function)


def in_an_iterator() -> nn.Module:
    factors = itertools.cycle([1.0, 0.5, 2.0])
    return Does(lambda q, x: x * next(factors))


def in_a_python_generator() -> nn.Module:
    def factors() -> Any:
        value = 1.0
        while True:
            yield value
            value *= 0.5

    made = factors()
    return Does(lambda q, x: x * next(made))


def written_in_place() -> nn.Module:
    """A queue that is written by `out=`, and read by the next micro-batch."""
    queue = torch.zeros(5)

    def function(q: Does, x: Tensor) -> Tensor:
        y = x + queue.to(x)
        with torch.no_grad():
            torch.mean(x.detach().to(queue), 0, out=queue)
        return y

    return Does(function)


CACHES: list[Make] = [
    in_a_closure,
    in_an_attribute,
    in_a_buffer,
    in_a_default,
    in_the_module_of_the_code,
    in_a_class,
    written_in_place,
]


@pytest.mark.parametrize("make", CACHES)
def test_a_module_that_carries_something_over(make: Make) -> None:
    names(certified(make()), "accumulation_steps", Q, "cache")


@pytest.mark.parametrize("make", [in_an_iterator, in_a_python_generator])
def test_a_state_that_nobody_can_put_back(make: Make) -> None:
    """Python's iterators go only forwards, so the model is not the same at its next look."""
    names(certified(make()), None, Q, "stochastic")


def test_a_recurrent_state_that_is_kept() -> None:
    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.GRU(5, 5, batch_first=True)
            self.h: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            outputs, h = self.cell(x[:, None], self.h)
            self.h = h.detach()
            return outputs[:, 0]

    names(certified(Keeps(), (4, 4, 4)), "accumulation_steps", Q, "cache")


def test_an_objective_that_carries_something_over() -> None:
    class Balanced:
        def __init__(self) -> None:
            self.scale = 1.0

        def __call__(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            loss = F.mse_loss(model(batch[0]), batch[1]) / self.scale
            self.scale = 0.9 * self.scale + 0.1 * float(loss.detach())
            return loss

    torch.manual_seed(0)
    certificate = certify(Net(nn.Identity()), Balanced(), data=window(4, 4, 4))
    names(certificate, "accumulation_steps", "objective", "cache")


# The recompute of activation checkpointing.


def own_generator(q: Any, x: Tensor) -> Tensor:
    if not hasattr(q, "drawn"):
        q.drawn = torch.Generator().manual_seed(3)
    return x * (torch.rand(x.shape, generator=q.drawn) > 0.5).to(x) * 2


def by_numpy(q: Does, x: Tensor) -> Tensor:
    return x * torch.from_numpy((np.random.rand(*x.shape) > 0.5).astype("f4")).to(x) * 2


def by_python(q: Does, x: Tensor) -> Tensor:
    return x if random.random() < 0.5 else 2 * x.sin()


@pytest.mark.parametrize("function", [own_generator, by_numpy])
@pytest.mark.parametrize("sizes", [(16,), (8, 8)])
def test_draws_that_torch_does_not_put_back(function: Any, sizes: tuple[int, ...]) -> None:
    certificate = certified(Does(function), sizes, activation_checkpointing=[Q])
    names(certificate, "activation_checkpointing", Q, "draws", "recompute")


def dropout(q: Does, x: Tensor) -> Tensor:
    return F.dropout(x, 0.5)


def bernoulli(q: Does, x: Tensor) -> Tensor:
    return x * torch.bernoulli(torch.full_like(x, 0.5)) * 2


def gumbel(q: Does, x: Tensor) -> Tensor:
    return x * F.gumbel_softmax(x, hard=True)


def noise(q: Does, x: Tensor) -> Tensor:
    return x * (1 + torch.randn_like(x))


@pytest.mark.parametrize("function", [dropout, bernoulli, gumbel, noise])
def test_draws_are_equal_in_recompute_and_right(function: Any) -> None:
    certificate = certified(Does(function), (8, 8), activation_checkpointing=[Q])
    assert certificate.passed, str(certificate)


@pytest.mark.parametrize("function", [dropout, bernoulli, gumbel, noise])
def test_a_checkpoint_of_ones_own_that_does_not_keep_the_generator(function: Any) -> None:
    def checkpointed(q: Does, x: Tensor) -> Tensor:
        return checkpoint(function, q, x, use_reentrant=False, preserve_rng_state=False)

    certificate = certified(Does(checkpointed), (16,))
    assert not certificate.passed, str(certificate)
    assert certificate.findings[0].module == Q, str(certificate)
    assert certificate.findings[0].kind in ("draws", "recompute"), str(certificate)


@pytest.mark.parametrize("reentrant", [False, True])
def test_batch_norm_in_a_checkpoint_of_ones_own(reentrant: bool) -> None:
    """Without the repair its statistics count each micro-batch twice, while the gradient is right."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.n = nn.BatchNorm1d(5)

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.n, x, use_reentrant=reentrant)

    certificate = certified(Twice(), (8,))
    assert not certificate.passed, str(certificate)
    found = certificate.findings[0]
    assert found.kind == "buffers" and found.module in (Q, f"{Q}.n"), str(certificate)


def test_batch_norm_in_a_segment_is_right() -> None:
    certificate = certified(nn.BatchNorm1d(5), (8,), activation_checkpointing=[Q])
    assert certificate.passed, str(certificate)


class Later(nn.Module):
    """A net whose last part changes something that the segment `q` reads."""

    def __init__(self, change: Callable[["Later"], None]) -> None:
        super().__init__()
        self.a = nn.Linear(6, 5)
        self.q = Does(lambda q, x: (x * getattr(q, "factor", 1.0)).sin() * q.v)
        self.z = nn.Linear(5, 2)
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        self.q.factor = 1.0  # type: ignore[assignment]
        x = self.q(self.a(x))
        self.change(self)
        return self.z(x)


def parameter_by_data(net: Later) -> None:
    net.q.v.data.mul_(0.5)


def parameter_by_out(net: Later) -> None:
    torch.mul(net.q.v.data, 0.5, out=net.q.v.data)


def parameter_through_numpy(net: Later) -> None:
    net.q.v.detach().numpy()[:] *= 0.5


def an_attribute(net: Later) -> None:
    net.q.factor = 0.5  # type: ignore[assignment]


@pytest.mark.parametrize("change", [parameter_by_data, parameter_by_out, parameter_through_numpy, an_attribute])
def test_something_changes_between_forward_and_recompute(change: Any) -> None:
    torch.manual_seed(0)
    certificate = certify(Later(change), supervised(nn.MSELoss()), data=window(8), activation_checkpointing=["q"])
    assert not certificate.passed, str(certificate)
    found = certificate.findings[0]
    assert (found.setting, found.module) == ("activation_checkpointing", "q"), str(certificate)
    assert found.kind in ("changed", "recompute"), str(certificate)


# Backward depends on the rows beside.


class Unit(torch.autograd.Function):
    """Passes on, and brings the gradient that comes back to a norm of 1 over all rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient / gradient.norm()


def test_a_gradient_that_is_normalised_on_its_way_back() -> None:
    names(certified(Does(lambda q, x: Unit.apply(x))), "accumulation_steps", Q, "backward")


def hooked(q: Does, x: Tensor) -> Tensor:
    y = x.clone()
    if y.requires_grad:
        y.register_hook(lambda gradient: gradient - gradient.mean(0))
    return y


def test_a_hook_that_looks_at_the_other_rows() -> None:
    names(certified(Does(hooked)), "accumulation_steps", Q, "backward")


# Types too narrow.


class Small(nn.Module):
    """Its layer sees numbers that float16 cannot tell from zero."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.r = nn.Linear(5, 5)
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x + self.r(x.float() * self.factor).float()


def test_fp16_that_loses_small_numbers() -> None:
    certificate = certified(Small(2.0**-27), (4, 4), precision="fp16")
    names(certificate, "precision", f"{Q}.r", "underflow")
    assert certified(Small(2.0**-27), (4, 4), precision="bf16").passed


def test_fp16_whose_loss_scale_must_back_off_first_is_right() -> None:
    torch.manual_seed(0)
    net = Net(nn.Identity())
    certificate = certify(net, lambda m, b: 1e4 * F.mse_loss(m(b[0]), b[1]), data=window(4, 4), precision="fp16")
    assert certificate.passed, str(certificate)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("by", ["wrapper", "method"])
def test_a_compiler_that_computes_something_else(by: str) -> None:
    def miscompiles(graph: Any, inputs: list[Tensor]) -> Any:
        return lambda *values: tuple(one * 1.001 for one in graph(*values))

    q: Any = Small(1.0)
    if by == "wrapper":
        q = torch.compile(q, backend=miscompiles)
    else:
        q.compile(backend=miscompiles)
    certificate = certified(q, (4, 4))
    names(certificate, "compile", Q, "compile")


def test_half_precision_inside_a_module_loses_small_gradients() -> None:
    def function(q: Does, x: Tensor) -> Tensor:
        return (x.half() * 2.0**-12).to(x.dtype) * 2.0**-12

    certificate = certified(Does(function), (8,))
    assert not certificate.passed, str(certificate)
    assert certificate.findings[0].kind == "underflow" and certificate.findings[0].module == Q, str(certificate)


def test_something_that_overflows_in_the_type_of_the_run_alone() -> None:
    certificate = certified(Does(lambda q, x: (x * 1e20) * (x * 1e20) / 1e40), (8,))
    assert not certificate.passed, str(certificate)
    assert certificate.findings[0].kind in ("overflow", "precision"), str(certificate)
    assert certificate.findings[0].module == Q, str(certificate)


def test_a_cancellation_that_float32_does_not_hold() -> None:
    """1e6 is added and taken away: what is left has an error of 3 %, and float32 itself explains it."""
    certificate = certified(Does(lambda q, x: (x + 1e6) - 1e6), (8,))
    assert certificate.passed, str(certificate)
    assert certificate.error > 1e-2 and certificate.floor > 1e-2
