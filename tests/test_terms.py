"""Each term's gradient against plain autograd, under everything that a step can be set to, and the run unmoved."""

import pytest
import torch
from ranks import over_ranks
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trainer import ConfigError, Step, Sum, supervised
from trainer.diagnose.sources import SourceGradients
from trainer.diagnose.terms import TermGradients
from trainer.distributed.many import ManyProcesses
from trainer.gradient.report import Report
from trainer.optim import adamw

Batch = tuple[Tensor, Tensor]


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 2))


def window(sizes: tuple[int, ...] = (8, 3, 5)) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(n, 6, generator=generator), torch.randn(n, generator=generator)) for n in sizes]


def two_heads(net: nn.Module, batch: Batch) -> dict[str, Tensor | Sum]:
    """A mean over rows, and a total that counts only some of them: their weights differ."""
    inputs, targets = batch
    outputs = net(inputs)
    kept = targets > 0
    return {
        "fit": (outputs[:, 0] - targets).square().mean(),
        "sign": Sum((outputs[kept, 1] + outputs[kept, 0]).square().sum(), kept.sum()),
    }


def plain(net: nn.Module, batches: list[Batch], name: str, coefficient: float) -> Tensor:
    """Σ∇total / Σweight of one term, flat, by autograd alone, with the same draws."""
    total, weight = torch.zeros(()), 0.0
    for batch in batches:
        answer = two_heads(net, batch)[name]
        one, count = (answer.total, float(answer.weight)) if isinstance(answer, Sum) else (answer, len(batch[0]))
        total = total + (one if isinstance(answer, Sum) else one * count)
        weight += count
    found = torch.autograd.grad(coefficient * total / weight, list(net.parameters()), allow_unused=True)
    shapes = list(net.parameters())
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(found, shapes, strict=True)])


@pytest.mark.parametrize("settings", [{}, {"activation_checkpointing": 2}, {"precision": "bf16"}, {"clip_norm": 0.1}])
def test_each_terms_norm_and_the_cosine_are_those_of_plain_autograd(settings) -> None:
    net, batches = model(), window()
    step = Step(net, two_heads, adamw(net.parameters()), coefficients={"sign": 3.0}, **settings)
    terms = TermGradients(step, 1)
    expected = []
    for name, coefficient in (("fit", 1.0), ("sign", 3.0)):
        torch.manual_seed(5)
        expected.append(plain(net, batches, name, coefficient))
    torch.manual_seed(5)
    step(batches)
    found = terms.latest
    assert found is not None
    near = 2e-2 if settings.get("precision") == "bf16" else 1e-5
    assert found.norms == {
        "fit": pytest.approx(float(expected[0].norm()), rel=near),
        "sign": pytest.approx(float(expected[1].norm()), rel=near),
    }
    truth = float(torch.cosine_similarity(expected[0], expected[1], dim=0))
    assert found.cosines == {("fit", "sign"): pytest.approx(truth, abs=near)}


@pytest.mark.parametrize("reduction", ["sum", "micro_batches"])
def test_the_terms_are_reduced_as_the_window_is(reduction) -> None:
    """With nothing else in it, the terms' gradients add up to the window's."""
    net, batches = model().eval(), window((4, 4))

    def objective(net: nn.Module, batch: Batch) -> dict[str, Tensor]:
        outputs = net(batch[0])
        return {"a": outputs[:, 0].square().mean(), "b": outputs[:, 1].square().mean()}

    step = Step(net, objective, adamw(net.parameters()), reduction=reduction)
    terms = TermGradients(step, 1)
    norm = step(batches, norms=True).grad_norm
    found = terms.latest
    assert found is not None and norm is not None
    a, b = found.norms["a"], found.norms["b"]
    assert (a**2 + b**2 + 2 * a * b * found.cosines["a", "b"]) ** 0.5 == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize(
    "settings",
    [{}, {"activation_checkpointing": 2}, {"precision": "bf16"}, {"zero_grad": "never"}, {"precision": "fp16"}],
)
def test_the_run_is_bit_for_bit_the_same_with_and_without(settings) -> None:
    found = []
    for every in (None, 2):
        net = model()
        if settings.get("precision") == "fp16":
            net = net[:1]
        step = Step(net, two_heads, adamw(net.parameters()), **settings)
        terms = None if every is None else TermGradients(step, every)
        torch.manual_seed(3)
        for _ in range(5):
            report = step(window())
        assert not report.skipped
        found.append(([p.detach().clone() for p in net.parameters()], torch.get_rng_state(), report.loss))
    assert terms is not None and terms.latest is not None
    for one, other in zip(found[0][0], found[1][0], strict=True):
        assert torch.equal(one, other)
    assert torch.equal(found[0][1], found[1][1]) and found[0][2] == found[1][2]


def test_the_loss_scale_is_taken_out() -> None:
    norms = []
    for precision in ("fp32", "fp16"):
        net = model()[:1]
        step = Step(net, two_heads, adamw(net.parameters()), precision=precision, loss_scale=1024.0)
        terms = TermGradients(step, 1)
        step(window())
        assert terms.latest is not None
        norms.append(terms.latest.norms)
    assert norms[1] == {name: pytest.approx(norm, rel=1e-2) for name, norm in norms[0].items()}


