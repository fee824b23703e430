"""Evaluation: exactly weighed, in the gradient mode asked for, and afterwards everything bit for bit as it was."""

import math
import random
import weakref

import numpy
import pytest
import torch
from torch import nn

from trainer import ConfigError, DataError, GradientError, Step, Sum, rng, supervised
from trainer.evaluate import Evaluation
from trainer.optim import sgd

MODES = ["no_grad", "inference_mode", "enabled"]
MSE = supervised(nn.MSELoss())


def rows(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(count, 3, generator=generator, dtype=torch.float64),
        torch.randn(count, 2, generator=generator, dtype=torch.float64),
    )


def cut(data, sizes):
    return list(zip(*(tensor.split(sizes) for tensor in data), strict=True))


def linear() -> nn.Linear:
    return nn.Linear(3, 2, dtype=torch.float64)


# What comes out.


@pytest.mark.parametrize("sizes", [[11], [4, 4, 3], [1, 10], [5, 5, 1], [1] * 11])
def test_ragged_batches_give_the_same_as_one(sizes) -> None:
    model, data = linear(), rows(11)

    def metrics(model, batch):
        wrong = (model(batch[0]) - batch[1]).abs()
        return {"error": Sum(wrong.sum(), wrong.numel()), "rows": Sum(torch.tensor(float(len(wrong))), 1)}

    found, seen = Evaluation(MSE, metrics)(model, cut(data, sizes))
    assert list(found) == ["loss", "error", "rows"]
    assert found["loss"] == pytest.approx(nn.functional.mse_loss(model(data[0]), data[1]).item(), abs=1e-15)
    assert found["error"] == pytest.approx((model(data[0]) - data[1]).abs().mean().item(), abs=1e-15)
    assert found["rows"] == pytest.approx(11 / len(sizes))
    assert seen == 11


def test_ignored_targets_do_not_count() -> None:
    logits, targets = torch.randn(9, 4, dtype=torch.float64), torch.tensor([0, -100, 2, 3, -100, -100, 1, 1, 0])
    found, seen = Evaluation(supervised(nn.CrossEntropyLoss()))(nn.Identity(), cut((logits, targets), [3, 3, 3]))
    assert found["loss"] == pytest.approx(nn.functional.cross_entropy(logits, targets).item(), abs=1e-15)
    assert seen == 9
    ignored = torch.full((3,), -100)
    found, _ = Evaluation(supervised(nn.CrossEntropyLoss()))(nn.Identity(), [(logits[:3], ignored), (logits, targets)])
    assert found["loss"] == pytest.approx(nn.functional.cross_entropy(logits, targets).item(), abs=1e-15)


def test_what_weighs_nothing_has_no_mean() -> None:
    ignored = torch.full((3,), -100)
    found, seen = Evaluation(supervised(nn.CrossEntropyLoss()))(nn.Identity(), [(torch.zeros(3, 2), ignored)])
    assert math.isnan(found["loss"])
    assert seen == 3

    def objective(model, batch):
        return {"a": Sum(batch[0].sum(), 3), "b": Sum(batch[0].sum(), 0)}

    found, _ = Evaluation(objective)(None, [(torch.ones(6),)])
    assert found["loss"] == found["a"] == 2.0
    assert math.isnan(found["b"])


def test_named_terms_with_coefficients_each_by_its_own_weight() -> None:
    def objective(model, batch):
        return {"fit": batch[0].mean(), "size": Sum(batch[0].sum() * 2, 4)}

    data = [(torch.tensor([1.0, 2.0, 3.0]),), (torch.tensor([10.0]),)]
    found, _ = Evaluation(objective, coefficients={"size": 0.5})(None, data)
    assert found["fit"] == 4.0
    assert found["size"] == 32 / 8
    assert found["loss"] == 4.0 + 0.5 * 4.0
    assert list(found) == ["loss", "fit", "size"]


def test_rows_are_counted_as_asked() -> None:
    def objective(model, batch):
        return batch["x"].mean()

    data = [{"x": torch.zeros(2, 3)}, {"x": torch.ones(1, 6)}]
    assert Evaluation(objective)(None, data)[0]["loss"] == pytest.approx(1 / 3)
    found = Evaluation(objective, count_rows=lambda batch: batch["x"].shape[1])(None, data)
    assert found == ({"loss": pytest.approx(6 / 9)}, 9)


class MeanError:
    """A metric as torchmetrics has them: update, compute, reset."""

    def __init__(self) -> None:
        self.total, self.count, self.resets = torch.tensor(99.0), 0, 0

    def update(self, outputs, targets) -> None:
        self.total = self.total + (outputs - targets).abs().sum()
        self.count += targets.numel()

    def compute(self):
        return self.total / self.count

    def reset(self) -> None:
        self.total, self.count = torch.tensor(0.0), 0
        self.resets += 1


