"""Skips: whatever was not finite, and wherever, everything is as it was bit for bit, and the reason says the place."""

import math

import pytest
import torch
from reference import cut, differing, rows, state_of
from torch import Tensor, nn

from trainer import ConfigError, DivergedError, GradientError, Report, Step, Sum, Trainer, supervised
from trainer.gradient import skips
from trainer.gradient.report import FREE_READS
from trainer.gradient.skips import KeptBuffers, reason
from trainer.optim import Manual, linear, sgd

BAD = [math.nan, math.inf, -math.inf]


class Poison(torch.autograd.Function):
    """The identity, whose backward answers with a value of its own."""

    @staticmethod
    def forward(ctx: object, value: Tensor, bad: float) -> Tensor:
        ctx.bad = bad
        return value.clone()

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> tuple[Tensor, None]:
        return torch.full_like(gradient, ctx.bad), None


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))


def optimizer_of(kind: str, model: nn.Module) -> torch.optim.Optimizer:
    return {
        "adamw": lambda p: torch.optim.AdamW(p, lr=0.1),
        "fused adamw": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
        "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        "fused sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
        "manual": lambda p: Manual(p, lr=0.1),
    }[kind](model.parameters())


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("place", ["data", "loss", "gradient", "hook"])
@pytest.mark.parametrize("kind", ["adamw", "fused adamw", "sgd", "fused sgd", "manual"])
def test_a_skip_leaves_everything_bit_for_bit(bad: float, place: str, kind: str) -> None:
    mse = nn.functional.mse_loss
    poisoned = False

    def objective(m: nn.Module, b: tuple[Tensor, Tensor]) -> Tensor:
        if not poisoned or len(b[0]) != 3:
            return mse(m(b[0]), b[1])
        if place == "data":
            return mse(m(b[0] * bad), b[1])
        if place == "loss":
            return mse(m(b[0]), b[1]) + bad
        return mse(Poison.apply(m(b[0]), bad) if place == "gradient" else m(b[0]), b[1])

    model = net()
    if place == "hook":
        model[0].weight.register_hook(lambda g: g + (bad if poisoned else 0.0))
    optimizer = optimizer_of(kind, model)
    step = Step(model, objective, optimizer, schedule=linear(total=10))
    window = cut(rows(7, torch.float32), [4, 3])
    for taken in range(3):  # before the very first step, and after one and two
        poisoned = True
        before = state_of(model, optimizer)
        report = step(window)
        assert report.skipped
        sentence = {
            "data": "the loss of micro-batch 2 of 2 is",
            "loss": f"the loss of micro-batch 2 of 2 is {bad}",
            "gradient": "the gradient of 0.weight and of 5 more is not finite, while the loss is",
            "hook": "the gradient of 0.weight is not finite, while the loss is",
        }[place]
        assert report.reason.startswith(sentence)
        assert differing(before, state_of(model, optimizer)) == []
        assert (step.clocks.steps, step.clocks.rows, step.clocks.windows) == (taken, 7 * taken, 2 * taken + 1)
        assert report.clocks["steps"] == taken
        assert step.skips_in_a_row == 1
        poisoned = False
        report = step(window)
        assert not report.skipped
        assert report.reason is None
        assert report.lr == pytest.approx(0.1 * (1 - taken / 10))  # the schedule did not tick for the skip
        assert step.skips_in_a_row == 0


def test_a_torch_scheduler_does_not_tick_for_a_skip() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    step = Step(model, supervised(nn.MSELoss()), optimizer, schedule=scheduler)
    inputs, targets = rows(4, torch.float32)
    step([(inputs, targets)])
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert step([(inputs * math.nan, targets)]).skipped
    assert optimizer.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize("first", [True, False])
def test_under_never_a_skip_puts_back_what_stood_in_grad(first: bool) -> None:
    model = net()
    step = Step(model, supervised(nn.MSELoss()), torch.optim.SGD(model.parameters(), lr=0.1), zero_grad="never")
    inputs, targets = rows(4, torch.float32)
    if not first:
        step([(inputs, targets)])
    before = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    assert step([(inputs * math.nan, targets)]).skipped
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) if first else torch.equal(parameter.grad, before[name])
    assert not step([(inputs, targets)]).skipped  # one NaN does not stay for ever


@pytest.mark.parametrize("toggles", [{"clip_norm": 1.0}, {"clip_value": 1.0}, {}])
@pytest.mark.parametrize("bad", BAD)
def test_a_clip_hides_nothing(toggles: dict[str, float], bad: float) -> None:
    model = net()
    model[3].bias.register_hook(lambda g: torch.full_like(g, bad))
    before = state_of(model)
    step = Step(model, supervised(nn.MSELoss()), torch.optim.SGD(model.parameters(), lr=0.1), **toggles)
    assert step([rows(4, torch.float32)]).reason == "the gradient of 3.bias is not finite, while the loss is"
    assert differing(before, state_of(model)) == []