def test_between_two_measurements_nothing_is_walked(monkeypatch) -> None:
    net = model()
    step = Step(net, two_heads, adamw(net.parameters()))
    terms = TermGradients(step, 4)
    calls = []
    grad = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: calls.append(step.clocks.windows + 1) or grad(*a, **k))
    alone = []
    for number in range(1, 9):
        step(window())
        if terms.latest is not None:
            alone.append(number)
            report = Report(dict, {}, {}, (1, 1, 0))
            terms.look({}, report)
            assert ("terms/fit/norm" in report.measured) == (number in (1, 4, 8))
    # "sign" weighs otherwise than "fit", so the step itself walks it apart in every window: 3 micro-batches each.
    assert [calls.count(number) for number in range(1, 9)] == [9, 3, 3, 9, 3, 3, 3, 9]


def test_a_window_that_is_not_finite_or_was_joined_in_its_middle_tells_nothing() -> None:
    net = model()
    step = Step(net, two_heads, adamw(net.parameters()))
    terms = TermGradients(step, 1)
    batches = window()
    step.accumulate(batches[0])  # nobody knows yet where the window ends
    step(batches)
    assert terms.latest is None
    bad = [(batches[0][0] * float("nan"), batches[0][1]), *batches[1:]]
    assert step(bad).skipped
    assert terms.latest is None
    step(batches)
    assert terms.latest is not None


def test_an_objective_without_names_is_refused() -> None:
    net = model()
    with pytest.raises(ConfigError, match="compares the named terms of an objective, and the objective Supervised"):
        TermGradients(Step(net, supervised(nn.MSELoss()), adamw(net.parameters())), 1)
    step = Step(net, lambda m, batch: m(batch[0]).square().mean(), adamw(net.parameters()))
    TermGradients(step, 100)
    before = [p.detach().clone() for p in net.parameters()]
    with pytest.raises(ConfigError, match=r"set diagnose\.term_gradients=null"):
        step(window())
    assert all(torch.equal(one, other) for one, other in zip(before, net.parameters(), strict=True))


def test_what_cannot_run_backward_twice_is_said_and_left() -> None:
    class Reentrant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, x.requires_grad_(), use_reentrant=True)

    net = Reentrant()
    step = Step(net, lambda m, b: {"a": m(b[0]).square().mean(), "b": m(b[0]).mean()}, adamw(net.parameters()))
    terms = TermGradients(step, 1)
    for _ in range(3):
        assert not step(window()).skipped
    report = Report(dict, {}, {}, (1, 1, 0))
    (said,) = terms.look({}, report)
    assert said.startswith("diagnose.term_gradients measures no more: 'inner.weight' gets its gradient beside")
    assert terms.latest is None and report.measured == {} and terms.look({}, report) == []


def test_a_backward_that_needs_to_be_the_last_is_said_and_left() -> None:
    class LastOnly(torch.autograd.Function):
        """As what torch.compile makes, which gives its saved tensors away."""

        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, gradient):
            if torch._C._autograd._get_current_graph_task_keep_graph():
                raise RuntimeError("this backward was compiled with donated buffers")
            return gradient * 2

    net = model()

    def objective(m, b):
        return {"a": LastOnly.apply(m(b[0])).square().mean(), "b": m[0].weight.square().sum()}

    step = Step(net, objective, adamw(net.parameters()))
    terms = TermGradients(step, 1)
    assert not step(window()).skipped
    (said,) = terms.look({}, Report(dict, {}, {}, (1, 1, 0)))
    assert said.endswith("a term's backward cannot run twice here (this backward was compiled with donated buffers).")


def own_rows(rank: int) -> list[Batch]:
    return window()[:2] if rank else window()[2:]


def measured(step: Step, rows: list[Batch]) -> list[dict[str, float]]:
    terms, sources = TermGradients(step, 1), SourceGradients(step, 1, lambda batch: "all")
    step(rows)
    assert terms.latest is not None and sources.latest is not None
    return [terms.latest.norms, sources.latest.norms]


def on_ranks(rank: int, world: int, watched: bool) -> tuple[list[Tensor], list[dict[str, float]]]:
    """Two windows whose rows are unevenly dealt; what each rank measured in the first."""
    net = model().eval()
    step = Step(net, two_heads, adamw(net.parameters()), ranks=ManyProcesses())
    found: list[dict[str, float]] = []
    if watched:
        found = measured(step, own_rows(rank))
    else:
        step(own_rows(rank))
    step(own_rows(rank))
    return [p.detach() for p in net.parameters()], found


def test_over_ranks_each_looks_at_its_own_rows_and_the_run_is_the_same() -> None:
    found, plainly = over_ranks(on_ranks, True), over_ranks(on_ranks, False)
    for rank in range(2):
        assert all(torch.equal(left, right) for left, right in zip(found[rank][0], plainly[rank][0], strict=True))
        net = model().eval()
        alone = measured(Step(net, two_heads, adamw(net.parameters())), own_rows(rank))
        for norms, expected in zip(found[rank][1], alone, strict=True):
            assert norms == {name: pytest.approx(norm, rel=1e-5) for name, norm in expected.items()}