def test_torchmetrics_objects_are_updated_by_batch_and_reset_each_time() -> None:
    model, data, metric = linear(), rows(7), MeanError()
    evaluation = Evaluation(MSE, {"error": metric})
    expected = (model(data[0]) - data[1]).abs().mean().item()
    for times in (1, 2):
        found, _ = evaluation(model, cut(data, [4, 3]))
        assert found["error"] == pytest.approx(expected, abs=1e-15)
        assert metric.resets == times


def test_torchmetrics_objects_also_with_a_plain_object() -> None:
    class Plain:
        def forward(self, x):
            return x[:, :2]

    data = rows(4)
    found, _ = Evaluation(MSE, {"error": MeanError()})(Plain(), [data])
    assert found["error"] == pytest.approx((data[0][:, :2] - data[1]).abs().mean().item())


@pytest.mark.parametrize(
    ("metrics", "sentence"),
    [
        (lambda m, b: {"accuracy": torch.tensor(0.5)}, r"the metric 'accuracy' is Tensor: return Sum\(total, weight\)"),
        (lambda m, b: {"accuracy": 0.5}, "the metric 'accuracy' is float"),
        (lambda m, b: {"loss": Sum(torch.tensor(1.0), 1)}, "under a name other than loss"),
        (lambda m, b: (torch.tensor(1.0), 2), r"metrics\(\.\.\.\) returned tuple: return \{name: Sum"),
        (lambda m, b: None, r"returned NoneType"),
        ({"accuracy": 3}, r"metrics\['accuracy'\] is int: a mapping holds torchmetrics objects"),
        ({"loss": MeanError()}, "the metric 'loss' has the name of one of the objective's terms"),
    ],
)
def test_a_metric_that_cannot_be_summed_is_refused(metrics, sentence) -> None:
    with pytest.raises(ConfigError, match=sentence):
        Evaluation(MSE, metrics)(linear(), [rows(3)])


def test_a_metric_with_the_name_of_a_term_is_refused() -> None:
    evaluation = Evaluation(lambda m, b: {"fit": b[0].mean()}, lambda m, b: {"fit": Sum(b[0].sum(), 1)})
    with pytest.raises(ConfigError, match="the metric 'fit' has the name of one of the objective's terms"):
        evaluation(None, [rows(3)])


def test_torchmetrics_objects_need_pairs() -> None:
    evaluation = Evaluation(lambda m, b: b["x"].mean(), {"error": MeanError()})
    with pytest.raises(ConfigError, match=r"\(inputs, targets\) pairs, the data has dict"):
        evaluation(None, [{"x": torch.ones(2)}])


def test_no_data_is_no_loss_of_zero() -> None:
    with pytest.raises(DataError, match="the evaluation data gave no micro-batch"):
        Evaluation(MSE)(linear(), [])


def test_an_unknown_gradient_mode_is_refused() -> None:
    with pytest.raises(ConfigError, match="grad_mode='off' is not possible: choose one of no_grad, inference_mode"):
        Evaluation(MSE, grad_mode="off")


# The gradient mode.


@pytest.mark.parametrize("mode", MODES)
def test_the_objective_and_the_metrics_see_the_mode_asked_for(mode) -> None:
    seen = []

    def look(model, batch):
        loss = MSE(model, batch)
        seen.append((loss.grad_fn is not None, loss.is_inference(), torch.is_grad_enabled()))
        return loss

    def metrics(model, batch):
        return {"same": Sum(look(model, batch), 1)}

    model = linear()
    values = Evaluation(look, metrics, grad_mode=mode)(model, cut(rows(5), [3, 2]))[0]
    assert seen == [(mode == "enabled", mode == "inference_mode", mode == "enabled")] * 4
    assert values == Evaluation(MSE, metrics)(model, cut(rows(5), [3, 2]))[0]
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


def test_a_gradient_inside_the_loss_needs_enabled() -> None:
    def penalty(model, batch):
        inputs = batch[0].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(model(inputs).sum(), inputs, create_graph=True)
        return gradient.square().sum(1).mean()

    model = linear()
    found, _ = Evaluation(penalty, grad_mode="enabled")(model, [rows(3)])
    assert found["loss"] == pytest.approx(model.weight.sum(0).square().sum().item())
    with pytest.raises(RuntimeError, match="does not require grad"):
        Evaluation(penalty)(model, [rows(3)])


