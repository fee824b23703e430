"""The step: the tutorial's rows with their figures, the reference, the toggles, the open window."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import cut, descend, differing, farthest, mlp, row_gradients, rows, state_of, window_gradient, windows_of
from runs import taken
from torch import Tensor, nn

from trainer import ConfigError, Cotangents, DivergedError, ObjectiveError, Step, Sum, supervised
from trainer.errors import GradientError
from trainer.gradient.parameters import Trained
from trainer.optim import Manual, constant, sgd

MSE = supervised(nn.MSELoss())


def mean_over_rows(model: nn.Module, micro_batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(micro_batch[0]) - micro_batch[1]).square().mean(1).mean()


class Held:
    """A plain object that holds tensors."""

    def __init__(self, **tensors: Tensor) -> None:
        for name, tensor in tensors.items():
            setattr(self, name, tensor.requires_grad_())

    def tensors(self) -> list[Tensor]:
        return list(vars(self).values())


def one_row(_: object) -> int:
    return 1


# The tutorial's rows.


def test_row_1_a_plain_object_of_scalars() -> None:
    model = Held(x=torch.tensor(2.0), w=torch.tensor(3.0), b=torch.tensor(1.0))
    step = Step(model, lambda m, _: (m.w * m.x + m.b) ** 2, Manual(model.tensors(), lr=0.5), count_rows=one_row)
    report = step([None])
    assert (model.x.grad, model.w.grad, model.b.grad) == (42.0, 28.0, 14.0)
    assert (model.x.item(), model.w.item(), model.b.item()) == (2 - 21, 3 - 14, 1 - 7)
    assert report.loss == 49.0


@pytest.mark.parametrize(("zero_grad", "second"), [("set_to_none", [1, 1]), ("zeros", [1, 1]), ("never", [2, 2])])
def test_row_3_gradients_accumulate_unless_zeroed(zero_grad: str, second: list[int]) -> None:
    model = Held(x=torch.tensor([1.0, 2.0]))
    step = Step(model, lambda m, _: m.x.sum(), Manual([model.x], lr=0.0), zero_grad=zero_grad, count_rows=one_row)
    step([None])
    assert model.x.grad.tolist() == [1, 1]
    standing = model.x.grad
    step([None])
    assert model.x.grad.tolist() == second
    assert (model.x.grad is standing) == (zero_grad == "zeros")  # zeros keeps the tensor, and its memory


def test_row_4_a_vector_jacobian_product() -> None:
    model = Held(x=torch.tensor([1.0, 2.0]))
    vector = torch.tensor([1.0, 0.5])
    step = Step(
        model,
        lambda m, _: Cotangents(torch.stack([m.x[0] ** 2, m.x[1] ** 3]), vector),
        Manual([model.x], lr=0.0),
        count_rows=one_row,
    )
    report = step([None])
    assert model.x.grad.tolist() == [2, 6]
    assert report.loss == 1 * 1 + 0.5 * 8


def test_row_8_segments_give_the_same_bits() -> None:
    grads = []
    for segments in (None, 2):
        model = mlp(torch.float32)
        step = Step(model, MSE, torch.optim.SGD(model.parameters(), lr=0.1), activation_checkpointing=segments)
        step(cut(rows(10, torch.float32), [4, 4, 2]))
        grads.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert differing(*grads) == []


@pytest.mark.parametrize("k", range(1, 8))
def test_row_9_loss_over_k_equals_the_big_batch_and_the_tail_is_not_lost(k: int) -> None:
    data = rows(10)
    model, big = mlp(), mlp()
    step = Step(model, MSE, torch.optim.SGD(model.parameters(), lr=0.1))
    optimizer = torch.optim.SGD(big.parameters(), lr=0.1)
    taken = 0
    for window in windows_of(cut(data, [2, 2, 2, 2, 2]), k):
        step(window)
        taken += len(window) * 2
        optimizer.zero_grad()
        inputs, targets = (torch.cat(parts) for parts in zip(*window, strict=True))
        nn.functional.mse_loss(big(inputs), targets).backward()
        optimizer.step()
    assert taken == step.clocks.rows == 10  # the tail counts
    assert farthest(dict(model.named_parameters()), dict(big.named_parameters())) <= 1e-12


# The reference.

CLIPS = ({}, {"clip_norm": 0.4}, {"clip_value": 0.05})


@pytest.mark.parametrize("accumulation", range(1, 8))
@pytest.mark.parametrize("reduction", ["mean", "sum", "micro_batches"])
@pytest.mark.parametrize("zero_grad", ["set_to_none", "zeros", "never"])
def test_every_step_is_the_reference(accumulation: int, reduction: str, zero_grad: str) -> None:
    data = rows(10)
    epochs = [*windows_of(cut(data, [4, 4, 2]), accumulation), *windows_of(cut(data, [1, 4, 3, 2]), accumulation)]
    for clip in CLIPS:
        kwargs = {"reduction": reduction, "zero_grad": zero_grad, **clip}
        expected, norms = descend(mlp(), epochs, rate=0.05, **kwargs)
        odd = accumulation % 2 == 1
        for segments, whole in ((None, odd), (2, not odd)):
            model = mlp()
            make = torch.optim.SGD if whole else Manual
            optimizer = make(model.parameters(), lr=0.05)
            step = Step(model, mean_over_rows, optimizer, activation_checkpointing=segments, precision="fp64", **kwargs)
            for window, norm in zip(epochs, norms, strict=True):
                if whole:
                    report = step(window, norms=True)
                else:
                    for micro_batch in window:
                        step.accumulate(micro_batch)
                    report = step.finish(norms=True)
                if "clip_value" not in clip or zero_grad != "never":
                    assert report.grad_norm == pytest.approx(norm, rel=1e-12)
            assert farthest(dict(model.named_parameters()), expected) <= 1e-12, (clip, segments, whole)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=9), st.sampled_from(["mean", "sum"]), st.booleans())
def test_any_cut_of_the_same_rows_gives_the_same_gradient(sizes: list[int], reduction: str, whole: bool) -> None:
    data = rows(sum(sizes))
    model = mlp()
    step = Step(model, MSE, Manual(model.parameters(), lr=0.0), reduction=reduction, zero_grad="zeros", clip_value=1e9)
    window = cut(data, sizes)
    taken(step, window, whole)
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    expected = window_gradient(model, [data], reduction)
    scale = 2.0 if reduction == "sum" else 1.0  # MSE weighs elements: two to a row
    assert farthest(found, {name: scale * value for name, value in expected.items()}) <= 1e-12


@pytest.mark.parametrize("k", range(1, 9))
def test_equal_micro_batches_are_the_textbook_loop_bit_for_bit(k: int) -> None:
    data = rows(4 * k * 3, torch.float32)
    model, textbook = mlp(torch.float32), mlp(torch.float32)
    step = Step(model, MSE, torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True))
    optimizer = torch.optim.AdamW(textbook.parameters(), lr=1e-2, fused=True)
    for window in windows_of(cut(data, [4] * (3 * k)), k):
        report = step(window)
        optimizer.zero_grad()
        total = 0.0
        for inputs, targets in window:
            loss = nn.functional.mse_loss(textbook(inputs), targets)
            (loss / k).backward()
            total += loss.item()
        optimizer.step()
        assert report.loss == pytest.approx(total / k, rel=1e-12)
    assert differing(state_of(model, step.optimizers[0]), state_of(textbook, optimizer)) == []


# Toggles reach the step.


@pytest.mark.parametrize(
    ("toggle", "first"),
    [
        ({}, 4.0),
        ({"reduction": "sum"}, 12.0),
        ({"reduction": "micro_batches"}, 3.5),
        ({"clip_norm": 0.5}, 0.5),
        ({"clip_value": 0.25}, 0.25),
        ({"coefficients": {"loss": 0.5}}, 2.0),
    ],
)
def test_each_toggle_changes_the_gradient_as_it_says(toggle: dict[str, object], first: float) -> None:
    model = Held(w=torch.tensor(1.0, dtype=torch.float64))
    step = Step(model, lambda m, x: (m.w * x).mean(), torch.optim.SGD([model.w], lr=1.0), **toggle)
    step([torch.tensor([3.0, 7.0]).double(), torch.tensor([2.0]).double()])  # means 5 and 2, totals 10 and 2
    assert 1.0 - model.w.item() == pytest.approx(first, rel=1e-12)


def test_segments_are_computed_again_in_backward_and_rows_are_counted_as_told() -> None:
    calls = {}
    for segments in (None, 2):
        model = mlp()
        seen: list[int] = []
        model[0].register_forward_hook(lambda *_, seen=seen: seen.append(1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        step = Step(model, MSE, optimizer, activation_checkpointing=segments, count_rows=lambda b: 10 * len(b[0]))
        report = step(cut(rows(6), [4, 2]))
        calls[segments] = len(seen)
        assert report.rows == step.clocks.rows == 60
    assert calls == {None: 2, 2: 4}


def test_the_schedule_follows_the_steps_and_the_report_shows_the_rate() -> None:
    model = mlp()
    step = Step(model, MSE, torch.optim.SGD(model.parameters(), lr=0.5), schedule=constant(warmup=4))
    rates = [step([rows(4)]).lr for _ in range(5)]
    assert rates == [0.125, 0.25, 0.375, 0.5, 0.5]


def test_settings_and_toggles_are_refused_with_a_sentence() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ConfigError, match="clip_norm.*did you mean|did you mean 'clip_norm'"):
        Step(model, MSE, optimizer, clip_nrom=1.0)
    with pytest.raises(ConfigError, match="choose one"):
        Step(model, MSE, optimizer, clip_norm=1.0, clip_value=1.0)
    with pytest.raises(ConfigError, match="holds no micro-batch"):
        Step(model, MSE, optimizer)([])
    with pytest.raises(ConfigError, match="without an open window"):
        Step(model, MSE, optimizer).finish()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_under_zeros_an_unused_parameter_moves_by_its_momentum_and_under_none_it_stays(momentum: float) -> None:
    moved = {}
    for zero_grad in ("set_to_none", "zeros"):
        model = Held(used=torch.ones(2), seldom=torch.ones(2))
        optimizer = torch.optim.SGD(model.tensors(), lr=0.1, momentum=momentum)

        def objective(m: Held, x: Tensor) -> Tensor:
            return (m.used * x).sum() + ((m.seldom * x).sum() if x[0] > 0 else 0.0)

        step = Step(model, objective, optimizer, zero_grad=zero_grad)
        step([torch.ones(2)])
        before = model.seldom.detach().clone()
        step([-torch.ones(2)])
        moved[zero_grad] = not torch.equal(before, model.seldom)
    assert moved == {"set_to_none": False, "zeros": momentum > 0}


# What forms of model, optimizer and gradient fit.


def test_a_sequence_of_optimizers_shares_one_norm() -> None:
    model = mlp()
    whole = mlp()
    halves = [
        torch.optim.SGD(model[0].parameters(), lr=0.1),
        torch.optim.AdamW(itertools.chain(model[2].parameters(), model[4].parameters()), lr=0.1),
    ]
    window = cut(rows(6), [4, 2])
    report = Step(model, MSE, halves, clip_norm=0.1)(window)
    assert report.grad_norm == pytest.approx(Step(whole, MSE, Manual(whole.parameters()))(window, norms=True).grad_norm)
    start = dict(mlp().named_parameters())
    expected = {n: start[n].detach() - 0.1 * 0.1 / report.grad_norm * p.grad for n, p in whole[0].named_parameters("0")}
    assert farthest({n: p.detach() for n, p in model[0].named_parameters("0")}, expected) <= 1e-12
    assert not torch.equal(model[4].bias, start["4.bias"])


def test_two_optimizers_may_not_hold_one_parameter() -> None:
    model = mlp()
    with pytest.raises(ConfigError, match="'0.weight' is in optimizer 0 and in optimizer 1"):
        Step(model, MSE, [Manual(model.parameters()), Manual(model[0].parameters())])


def test_a_parameter_group_that_is_added_later_is_trained() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model[4].parameters(), lr=0.1)
    step = Step(model, MSE, optimizer)
    step([rows(4)])
    assert model[0].weight.grad is None  # backward went to the optimizer's own parameters only
    optimizer.add_param_group({"params": list(model[0].parameters())})
    before = model[0].weight.detach().clone()
    step([rows(4)])
    assert not torch.equal(before, model[0].weight)


def test_a_game_of_two_steps_does_not_pollute() -> None:
    torch.manual_seed(0)
    game = nn.ModuleDict({"maker": nn.Linear(2, 2), "judge": nn.Linear(2, 1)})

    def fool(model: nn.ModuleDict, noise: Tensor) -> Tensor:
        return -model["judge"](model["maker"](noise)).mean()

    def judge(model: nn.ModuleDict, noise: Tensor) -> Tensor:
        return model["judge"](model["maker"](noise)).mean() - model["judge"](noise).mean()

    steps = [
        Step(game, objective, torch.optim.SGD(game[name].parameters(), lr=0.1), zero_grad="never")
        for name, objective in (("maker", fool), ("judge", judge))
    ]
    noise = torch.randn(4, 2)
    for step, name, other in zip(steps, ("maker", "judge"), ("judge", "maker"), strict=True):
        before = {n: None if p.grad is None else p.grad.clone() for n, p in game[other].named_parameters()}
        expected = torch.autograd.grad(step.objective(game, noise), list(game[name].parameters()))
        frozen = state_of(game[other])
        step([noise])
        for (n, parameter), gradient in zip(game[name].named_parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, msg=n)
        assert differing(frozen, state_of(game[other])) == []
        for n, parameter in game[other].named_parameters():
            assert (parameter.grad is None) if before[n] is None else torch.equal(parameter.grad, before[n])


def test_a_gradient_penalty_works() -> None:
    model, twin = mlp(), mlp()
    data = rows(6)

    def penalised(m: nn.Module, micro_batch: tuple[Tensor, Tensor]) -> Tensor:
        inputs = micro_batch[0].clone().requires_grad_()
        loss = (m(inputs) - micro_batch[1]).square().sum(1)
        (slope,) = torch.autograd.grad(loss.sum(), inputs, create_graph=True)
        return (loss + slope.square().sum(1)).mean()

    Step(model, penalised, torch.optim.SGD(model.parameters(), lr=0.01))(cut(data, [4, 2]))
    penalised(twin, data).backward()
    assert (
        farthest({n: p.grad for n, p in model.named_parameters()}, {n: p.grad for n, p in twin.named_parameters()})
        <= 1e-12
    )


def test_sparse_gradients_are_divided_clipped_and_checked() -> None:
    torch.manual_seed(0)
    finals = []
    for sparse in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(7, 3, sparse=sparse), nn.Linear(3, 1)).double()
        step = Step(model, MSE, torch.optim.SGD(model.parameters(), lr=0.5), clip_norm=0.3)
        window = [(torch.tensor([1, 1, 4]), torch.ones(3, 1).double()), (torch.tensor([2]), torch.ones(1, 1).double())]
        for micro_batch in window:
            step.accumulate(micro_batch)
        report = step.finish()
        assert model[0].weight.grad.is_sparse is sparse
        assert report.clip_factor < 1
        finals.append((dict(model.named_parameters()), report.grad_norm))
    assert farthest(finals[1][0], finals[0][0]) <= 1e-12
    assert finals[0][1] == pytest.approx(finals[1][1], rel=1e-12)


def test_a_sparse_nan_is_a_skip() -> None:
    model = nn.Embedding(5, 2, sparse=True)
    before = state_of(model)
    step = Step(
        model, lambda m, i: (m(i) * torch.tensor([1.0, math.nan])).sum().nan_to_num(), Manual(model.parameters())
    )
    report = step([torch.tensor([1, 3])])
    assert report.reason == "the gradient of weight is not finite, while the loss is"
    assert differing(before, state_of(model)) == []


def test_complex_parameters_train() -> None:
    model = Held(z=torch.tensor([1 + 2j, 3 - 1j], dtype=torch.complex128))
    step = Step(model, lambda m, x: (m.z * x).abs().square().sum(), torch.optim.SGD([model.z], lr=0.1), clip_norm=1.0)
    report = step([torch.ones(2), torch.ones(2)])
    true = 2 * torch.tensor([1 + 2j, 3 - 1j], dtype=torch.complex128)
    assert report.grad_norm == pytest.approx(float(true.abs().square().sum().sqrt()))
    torch.testing.assert_close(model.z.detach(), true / 2 - 0.1 * true / report.grad_norm)
    bad = Step(model, lambda m, x: m.z.sum(), torch.optim.SGD([model.z], lr=0.1))
    with pytest.raises(ObjectiveError, match="complex number"):
        bad([torch.ones(2)])


def test_parameters_of_several_dtypes_share_one_norm() -> None:
    model = Held(a=torch.ones(2, dtype=torch.float64), b=torch.ones(2), c=torch.ones(2, dtype=torch.bfloat16))
    step = Step(
        model,
        lambda m, x: sum((p.double() * x).sum() for p in m.tensors()),
        torch.optim.SGD(model.tensors(), lr=1.0),
        clip_norm=math.sqrt(6) / 2,
    )
    report = step([torch.ones(2)])
    assert report.grad_norm == pytest.approx(math.sqrt(6))
    assert all(
        p.tolist() == pytest.approx([0.5, 0.5], rel=1e-6) for p in model.tensors()
    )  # a norm has its tensor's width


# The open window.


@pytest.mark.parametrize("zero_grad", ["set_to_none", "zeros", "never"])
@pytest.mark.parametrize("nonfinite", ["skip", "allow"])
def test_an_objective_that_raises_leaves_everything_as_it_was(zero_grad: str, nonfinite: str) -> None:
    def build() -> tuple[nn.Module, torch.optim.Optimizer, Step]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        return model, optimizer, Step(model, objective, optimizer, zero_grad=zero_grad, nonfinite=nonfinite)

    def objective(m: nn.Module, micro_batch: tuple[Tensor, Tensor, bool]) -> Tensor:
        value = nn.functional.mse_loss(m(micro_batch[0]), micro_batch[1])
        if micro_batch[2]:
            raise KeyError("mine")
        return value

    good = [(*pair, False) for pair in cut(rows(10, torch.float32), [4, 3, 3])]
    broken = [good[0], (*good[1][:2], True), good[2]]
    model, optimizer, step = build()
    step(good)
    before, grads = state_of(model, optimizer), {n: p.grad.clone() for n, p in model.named_parameters()}
    clocks = step.clocks.as_dict()
    with pytest.raises(KeyError, match="mine"):
        step(broken)
    assert differing(before, state_of(model, optimizer)) == []
    assert step.clocks.as_dict() == clocks
    if zero_grad == "never":
        assert differing(grads, {n: p.grad for n, p in model.named_parameters()}) == []
    step(good)
    twin, twin_optimizer, twin_step = build()
    twin_step(good)
    twin_step(good)
    assert differing(state_of(model, optimizer), state_of(twin, twin_optimizer)) == []


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_after_an_error_the_open_window_can_only_be_cancelled(where: str) -> None:
    def stops(gradient: Tensor) -> None:
        raise RuntimeError("mine")

    model = mlp()
    step = Step(model, MSE, torch.optim.SGD(model.parameters(), lr=0.1))
    first, second = cut(rows(6), [4, 2])
    step.accumulate(first)
    hook = model[0].weight.register_hook(stops) if where == "backward" else None
    with pytest.raises(RuntimeError):
        step.accumulate(second if hook else (torch.ones(2, 9), torch.ones(2, 2)))
    if hook is not None:
        hook.remove()
    assert not step.is_open
    for go_on in (lambda: step.accumulate(second), step.finish, step.state_dict):
        with pytest.raises(ConfigError, match="micro-batch 2 of this window raised"):
            go_on()
    step.cancel()
    assert step([first, second]).micro_batches == 2


def test_an_error_inside_finish_gives_the_window_up() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = Step(model, MSE, optimizer)
    before = state_of(model)
    optimizer.param_groups[0]["lr"] = math.nan
    with pytest.raises(ConfigError, match="learning rate is nan"):
        step([rows(4, seed=5)])
    assert differing(before, state_of(model)) == []
    optimizer.param_groups[0]["lr"] = 0.1
    step([rows(4)])
    expected, _ = descend(mlp(), [[rows(4)]], rate=0.1)
    assert farthest(dict(model.named_parameters()), expected) <= 1e-12


def test_another_window_is_refused_while_one_is_open_and_the_open_one_stays() -> None:
    model = mlp()
    step = Step(model, MSE, torch.optim.SGD(model.parameters(), lr=0.1))
    window, other = cut(rows(6), [4, 2]), cut(rows(6, seed=3), [4, 2])
    for micro_batch in window:
        step.accumulate(micro_batch, window)
    with pytest.raises(ConfigError, match="while another is open with 2"):
        step(other)
    with pytest.raises(ConfigError, match="while another is open with 2"):
        step.accumulate(other[0], other)
    assert step(window).micro_batches == 2
    expected, _ = descend(mlp(), [window], rate=0.1)
    assert farthest(dict(model.named_parameters()), expected) <= 1e-12


def test_a_window_that_ends_early_is_divided_by_what_came() -> None:
    model = mlp()
    step = Step(model, MSE, torch.optim.SGD(model.parameters(), lr=0.1))
    window = cut(rows(9), [4, 3, 2])
    for micro_batch in window[:2]:
        step.accumulate(micro_batch, window)
    step.finish()
    expected, _ = descend(mlp(), [window[:2]], rate=0.1)
    assert farthest(dict(model.named_parameters()), expected) <= 1e-12


def test_nonfinite_raise_stops_after_putting_everything_back() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    step = Step(model, MSE, optimizer, nonfinite="raise")
    inputs, targets = rows(4, torch.float32)
    step([(inputs, targets)])
    before = state_of(model, optimizer)
    with pytest.raises(DivergedError, match=r"step 2 was not taken: the loss of micro-batch 2 of 2 is nan\. nonfinite"):
        step([(inputs, targets), (inputs * math.nan, targets)])
    assert differing(before, state_of(model, optimizer)) == []
    assert (step.clocks.windows, step.clocks.steps) == (2, 1)


def test_nonfinite_allow_lets_it_through() -> None:
    model = mlp(torch.float32)
    step = Step(model, MSE, torch.optim.SGD(model.parameters(), lr=0.1), nonfinite="allow")
    inputs, targets = rows(4, torch.float32)
    report = step([(inputs * math.nan, targets)])
    assert not report.skipped
    assert model[0].weight.isnan().all()


def test_the_mean_of_row_gradients_is_the_gradient_of_one_row_each() -> None:
    """The reference itself: single rows, added up, are what torch says of the whole batch."""
    model, (inputs, targets) = mlp(), rows(5)
    nn.functional.mse_loss(model(inputs), targets).backward()
    parts = row_gradients(model, inputs, targets)
    mean = {name: sum(part[name] for part in parts) / 5 for name in parts[0]}
    assert farthest(mean, {n: p.grad for n, p in model.named_parameters()}) <= 1e-12


def test_a_report_that_is_kept_keeps_no_data_alive() -> None:
    import weakref

    model = mlp()
    step = Step(model, lambda m, b: {"a": Sum(m(b).sum(), len(b)), "b": Sum(m(b).sum(), 1)}, Manual(model.parameters()))
    inputs = torch.ones(4, 3, dtype=torch.float64)
    gone = weakref.ref(inputs)
    report = step([inputs])
    del inputs
    assert gone() is None
    assert report.weights == {"a": 4.0, "b": 1.0}
    assert math.isfinite(report.loss)


def test_a_coefficient_of_a_term_that_is_not_there_is_named() -> None:
    model = torch.nn.Linear(2, 1)

    def objective(model, batch):
        return {"fit": model(batch).mean(), "size": model.weight.square().sum()}

    step = Step(model, objective, sgd(model.parameters(), lr=0.1), coefficients={"siez": 0.5})
    before = model.weight.detach().clone()
    with pytest.raises(ConfigError, match="names 'siez'.*did you mean 'size'"):
        step([torch.ones(3, 2)])
    assert torch.equal(model.weight, before) and not step.clocks.windows


def test_a_step_that_was_cut_off_inside_the_optimizer_is_not_gone_on_from() -> None:
    model = torch.nn.Linear(2, 1)

    class CutOff(torch.optim.SGD):
        def step(self, closure=None):
            super().step()
            raise KeyboardInterrupt

    step = Step(model, lambda model, batch: model(batch).mean(), CutOff(model.parameters(), lr=0.1))
    with pytest.raises(KeyboardInterrupt):
        step([torch.ones(3, 2)])
    assert step.is_torn
    for again in (lambda: step([torch.ones(3, 2)]), lambda: step.accumulate(torch.ones(3, 2)), step.state_dict):
        with pytest.raises(GradientError, match="cut off while its parameters were being changed"):
            again()


@pytest.mark.parametrize("norms", [False, True])
def test_that_somebody_looks_at_the_norm_changes_nothing(norms: bool) -> None:
    """A norm that overflows float32 decides where it clips, not where it is only read."""
    parameter = torch.zeros(4, requires_grad=True)
    model = type("Plain", (), {})()
    model.weight = parameter
    step = Step(model, lambda model, batch: (model.weight * 1e25).sum(), Manual([parameter], lr=1e-25))
    report = step([torch.ones(1)], norms=norms)
    assert not report.skipped
    torch.testing.assert_close(parameter.detach(), torch.full((4,), -1.0))


def test_a_loss_of_torch_is_an_objective_as_it_stands() -> None:
    inputs, targets = torch.randn(6, 2), torch.randint(3, (6,))
    reports = []
    for objective in (torch.nn.CrossEntropyLoss(), torch.nn.functional.cross_entropy, supervised(torch.nn.NLLLoss())):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LogSoftmax(1))
        step = Step(model, objective, sgd(model.parameters(), lr=0.1))
        reports.append(step([(inputs[:4], targets[:4]), (inputs[4:], targets[4:])]))
    assert len({round(report.loss, 6) for report in reports}) == 1
    assert reports[0].weight == 6


def test_the_open_windows_true_gradient_can_be_had_without_a_step() -> None:
    model = mlp()
    sizes = [3, 1, 2]
    step = Step(model, mean_over_rows, sgd(model.parameters(), lr=0.1), clip_norm=1e-3)
    with pytest.raises(ConfigError, match=r"gradient\(\) came without an open window"):
        step.gradient()
    expected = window_gradient(model, cut(rows(6), sizes), "mean")
    before = state_of(model)
    for micro_batch in cut(rows(6), sizes):  # one by one: a divisor is left over
        step.accumulate(micro_batch)
        assert step.is_open
    found = step.gradient()
    assert farthest(found, expected) <= 1e-14
    assert all(found[name] is not parameter.grad for name, parameter in model.named_parameters())
    assert differing(before, state_of(model)) == [] and step.clocks.windows == 0
    step.cancel()
    assert not step.is_open
    # A micro-batch that raised is there in part.
    step.accumulate(cut(rows(6), sizes)[0])
    with pytest.raises(RuntimeError):
        step.accumulate((torch.ones(2, 7, dtype=torch.float64), torch.ones(2, 2, dtype=torch.float64)))
    assert not step.is_open
    with pytest.raises(ConfigError, match="call cancel"):
        step.gradient()


def test_a_term_that_is_held_apart_is_in_the_true_gradient() -> None:
    model = mlp()

    def two(model: nn.Module, micro_batch: tuple[Tensor, Tensor]) -> dict[str, Sum]:
        wrong = (model(micro_batch[0]) - micro_batch[1]).square().mean(1)
        return {"all": Sum(wrong.sum(), len(wrong)), "first": Sum(wrong[:1].sum(), 1)}

    step = Step(model, two, sgd(model.parameters(), lr=0.1))
    parts = cut(rows(6), [3, 1, 2])
    for part in parts:
        step.accumulate(part)
    first = [tuple(tensor[:1] for tensor in part) for part in parts]
    whole, ones = window_gradient(model, parts, "mean"), window_gradient(model, first, "mean")
    assert farthest(step.gradient(), {name: whole[name] + ones[name] for name in whole}) <= 1e-14


def test_what_sums_over_ranks_is_asked_once_when_a_window_opens_and_once_when_it_closes() -> None:
    """That the sums are right is tests/test_over_ranks.py, with real ranks; here is when they are asked for."""

    class Notes:
        bad_ranks = None

        def open(self, drawn: object, expected: object, parameters: object) -> None:
            called.append("open")

        def close(self, open_: object, parameters: object, trace: object) -> None:
            called.append(f"close {open_.micro_batches}")
            for parameter in model.parameters():
                parameter.grad = None if parameter.grad is None else parameter.grad * 2

    called: list[str] = []
    model = mlp()
    step = Step(model, MSE, sgd(model.parameters(), lr=0.1))
    step.reducer = Notes()
    window = cut(rows(6), [3, 3])
    step(window)
    assert called == ["open", "close 2"]
    called.clear()
    assert step([]).skipped, "this rank has nothing, others may have"
    assert called == ["open", "close 0"]
    called.clear()
    expected = window_gradient(model, window[:1], "mean")
    step._expected = {}
    step.accumulate(window[0])  # a divisor is left over, and it is the sum that it is taken out of
    assert farthest(step.gradient(), {name: 2 * gradient for name, gradient in expected.items()}) <= 1e-14
    assert called == ["open", "close 1"]
    step.cancel()
    called.clear()
    step.gradient()
    assert called == ["open", "close 0"]


def test_a_group_that_was_added_is_among_what_a_window_opens_with() -> None:
    class Notes:
        def open(self, drawn: object, expected: object, parameters: Trained) -> None:
            opened_with.append(list(parameters.by_name))

    opened_with: list[list[str]] = []
    model = mlp()
    first, *others = model.parameters()
    optimizer = torch.optim.SGD([first], lr=0.1)
    step = Step(model, MSE, optimizer)
    step.reducer = Notes()
    step.accumulate(rows(4))
    step.cancel()
    optimizer.add_param_group({"params": others})
    step.accumulate(rows(4))
    names = [name for name, _ in model.named_parameters()]
    assert opened_with == [names[:1], names]
