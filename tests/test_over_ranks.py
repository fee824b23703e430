"""Windows over two ranks against the same rows on one: the gradient is one, however the rows are dealt and cut."""

import math

import pytest
import torch
from ranks import over_ranks, pool
from torch import Tensor, nn

from trainer import Cotangents, Step, Sum
from trainer.distributed import ManyProcesses
from trainer.distributed.buckets import Buckets
from trainer.errors import Paused
from trainer.gradient.report import FREE_READS
from trainer.optim import adamw, sgd

Cut = list[tuple[int, int]]


class Branches(nn.Module):
    """A trunk and two heads; the second is used where a row's first number is above 1 only."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(3, 8), nn.Tanh())
        self.heads = nn.ModuleList([nn.Linear(8, 2), nn.Linear(8, 2)])
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        inner = self.trunk(x)
        y = self.heads[0](inner)
        return y + self.heads[1](inner) * (x[:, :1] > 1) if bool((x[:, 0] > 1).any()) else y


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(12, 2, sparse=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.table((x[:, 0].abs() * 4).long().clamp(max=11))


class Waves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 2, dtype=torch.complex128))

    def forward(self, x: Tensor) -> Tensor:
        return (x.to(self.w.dtype) @ self.w).abs()


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))


MODELS = {"mlp": mlp, "branches": Branches, "words": Words, "waves": Waves}


def tokens(model, batch):
    """Each row counts as much as its target says: known only with the forward."""
    error = (model(batch[0]) - batch[2]).square().sum(1)
    return Sum((error * batch[3]).sum(), batch[3].sum())


def both(model, batch):
    """Two terms, each with a weight of its own."""
    out = model(batch[0])
    return {
        "error": Sum((out - batch[2]).square().sum(), out.numel()),
        "size": Sum((out.abs().sum(1) * batch[3]).sum(), batch[3].sum()),
    }


def means(model, batch):
    out = model(batch[0])
    return {"error": (out - batch[2]).square().mean(), "size": out.abs().mean()}


class Told:
    """Two means with weights that it tells by name."""

    def __call__(self, model, batch):
        out = model(batch[0])
        weighed = (out.abs().sum(1) * batch[3]).sum() / batch[3].sum()
        return {"error": (out - batch[2]).square().mean(), "size": weighed}

    def weight(self, batch):
        return {"error": batch[2].numel(), "size": batch[3].sum()}


def sometimes(model, batch):
    """A second term in micro-batches with a large number only."""
    out = model(batch[0])
    parts = {"error": Sum((out - batch[2]).square().sum(), out.numel())}
    if bool((batch[0] > 2).any()):
        parts["large"] = Sum(out.square().sum(), batch[3].sum())
    return parts


def vector(model, batch):
    out = model(batch[0])
    return Cotangents(out, batch[2], len(out))


class CrossEntropy:
    def __init__(self) -> None:
        self.loss = nn.CrossEntropyLoss()

    def __call__(self, model, batch):
        return self.loss(model(batch[0]), batch[1])

    def weight(self, batch):
        return (batch[1] != -100).sum()


OBJECTIVES = {
    "tokens": tokens, "both": both, "means": means, "told": Told(), "sometimes": sometimes, "vector": vector,
    "cross_entropy": CrossEntropy(),
}  # fmt: skip


def rows(count: int = 40) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(count, 3, generator=generator, dtype=torch.float64)
    classes = torch.randint(2, (count,), generator=generator)
    classes[::5] = -100
    y = torch.randn(count, 2, generator=generator, dtype=torch.float64)
    return [x, classes, y, torch.randint(1, 9, (count,), generator=generator).double()]


def runs(ranks, cuts: list[Cut], model: str, objective: str, whole: bool = True, dtype=torch.float64, **toggles):
    """The gradients and reports of as many windows as there are cuts."""
    torch.manual_seed(0)
    made = MODELS[model]()
    made = made if model == "waves" else made.to(dtype)
    step = Step(made, OBJECTIVES[objective], torch.optim.SGD(made.parameters(), lr=0.01), ranks=ranks, **toggles)
    data = [one.to(dtype) if one.is_floating_point() else one for one in rows()]
    found = []
    for cut in cuts:
        window = [tuple(one[start:end] for one in data) for start, end in cut]
        if whole:
            report = step(window)
        else:
            for micro_batch in window:
                step.accumulate(micro_batch)
            report = step.finish()
        gradients = {name: p.grad for name, p in made.named_parameters()}
        told = (report.loss, report.terms, report.weights, report.grad_norm or 0.0, report.skipped, report.clocks)
        found.append(({name: g if g is None else g.to_dense().clone() for name, g in gradients.items()}, told))
    return found


def dealt(rank, world, cuts, *arguments, **keywords):
    return runs(ManyProcesses(), cuts[rank], *arguments, **keywords)


def holds_alike(cuts: list[list[Cut]], *arguments, closely: float = 1e-12, **keywords) -> None:
    """Both ranks give what one gives that has all the micro-batches."""
    left, right = over_ranks(dealt, cuts, *arguments, **keywords)
    alone = runs(None, [one + other for one, other in zip(*cuts, strict=True)], *arguments, **keywords)
    for here, there, one in zip(left, right, alone, strict=True):
        assert here[1] == there[1]
        assert here[0].keys() == there[0].keys() == one[0].keys()
        norm = math.sqrt(sum(float(g.abs().square().sum()) for g in one[0].values() if g is not None))
        for name, gradient in one[0].items():
            if gradient is None:
                assert here[0][name] is None and there[0][name] is None, name
            else:
                assert torch.equal(here[0][name], there[0][name])
                assert float((here[0][name] - gradient).abs().max()) <= closely * norm, name
        loss, terms, weights, *others = here[1]
        assert loss == pytest.approx(one[1][0], rel=closely)
        assert terms == pytest.approx(one[1][1], rel=closely) and weights == pytest.approx(one[1][2], rel=closely)
        assert others == [pytest.approx(theirs, rel=closely) for theirs in one[1][3:]]


EVEN = [[[(0, 10), (10, 20)]] * 3, [[(20, 30), (30, 40)]] * 3]
UNEVEN = [[[(0, 3)], [(0, 9), (9, 10)], [(5, 6)]], [[(3, 20), (20, 33), (33, 40)], [(10, 40)], [(0, 5), (6, 40)]]]
EMPTY = [[[], [(0, 9)], []], [[(0, 20), (20, 40)], [], [(3, 31)]]]


@pytest.mark.parametrize("cuts", [EVEN, UNEVEN, EMPTY], ids=["even", "uneven", "empty"])
@pytest.mark.parametrize("objective", [*OBJECTIVES])
def test_every_kind_of_weight(objective, cuts) -> None:
    holds_alike(cuts, "mlp", objective)


@pytest.mark.parametrize("reduction", ["sum", "micro_batches"])
@pytest.mark.parametrize("objective", ["tokens", "both", "means", "cross_entropy"])
def test_every_reduction(objective, reduction) -> None:
    holds_alike(UNEVEN, "mlp", objective, reduction=reduction)
    holds_alike(EVEN, "mlp", objective, whole=False, reduction=reduction)


@pytest.mark.parametrize("objective", ["tokens", "means", "cross_entropy", "both"])
def test_micro_batches_that_come_one_by_one(objective) -> None:
    holds_alike(UNEVEN, "mlp", objective, whole=False)
    holds_alike(EMPTY, "mlp", objective, whole=False)


@pytest.mark.parametrize("objective", ["tokens", "cross_entropy", "both"])
@pytest.mark.parametrize("zero_grad", ["zeros", "never"])
def test_what_stood_in_grad_is_zeroed_or_kept_as_with_one(objective, zero_grad) -> None:
    holds_alike(UNEVEN, "mlp", objective, zero_grad=zero_grad, clip_norm=0.5)


@pytest.mark.parametrize("model", ["branches", "words", "waves"])
@pytest.mark.parametrize("cuts", [UNEVEN, EMPTY], ids=["uneven", "empty"])
def test_parameters_without_a_gradient_on_one_rank_sparse_and_complex_gradients(model, cuts) -> None:
    holds_alike(cuts, model, "tokens")
    holds_alike(cuts, model, "cross_entropy", clip_norm=0.3)


def test_float32_and_half_precision() -> None:
    holds_alike(UNEVEN, "mlp", "tokens", dtype=torch.float32, closely=1e-6)
    holds_alike(UNEVEN, "mlp", "tokens", dtype=torch.bfloat16, closely=2e-2)


def dealt_on_a_device(rank, world, cuts, *arguments, **keywords):
    """The CPU treated as a device whose numbers are not read."""
    FREE_READS.discard("cpu")
    try:
        return runs(ManyProcesses(), cuts[rank], *arguments, **keywords)
    finally:
        FREE_READS.add("cpu")


@pytest.mark.parametrize("objective", ["tokens", "both", "means", "told", "sometimes"])
def test_the_path_of_a_device(objective) -> None:
    for cuts in (UNEVEN, EMPTY):
        left, right = over_ranks(dealt_on_a_device, cuts, "mlp", objective, clip_norm=0.5)
        read, _ = over_ranks(dealt, cuts, "mlp", objective, clip_norm=0.5)
        for here, there, known in zip(left, right, read, strict=True):
            assert here[1] == there[1]
            assert here[1][0] == pytest.approx(known[1][0], rel=1e-6) and here[1][4:] == known[1][4:]
            for name, gradient in known[0].items():
                assert torch.equal(here[0][name], there[0][name])
                torch.testing.assert_close(here[0][name], gradient, rtol=1e-6, atol=1e-9)


def free(rank, world, cuts, clip_norm, objective):
    return fifty(ManyProcesses() if world > 1 else None, cuts[rank], clip_norm, objective)


def fifty(ranks, cuts, clip_norm, objective, steps=50):
    torch.manual_seed(0)
    model = mlp().double()
    step = Step(model, OBJECTIVES[objective], adamw(model.parameters(), lr=1e-2), ranks=ranks, clip_norm=clip_norm)
    data, found = rows(), []
    for number in range(steps):
        start = [p.detach().clone() for p in model.parameters()]
        report = step([tuple(one[a:b] for one in data) for a, b in cuts[number % len(cuts)]])
        found.append((start, [p.grad.clone() for p in model.parameters()], report.clip_factor))
    return [p.detach() for p in model.parameters()], found


@pytest.mark.parametrize("objective", ["cross_entropy", "tokens"])
def test_fifty_steps_of_adamw_with_clipping(objective) -> None:
    """The free-running parameters, and each step's gradient taken at the same parameters."""
    left, right = over_ranks(free, UNEVEN, 0.1, objective)
    together = [one + other for one, other in zip(*UNEVEN, strict=True)]
    alone, _ = fifty(None, together, 0.1, objective)
    assert all(torch.equal(one, other) for one, other in zip(left[0], right[0], strict=True))
    farthest = max(float((one - other).abs().max()) for one, other in zip(left[0], alone, strict=True))
    assert farthest <= 1e-9
    assert all(clip is not None for _, _, clip in left[1]) and any(clip < 1 for _, _, clip in left[1])
    data = rows()
    for number, (start, gradients, clip) in enumerate(left[1]):
        model = mlp().double()
        with torch.no_grad():
            for parameter, value in zip(model.parameters(), start, strict=True):
                parameter.copy_(value)
        # The reference, by hand: one batch, one division.
        used = torch.cat([torch.arange(a, b) for a, b in together[number % 3]])
        batch = tuple(one[used] for one in data)
        if objective == "tokens":
            answer = tokens(model, batch)
            loss = answer.total / answer.weight
        else:
            loss = nn.functional.cross_entropy(model(batch[0]), batch[1])
        loss.backward()
        true = torch.cat([p.grad.flatten() for p in model.parameters()])
        found = torch.cat([g.flatten() for g in gradients]) / clip
        assert float((found - true).norm()) <= 1e-12 * float(true.norm())