def test_a_norm_that_overflows_on_a_finite_gradient_is_its_own_reason_and_no_zeros() -> None:
    model = nn.Linear(2, 1, bias=False)
    before = state_of(model)
    step = Step(model, lambda m, x: m(x).sum(), torch.optim.SGD(model.parameters(), lr=0.1), clip_norm=1.0)
    report = step([torch.full((1, 2), 1e20)])
    assert report.reason == "the gradient is finite, but too large for its norm"
    assert differing(before, state_of(model)) == []
    assert not Step(model, lambda m, x: m(x).sum(), Manual(model.parameters(), lr=0.0))(
        [torch.full((1, 2), 1e20)]
    ).skipped


def test_a_factor_above_one_is_checked_after_multiplying() -> None:
    """A guess that was too large leaves a finite gradient which overflows once it is made up for."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    weights = iter([2.0**40, 2.0**-10])  # the second window is seeded with 2^-40, and 2^50 is left to make up
    step = Step(model, lambda m, x: Sum(m(x).sum(), next(weights)), torch.optim.SGD(model.parameters(), lr=0.0))
    for _ in range(2):
        before = state_of(model)
        step.accumulate(torch.full((1, 1), 1e38))
        assert model.weight.grad.isfinite().all()
        report = step.finish()
    assert report.reason == "the gradient of weight is not finite, while the loss is"
    assert differing(before, state_of(model)) == []


@pytest.mark.parametrize("nonfinite", ["skip", "raise", "allow"])
def test_a_window_of_weight_zero_is_a_skip_with_its_sentence(nonfinite: str) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(model.parameters())
    step = Step(model, supervised(nn.CrossEntropyLoss()), optimizer, nonfinite=nonfinite)
    ignored = (torch.randn(4, 3), torch.full((4,), -100))
    before = state_of(model, optimizer)
    report = step([ignored, ignored])
    assert report.skipped
    assert report.reason == "the window weighs nothing: no row or target in it counts, so there is nothing to divide by"
    assert math.isnan(report.loss)
    assert differing(before, state_of(model, optimizer)) == []


def test_the_reason_names_the_micro_batch_though_an_earlier_one_weighed_nothing() -> None:
    model = nn.Linear(3, 4)
    step = Step(model, supervised(nn.CrossEntropyLoss()), Manual(model.parameters()))
    inputs = torch.ones(2, 3)
    window = [
        (inputs, torch.full((2,), -100)),
        (inputs, torch.tensor([0, 1])),
        (inputs * math.inf, torch.tensor([0, 1])),
    ]
    assert step(window).reason.startswith("the loss of micro-batch 3 of 3 is nan")


def test_the_reason_names_the_term() -> None:
    losses = [("a", 0, 1.0), ("a", 1, math.inf), ("b", 0, math.nan), ("b", 1, 1.0)]
    assert reason(losses, 2, {}, None) == "the loss 'b' of micro-batch 1 of 2 is nan"
    assert reason([("loss", 0, 1.0)], 1, {}, None) == "the gradient overflows when it is divided by the window's weight"


class Table(nn.Module):
    """Buffers large and small; forward changes what it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(2, 1)
        self.register_buffer("large", torch.zeros(20_000))
        self.register_buffer("small", torch.zeros(3))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.change = "none"

    def forward(self, inputs: Tensor) -> Tensor:
        if self.change == "in place":
            self.large += 1
        elif self.change == "replaced":
            self.large = torch.ones(20_000)
        self.small = self.small + inputs.detach().mean()
        self.count += 1
        return self.line(inputs)


def test_large_and_replaced_buffers_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Table()
    step = Step(model, lambda m, x: m(x).mean(), Manual(model.parameters()))
    good, bad = torch.ones(2, 2), torch.full((2, 2), math.nan)
    model.change = "in place"
    for micro_batch in (bad, bad, good, bad):  # a skip shows nothing about the buffer by having put it back
        before = state_of(model)
        report = step([micro_batch])
        assert (differing(before, state_of(model)) == []) == report.skipped
    assert model.large[0] == 1
    assert model.count == 1


@pytest.mark.parametrize("change", ["in place", "replaced"])
def test_a_large_buffer_that_forward_left_alone_is_not_copied_but_watched(change: str) -> None:
    model = Table()
    step = Step(model, lambda m, x: m(x).mean(), Manual(model.parameters()))
    good, bad = torch.ones(2, 2), torch.full((2, 2), math.nan)
    step([good])
    assert "large" not in step._buffers.state_dict()
    assert step([bad]).skipped
    model.change = change
    with pytest.raises(GradientError, match="the buffer 'large' was changed in forward for the first time"):
        step([bad])
    step([good])  # from now on it is kept
    before = state_of(model)
    assert step([bad]).skipped
    assert differing(before, state_of(model)) == []