def test_a_tensor_cached_under_inference_mode_is_a_sentence_in_training() -> None:
    class Caches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = linear()
            self.table = None

        def forward(self, x):
            if self.table is None:
                self.table = x.new_ones(2) * 2
            return self.linear(x) * self.table

    model = Caches()
    step = Step(model, MSE, sgd(model.parameters(), lr=0.1))
    Evaluation(MSE, grad_mode="inference_mode")(model, [rows(3)])
    with pytest.raises(GradientError, match=r"'table' keeps a tensor that was made under inference mode"):
        step([rows(3)])


# Afterwards all is as it was.


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.frozen = nn.BatchNorm1d(3)
        self.dropout = nn.Dropout(0.5)
        self.out = nn.Linear(3, 2)
        self.double()

    def forward(self, x):
        return self.out(self.dropout(self.frozen(self.norm(x))))


class OwnModes(nn.Module):
    """A module whose train() and eval() do things of their own: eval folds a scale in, train takes it out."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = linear()
        self.folded = False
        self.calls: list[bool] = []

    def train(self, mode: bool = True):
        self.calls.append(mode)
        self.folded = not mode
        return super().train(mode)

    def eval(self):
        return self.train(False)

    def forward(self, x):
        return self.linear(x) * (1.0 if self.folded else 3.0)


def snapshot(model) -> dict[str, object]:
    found: dict[str, object] = {
        "grad " + n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()
    }
    found |= {"state " + n: v.clone() for n, v in model.state_dict().items()}
    found |= {"mode " + n: m.training for n, m in model.named_modules()}
    found |= {"holds " + n: id(p.grad) for n, p in model.named_parameters()}
    return found


def equal(left, right) -> bool:
    return left.keys() == right.keys() and all(
        torch.equal(a, right[n]) if isinstance(a, torch.Tensor) else a == right[n] for n, a in left.items()
    )


def noisy(model, batch):
    """An objective that draws from all there is."""
    return MSE(model, batch) + torch.rand(()) * 0 + random.random() * 0 + numpy.random.rand() * 0


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_gradients_generators_and_modes_are_bit_for_bit_as_they_were(mode, fails) -> None:
    model = Block()
    model.frozen.eval()
    model.out.weight.grad = torch.randn(2, 3, dtype=torch.float64)
    data = cut(rows(8), [4, 4])
    before, generators = snapshot(model), rng.capture()
    first = torch.rand(2), random.random(), numpy.random.rand()
    rng.restore(generators)
    evaluation = Evaluation(noisy, grad_mode=mode)
    if fails:
        with pytest.raises(ZeroDivisionError):
            evaluation(model, broken_off(data))
    else:
        evaluation(model, data)
    assert equal(snapshot(model), before)
    assert model.training
    assert not model.frozen.training
    assert torch.equal(torch.rand(2), first[0])
    assert (random.random(), numpy.random.rand()) == first[1:]


def broken_off(data):
    yield data[0]
    raise ZeroDivisionError


def test_dropout_is_off_and_statistics_are_the_running_ones() -> None:
    model, data = Block(), rows(6)
    values = {Evaluation(MSE)(model, [data])[0]["loss"] for _ in range(5)}
    model.eval()
    assert values == {nn.functional.mse_loss(model(data[0]), data[1]).item()}


def test_modules_with_train_and_eval_of_their_own_are_switched_in_pairs() -> None:
    model, data = OwnModes(), rows(4)
    expected = nn.functional.mse_loss(model.linear(data[0]), data[1]).item()
    assert Evaluation(MSE)(model, [data])[0]["loss"] == pytest.approx(expected)
    assert model.calls == [False, True]
    assert not model.folded
    outer = nn.Sequential(model, nn.Identity())
    outer[1].training = False
    Evaluation(MSE)(outer, [data])
    assert [m.training for m in outer.modules()] == [True, True, True, False]


def test_a_model_in_eval_stays_there() -> None:
    model = OwnModes()
    model.eval()
    model.calls.clear()
    Evaluation(MSE)(model, [rows(2)])
    assert model.calls == [False]
    assert not any(module.training for module in model.modules())


def test_modules_in_a_plain_object_are_in_eval_too() -> None:
    class Plain:
        def __init__(self) -> None:
            self.parts = {"block": Block()}

        def forward(self, x):
            return self.parts["block"](x)

    model, data = Plain(), rows(6)
    block = model.parts["block"]
    block.frozen.eval()
    before = snapshot(block)
    found = Evaluation(MSE)(model, [data])[0]["loss"]
    assert equal(snapshot(block), before)
    block.eval()
    assert found == nn.functional.mse_loss(block(data[0]), data[1]).item()


class Averaging(torch.optim.SGD):
    """A schedule-free optimizer in short: eval() puts an average in the parameters' place, train() takes it away."""

    def __init__(self, params, lr) -> None:
        super().__init__(params, lr)
        self.calls: list[str] = []

    def eval(self) -> None:
        self.calls.append("eval")
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.mul_(1 / 3)

    def train(self) -> None:
        self.calls.append("train")
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.mul_(3.0)