def large(rank, world):
    """Gradients beyond the first buffer, and one that is summed where it lies."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 4000), nn.Linear(4000, 1, bias=False)).float()
    step = Step(model, lambda m, b: m(b).square().mean(), sgd(model.parameters(), lr=1e-3), ranks=ManyProcesses())
    x = torch.randn(6, 300)
    reports = [step([x[:2]] if rank else [x[2:4], x[4:]]).loss for _ in range(2)]
    with torch.no_grad():
        return reports, [float(p.double().sum()) for p in model.parameters()], [p.grad for p in model.parameters()]


def test_large_gradients_go_through_all_kinds_of_buffers() -> None:
    left, right = over_ranks(large)
    assert left[:2] == right[:2]
    assert all(torch.equal(one, other) for one, other in zip(left[2], right[2], strict=True))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 4000), nn.Linear(4000, 1, bias=False))
    step = Step(model, lambda m, b: m(b).square().mean(), sgd(model.parameters(), lr=1e-3))
    x = torch.randn(6, 300)
    losses = [step([x]).loss for _ in range(2)]
    assert left[0] == pytest.approx(losses, rel=1e-5)
    for parameter, gradient in zip(model.parameters(), left[2], strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)


def poisoned(rank, world, where, nonfinite="skip"):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
    bad = {"at": False}
    if where == "gradient" and rank == 1:
        model[0].weight.register_hook(lambda g: g * math.inf if bad["at"] else g)
    step = Step(model, tokens, adamw(model.parameters(), lr=1e-2), ranks=ManyProcesses(), nonfinite=nonfinite)
    data = rows()
    window = [tuple(one[a:b] for one in data) for a, b in ([(0, 10), (10, 20)] if rank else [(20, 40)])]
    step(window)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    if where == "loss" and rank == 1:
        window[1] = (window[1][0] * math.nan, *window[1][1:])
    bad["at"] = True
    report = step(window)
    kept = all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    bad["at"] = False
    clean = [tuple(one[a:b] for one in data) for a, b in ([(0, 10), (10, 20)] if rank else [(20, 40)])]
    return report.skipped, report.reason, kept, step.clocks.as_dict(), step(clean).skipped


def test_one_verdict_for_all_and_the_reason_names_the_rank() -> None:
    for left, right in [over_ranks(poisoned, "loss")]:
        assert left[:1] == right[:1] == (True,) and left[2] and right[2] and left[3] == right[3]
        assert left[1] == right[1] == "on rank 1 the loss of micro-batch 2 of 2 is nan"
        assert left[3]["steps"] == 1 and not left[4]
    left, right = over_ranks(poisoned, "gradient")
    assert left[1] == right[1] == "on rank 1 the gradient of 0.weight is not finite, while the loss is"
    assert left[0] and left[2] and right[2] and not left[4]
    outcomes = pool().outcomes(poisoned, "loss", nonfinite="raise")
    assert [(kind, said[0]) for kind, said in outcomes] == [("failed", "DivergedError")] * 2
    assert outcomes[0][1][1] == outcomes[1][1][1] and "on rank 1 the loss" in outcomes[0][1][1]


def overflows(rank, world):
    """Each rank's gradient is finite, their sum is not."""
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0)
    step = Step(model, lambda m, b: Sum(m(b).sum() * 3e38, 1.0), sgd(model.parameters(), lr=1.0), ranks=ManyProcesses())
    report = step([torch.ones(1, 1)])
    return report.skipped, report.reason, float(model.weight)