def test_buffers_of_modules_in_a_plain_object_are_put_back() -> None:
    class Plain:
        def __init__(self) -> None:
            self.parts = [nn.Linear(3, 4), nn.BatchNorm1d(4)]

    model = Plain()
    parameters = [p for part in model.parts for p in part.parameters()]
    step = Step(model, lambda m, x: m.parts[1](m.parts[0](x)).square().mean(), Manual(parameters))
    before = state_of(*model.parts)
    assert step([torch.full((2, 3), math.nan)]).skipped
    assert differing(before, state_of(*model.parts)) == []


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_buffers_of_a_torchscript_module_are_put_back() -> None:
    model = torch.jit.script(net())
    step = Step(model, supervised(nn.MSELoss()), torch.optim.SGD(model.parameters(), lr=0.1))
    inputs, targets = rows(4, torch.float32)
    assert not step([(inputs, targets)]).skipped
    before = state_of(model)
    assert step([(inputs, targets), (inputs * math.nan, targets)]).skipped
    assert not differing(before, state_of(model))
    assert int(model.state_dict()["1.num_batches_tracked"]) == 1


def test_batch_norm_counts_a_taken_window_and_not_a_skipped_one() -> None:
    model = net()
    step = Step(model, supervised(nn.MSELoss()), torch.optim.SGD(model.parameters(), lr=0.1))
    inputs, targets = rows(8, torch.float32)
    step(cut((inputs, targets), [4, 4]))
    step([(inputs * math.nan, targets)])
    assert model[1].num_batches_tracked.dtype is torch.int64
    assert model[1].num_batches_tracked == 2


def test_a_kept_buffer_follows_a_changed_size_and_a_flag() -> None:
    module = nn.Module()
    module.register_buffer("state", torch.ones(2))
    kept = KeptBuffers(module)
    kept.keep()
    kept.release()
    module.state = torch.ones(3)
    kept.keep()
    module.state.fill_(math.nan)
    kept.put_back(torch.tensor(0.0))
    assert module.state.isnan().all()
    kept.put_back(torch.tensor(1.0))
    assert module.state.tolist() == [1, 1, 1]
    assert skips.reason_on_device({"loss": 0.0}) == skips.ZERO_WEIGHT


MSE = supervised(nn.MSELoss())
WINDOW = cut(rows(7, torch.float32), [4, 3])


def test_the_users_rule_skips_with_his_reason_and_nothing_moves() -> None:
    answers = iter([None, "the norm is 3 times the usual", True, False, ""])
    seen = []

    def rule(report: Report) -> str | bool | None:
        seen.append((report.loss > 0, report.grad_norm > 0, report.clocks["steps"]))
        return next(answers)

    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    step = Step(model, MSE, optimizer, skip_if=rule, nonfinite="raise")
    reasons = []
    for _ in range(5):
        before = state_of(model, optimizer)
        report = step(WINDOW)
        reasons.append(report.reason)
        assert (differing(before, state_of(model, optimizer)) == []) == report.skipped
    assert reasons == [None, "the norm is 3 times the usual", "skip_if said so", None, None]
    assert seen == [(True, True, count) for count in (0, 1, 1, 1, 2)]
    assert step.clocks.as_dict()["steps"] == 3 and step.clocks.windows == 5


@pytest.mark.parametrize("zero_grad", ["set_to_none", "zeros", "never"])
def test_on_a_device_the_users_rule_is_read_and_right(zero_grad: str) -> None:
    finals = []
    for free in (True, False):
        if not free:
            FREE_READS.discard("cpu")
        try:
            torch.manual_seed(0)
            model = net()
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
            step = Step(model, MSE, optimizer, skip_if=lambda r: r.clocks["windows"] % 3 == 1, zero_grad=zero_grad)
            skipped = [step(WINDOW).skipped for _ in range(7)]
        finally:
            FREE_READS.add("cpu")
        assert skipped == [index % 3 == 1 for index in range(7)]
        finals.append(state_of(model, optimizer))
    assert differing(*finals) == []


def test_a_rule_that_only_skips_stops_the_run_and_what_is_no_rule_is_refused() -> None:
    model = nn.Linear(3, 2)
    quiet = {"console": False, "steps": 5, "skips_in_a_row": 3}
    trainer = Trainer(
        model, MSE, sgd(model.parameters()), data=[WINDOW[0]] * 9, skip_if=lambda r: f"it is {r.loss > 0}", **quiet
    )
    with pytest.raises(DivergedError, match="3 steps in a row were skipped, the last because it is True"):
        trainer.fit()
    for wrong, sentence in ((3, "skip_if=3 cannot be called"), (lambda r: 0.5, "skip_if returned 0.5: return")):
        with pytest.raises(ConfigError, match=sentence):
            Step(model, MSE, sgd(model.parameters()), skip_if=wrong)(WINDOW)
