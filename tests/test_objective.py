"""What an objective may answer: its four forms reach the gradient, everything else gets a sentence."""

import pytest
import torch
from reference import cut, farthest, mlp, rows
from torch import Tensor, nn

from trainer import ConfigError, Cotangents, ObjectiveError, Step, Sum, supervised
from trainer.gradient.objective import terms_of
from trainer.gradient.weigher import Weigher
from trainer.optim import Manual

DATA = rows(9)
WINDOW = cut(DATA, [4, 2, 3])


def grads(
    objective: object, whole: bool, window: list[object] = WINDOW, **toggles: object
) -> tuple[dict[str, Tensor], object]:
    """The gradient of the window by an objective, drawn whole or one by one, and the report."""
    model = mlp()
    step = Step(model, objective, torch.optim.SGD(model.parameters(), lr=0.0), **toggles)
    if whole:
        report = step(window)
    else:
        for micro_batch in window:
            step.accumulate(micro_batch)
        report = step.finish()
    return {name: parameter.grad for name, parameter in model.named_parameters()}, report


def by_hand(function: object) -> dict[str, Tensor]:
    """The gradient of a function of the model on all rows at once."""
    model = mlp()
    function(model, *DATA).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def error(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    return (model(inputs) - targets).square().sum(1)


def size(model: nn.Module, inputs: Tensor) -> Tensor:
    return model(inputs).abs().sum(1)


def even(inputs: Tensor) -> Tensor:
    """A mask of rows: the second term counts only these, so its weight differs from the first one's."""
    return (inputs[:, 0] > -0.3).double()


class Told:
    """Two terms with weights of their own, told before by `weight`."""

    def __call__(self, model: nn.Module, micro_batch: tuple[Tensor, Tensor]) -> dict[str, object]:
        inputs, targets = micro_batch
        masked = (size(model, inputs) * even(inputs)).sum()
        return {"error": error(model, inputs, targets).mean(), "size": Sum(masked, even(inputs).sum())}

    def weight(self, micro_batch: tuple[Tensor, Tensor]) -> dict[str, object]:
        return {"error": len(micro_batch[0]), "size": even(micro_batch[0]).sum()}


def sums_only(model: nn.Module, micro_batch: tuple[Tensor, Tensor]) -> dict[str, Sum]:
    inputs, targets = micro_batch
    return {
        "error": Sum(error(model, inputs, targets).sum(), len(inputs)),
        "size": Sum((size(model, inputs) * even(inputs)).sum(), even(inputs).sum()),
    }


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("objective", [Told(), sums_only])
@pytest.mark.parametrize("clip", [None, 1e9])
def test_named_terms_each_have_their_own_weight(objective: object, whole: bool, clip: float | None) -> None:
    found, report = grads(objective, whole, coefficients={"size": 0.3}, clip_norm=clip)
    expected = by_hand(lambda m, x, y: error(m, x, y).mean() + 0.3 * (size(m, x) * even(x)).sum() / even(x).sum())
    # Without a clip what is left of the divisor is folded into the step: with lr = 0 it is still written to .grad.
    assert farthest(found, expected) <= 1e-12
    model = mlp()
    assert report.terms["error"] == pytest.approx(error(model, *DATA).mean().item(), rel=1e-12)
    assert report.loss == pytest.approx(report.terms["error"] + 0.3 * report.terms["size"], rel=1e-12)
    assert report.weights == {"error": 9.0, "size": float(even(DATA[0]).sum())}


@pytest.mark.parametrize("whole", [True, False])
def test_a_plain_callable_may_return_a_sum(whole: bool) -> None:
    found, report = grads(lambda m, b: Sum(error(m, *b).sum(), 2 * len(b[0])), whole)
    assert farthest(found, by_hand(lambda m, x, y: error(m, x, y).sum() / 18)) <= 1e-12
    assert report.weight == 18.0


@pytest.mark.parametrize("whole", [True, False])
def test_cotangents_over_several_micro_batches(whole: bool) -> None:
    def objective(m: nn.Module, b: tuple[Tensor, Tensor]) -> Cotangents:
        return Cotangents(m(b[0]), b[1], weight=len(b[0]))

    found, report = grads(objective, whole)
    assert farthest(found, by_hand(lambda m, x, y: (m(x) * y).sum() / 9)) <= 1e-12
    assert report.loss == pytest.approx((mlp()(DATA[0]) * DATA[1]).sum().item() / 9, rel=1e-12)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum", "micro_batches"])
def test_a_term_that_comes_in_some_micro_batches_is_divided_by_its_own(whole: bool, reduction: str) -> None:
    """Tasks that take turns: each mean's weight is that of the micro-batches it came in."""

    def objective(m: nn.Module, b: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        return {"short": size(m, b[0]).mean()} if len(b[0]) == 2 else {"long": error(m, *b).mean()}

    def expected(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        long = torch.cat([error(m, x[:4], y[:4]), error(m, x[6:], y[6:])])
        short = size(m, x[4:6])
        if reduction == "mean":
            return long.mean() + short.mean()
        if reduction == "sum":
            return long.sum() + short.sum()
        return (long[:4].mean() + long[4:].mean() + short.mean()) / 3

    assert farthest(grads(objective, whole, reduction=reduction)[0], by_hand(expected)) <= 1e-12


def test_a_term_that_joins_later_windows_has_the_right_divisor() -> None:
    names = ["error"]

    def objective(m: nn.Module, b: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        terms = {"error": error(m, *b).mean(), "size": size(m, b[0]).mean()}
        return {name: terms[name] for name in names}

    model = mlp()
    step = Step(model, objective, torch.optim.SGD(model.parameters(), lr=0.0))
    for name in (None, "size"):
        names += [name] if name else []
        for micro_batch in WINDOW:
            step.accumulate(micro_batch)
        step.finish()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert farthest(found, by_hand(lambda m, x, y: error(m, x, y).mean() + size(m, x).mean())) <= 1e-12


def test_weights_that_come_out_otherwise_than_told_are_refused() -> None:
    def leaves_one_out(m: nn.Module, b: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        terms = {"error": error(m, *b).mean()}
        return terms if len(b[0]) == 2 else {**terms, "size": size(m, b[0]).mean()}

    with pytest.raises(ObjectiveError, match=r"'error' and 'size' came out otherwise .*Sum\(total, 0.0\)"):
        grads(leaves_one_out, True)


def test_a_term_without_weight_in_the_window_says_nothing() -> None:
    def objective(m: nn.Module, b: tuple[Tensor, Tensor]) -> dict[str, Sum]:
        return {"error": Sum(error(m, *b).sum(), len(b[0])), "none": Sum(torch.zeros(()), 0.0)}

    found, report = grads(objective, True)
    assert farthest(found, by_hand(lambda m, x, y: error(m, x, y).mean())) <= 1e-12
    assert report.terms["none"] != report.terms["none"]
    assert report.loss == pytest.approx(report.terms["error"])
    assert not report.skipped


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (lambda m, b: (error(m, *b).sum(), 4), r"bare tuple: write Sum\(total, weight\).*or \{\"name\": loss"),
        (lambda m, b: [error(m, *b).sum()], r"bare list: write Sum\(total, weight\).*or \{\"name\": loss"),
        (lambda m, b: None, "returned None: return the loss"),
        (lambda m, b: {}, "empty mapping"),
        (lambda m, b: error(m, *b), r"shape \(4,\) for 'loss': reduce it to a scalar, or .*Cotangents"),
        (lambda m, b: {"a": error(m, *b)}, r"shape \(4,\) for 'a'"),
        (lambda m, b: {"a": 3.0}, "returned float for 'a'"),
        (lambda m, b: 3.0, "returned float"),
        (lambda m, b: Sum(error(m, *b), 4), "the total of 'loss' is no scalar"),
        (lambda m, b: Sum(error(m, *b).sum(), -1), "the weight of 'loss' is -1.0: it must be finite, zero or more"),
        (lambda m, b: Sum(error(m, *b).sum(), float("nan")), "is nan: it must be finite"),
        (lambda m, b: Sum(error(m, *b).sum(), float("inf")), "is inf: it must be finite"),
        (lambda m, b: Cotangents(m(b[0]), torch.ones(3)), r"shape \(4, 2\), its vector \(3,\)"),
        (lambda m, b: error(m, *b).mean().detach(), "without a graph: no parameter"),
        (lambda m, b: error(m, *b).mean() * 1j, "complex number"),
    ],
)
def test_what_cannot_be_meant_is_refused_and_the_next_window_works(answer: object, sentence: str) -> None:
    model = mlp()
    step = Step(model, answer, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ObjectiveError, match=sentence):
        step(WINDOW)
    step.objective = lambda m, b: error(m, *b).mean()
    assert not step(WINDOW).skipped


def test_no_grad_around_the_objective_is_named() -> None:
    with torch.no_grad(), pytest.raises(ObjectiveError, match="gradients are switched off here"):
        grads(lambda m, b: error(m, *b).mean(), True)


def test_supervised_says_what_it_needs() -> None:
    with pytest.raises(ConfigError, match=r"given a class: give an instance, MSELoss\(\)"):
        supervised(nn.MSELoss)
    with pytest.raises(ConfigError, match="given no loss"):
        supervised(3)
    with pytest.raises(ObjectiveError, match=r"supervised\(MSELoss\) needs micro-batches that are \(inputs, targets\)"):
        grads(supervised(nn.MSELoss()), True, [torch.ones(4, 3, 2)])
    assert repr(supervised(nn.MSELoss())) == "supervised(MSELoss), weighed by elements"


def test_supervised_calls_forward_where_the_model_is_not_callable() -> None:
    class Line:
        def __init__(self) -> None:
            self.w = torch.zeros(3, 2, dtype=torch.float64, requires_grad=True)

        def forward(self, inputs: Tensor) -> Tensor:
            return inputs @ self.w

    line = Line()
    Step(line, supervised(nn.MSELoss()), Manual([line.w], lr=1.0))(WINDOW)
    inputs, targets = DATA
    torch.testing.assert_close(line.w.detach(), inputs.T @ targets / 9)


def test_tokens_are_index_targets_with_more_than_one_to_a_row() -> None:
    objective = supervised(nn.CrossEntropyLoss())
    assert objective.tokens((torch.ones(2), torch.zeros(2, 5, dtype=torch.long))) == 10
    assert objective.tokens((torch.ones(2), torch.zeros(2, dtype=torch.long))) == 0
    assert objective.tokens((torch.ones(2), torch.zeros(2, 5))) == 0


def test_the_weigher_counts_rows_as_it_is_told() -> None:
    assert Weigher(lambda m, b: b).rows({"x": torch.ones(7, 2)}) == 7
    assert Weigher(lambda m, b: b).rows((torch.tensor(2.0),)) == 1
    assert Weigher(lambda m, b: b, lambda b: len(b["text"])).rows({"text": "abc"}) == 3
    with pytest.raises(ObjectiveError, match="does not name 'sise': did you mean 'size'"):
        Weigher(Told()).mean_weight("sise", WINDOW[0])
    with pytest.raises(ObjectiveError, match="the weight of 'loss' is -4.0"):
        Weigher(type("Bad", (), {"weight": lambda self, b: -4.0})()).mean_weight("loss", WINDOW[0])
    with pytest.raises(ConfigError, match="'weight' that cannot be called"):
        Weigher(type("Bad", (), {"weight": 3})())


def test_terms_keep_the_order_and_the_names() -> None:
    one = torch.ones((), requires_grad=True)
    terms = terms_of({"b": one, 3: Sum(one, 2)}, None)
    assert [(term.name, term.weight) for term in terms] == [("b", None), ("3", 2.0)]