def test_a_sum_that_overflows_is_a_skip_on_every_rank() -> None:
    left, right = over_ranks(overflows)
    assert left == right and left[0] and left[2] == 1.0


def ruled(rank, world, answer):
    """The user's own rule says on rank 1 alone, in the second window, that the step must not be taken."""
    model = mlp().double()
    rule = lambda report: answer if rank == 1 and report.clocks["windows"] == 1 else None  # noqa: E731
    step = Step(model, tokens, adamw(model.parameters(), lr=1e-2), ranks=ManyProcesses(), skip_if=rule)
    reports = [step([tuple(one[rank * 20 : rank * 20 + 20] for one in rows())]) for _ in range(3)]
    return [(report.skipped, report.reason) for report in reports], step.clocks.as_dict()


def test_one_ranks_rule_is_the_verdict_of_all() -> None:
    for answer, said in ((True, "on rank 1 skip_if said so"), ("the moon is full", "on rank 1 the moon is full")):
        left, right = over_ranks(ruled, answer)
        assert left == right
        assert left[0] == [(False, None), (True, said), (False, None)] and left[1]["steps"] == 2


def other_parameters(rank, world):
    model = mlp().double()
    model[0].weight.requires_grad_(rank == 0)
    data = rows()
    step = Step(model, tokens, adamw(model.parameters(), lr=1e-2), ranks=ManyProcesses())
    step([tuple(one[:10] for one in data)])