def test_an_optimizer_with_modes_is_switched_around_and_the_parameters_are_the_same_bits_afterwards() -> None:
    model, data = linear(), rows(4)
    optimizer = Averaging(model.parameters(), 0.1)
    before = snapshot(model)
    found = Evaluation(MSE)(model, [data], [optimizer])[0]["loss"]
    assert optimizer.calls == ["eval", "train"]
    assert equal(snapshot(model), before)
    optimizer.eval()
    assert found == nn.functional.mse_loss(model(data[0]), data[1]).item()


def test_an_optimizer_that_is_in_eval_already_is_left_there() -> None:
    model = linear()
    optimizer = Averaging(model.parameters(), 0.1)
    optimizer.param_groups[0]["train_mode"] = False
    Evaluation(MSE)(model, [rows(2)], [optimizer])
    assert optimizer.calls == []


def test_bf16_runs_under_autocast() -> None:
    seen = []

    def objective(model, batch):
        outputs = model(batch[0])
        seen.append(outputs.dtype)
        return (outputs - batch[1]).square().mean()

    model, (inputs, targets) = nn.Linear(3, 2), rows(4)
    Evaluation(objective, precision="bf16")(model, [(inputs.float(), targets.float())])
    assert seen == [torch.bfloat16]


# Graphs in evaluation (grad_mode=enabled), which nothing must keep alive.


class KeptError(MeanError):
    """A metric that keeps what it is given until compute(), as those of torchmetrics do that sort."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: list = []

    def update(self, outputs, targets) -> None:
        super().update(outputs, targets)
        self.outputs.append(outputs)


def test_a_metric_object_is_given_no_graph_and_that_is_said_once() -> None:
    said: list[str] = []
    for mode, expected in (("enabled", 1), ("no_grad", 0)):
        metric, model = KeptError(), linear()
        evaluation = Evaluation(MSE, {"error": metric}, grad_mode=mode)
        said.clear()
        evaluation.found = said.append
        for _ in range(2):
            evaluation(model, cut(rows(7), [4, 3]))
        assert not any(outputs.requires_grad for outputs in metric.outputs)
        assert len(said) == expected
        assert all("'error' is given have a graph" in one and "they are detached first" in one for one in said)


def test_torchmetrics_own_objects_keep_no_graph() -> None:
    metric = pytest.importorskip("torchmetrics").CatMetric()

    class Outputs:
        update, compute, reset = lambda self, outputs, _: metric.update(outputs), lambda self: 0.0, metric.reset

    Evaluation(MSE, {"kept": Outputs()}, grad_mode="enabled")(linear(), cut(rows(7), [4, 3]))
    kept = metric.value if isinstance(metric.value, list) else [metric.value]
    assert kept and not any(one.requires_grad for one in kept)


@pytest.mark.parametrize(("mode", "expected"), [("enabled", True), ("no_grad", False)])
def test_a_metrics_function_that_keeps_graphs_is_named(mode, expected) -> None:
    seen: list = []

    def metrics(model, batch):
        error = (model(batch[0]) - batch[1]).abs().sum()
        seen.append(error)
        return {"error": Sum(error, len(batch[0]))}

    said: list[str] = []
    evaluation = Evaluation(MSE, metrics, grad_mode=mode)
    evaluation.found = said.append
    for _ in range(3):
        evaluation(linear(), cut(rows(11), [1] * 11))
    assert len(said) == expected
    assert not expected or (said[0].startswith("in evaluation the graphs of earlier") and "'seen[" in said[0]), said


def test_a_report_that_is_kept_holds_no_graph() -> None:
    model = linear()
    step = Step(model, MSE, sgd(model.parameters(), lr=0.1))
    alive: list[weakref.ref] = []

    class Mark:
        pass

    def mark(_, roots) -> None:
        sentinel = Mark()
        roots[0].grad_fn.metadata["mark"] = sentinel
        alive.append(weakref.ref(sentinel))

    step.after_backward.append(mark)
    reports = [step([rows(4)], norms=True) for _ in range(3)]
    assert [one() for one in alive] == [None] * 3
    assert len(reports) == 3