def unlike_terms(rank, world):
    """On rank 1 the second of two means comes later than the first: there it has a weight of its own."""
    model = mlp().double()
    data = rows()
    calls = []

    def objective(m, b):
        calls.append(1)
        found = means(m, b)
        return found if rank == 0 or len(calls) > 1 else {"error": found["error"]}

    step = Step(model, objective, adamw(model.parameters(), lr=1e-2), ranks=ManyProcesses())
    for start in (0, 10):
        step.accumulate(tuple(one[start : start + 10] for one in data))
    step.finish()


def test_what_does_not_go_together_is_said_on_every_rank() -> None:
    for case, kind, words in (
        (other_parameters, "GradientError", "the ranks do not train the same parameters"),
        (unlike_terms, "ObjectiveError", "the terms 'error' and 'size' come in other micro-batches"),
    ):
        for outcome, said in pool().outcomes(case):
            assert outcome == "failed" and said[0] == kind and words in said[1], said


def test_there_must_be_a_process_group() -> None:
    with pytest.raises(Exception, match="there is no process group: call torch.distributed.init_process_group"):
        ManyProcesses()


def only_sent(rank, world):
    parameters = {"large": torch.zeros(1100, 1100), "small": torch.zeros(3)}
    gradients = {name: torch.full_like(parameter, rank + 1.0) for name, parameter in parameters.items()}
    buckets = Buckets(parameters, 2, torch.device("cpu"))
    buckets.head.fill_(1.0)
    buckets.send(ManyProcesses(), gradients)
    head = buckets.receive_head().tolist()
    buckets.drop()
    return head, [(gradient == rank + 1.0).all().item() for gradient in gradients.values()]


def test_what_was_sent_and_dropped_leaves_the_gradients_as_they_were() -> None:
    assert over_ranks(only_sent) == [([2.0, 2.0], [True, True])] * 2


def leaves_open(rank, world, on_device):
    """One rank stops inside its window; both go on with theirs. What was summed in place must not have been."""

    def run(stops: bool):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(1100, 1100), nn.Tanh(), nn.Linear(1100, 700), nn.Linear(700, 3))
        step = Step(model, lambda m, b: m(b).square().mean(), sgd(model.parameters(), lr=0.1), ranks=ManyProcesses())
        window = [torch.randn(2, 1100, generator=torch.Generator().manual_seed(10 * rank + at)) for at in range(3)]
        if stops:
            held = None
            try:
                step(window, between=step.reducer.leave_open if rank else None)
            except Paused:
                held = [p.grad.clone() for p in model.parameters()]
            assert held is not None and step.is_open and step._open.micro_batches == (1 if rank else 3)
            alone = Step(model, step.objective, sgd(model.parameters(), lr=0.0))
            grads = [p.grad for p in model.parameters()]
            for p in model.parameters():
                p.grad = None
            for batch in window[: step._open.micro_batches]:
                alone.accumulate(batch)
            for mine, p in zip(held, model.parameters(), strict=True):
                assert torch.nn.functional.cosine_similarity(mine.flatten(), p.grad.flatten(), dim=0) > 0.999999
            for p, grad in zip(model.parameters(), grads, strict=True):
                p.grad = grad
        report = step(window)
        return [p.detach() for p in model.parameters()], report.loss, report.rows, report.reductions

    if on_device:
        FREE_READS.discard("cpu")
    try:
        (whole, *told), (stopped, *told_then) = run(False), run(True)
    finally:
        FREE_READS.add("cpu")
    return all(torch.equal(one, other) for one, other in zip(whole, stopped, strict=True)), told == told_then


@pytest.mark.parametrize("on_device", [False, True])
def test_a_window_that_is_left_open_is_as_it_was_on_every_rank(on_device) -> None:
    assert over_ranks(leaves_open, on_device) == [(True, True)] * 2
