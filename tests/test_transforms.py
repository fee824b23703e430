"""The chain of transforms in the step, and each transform that comes along."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import cut, differing, mlp, norm_of, rows, state_of, window_gradient
from runs import QUIET
from runs import rows as line_rows
from torch import Tensor, nn

from trainer import CheckpointError, ConfigError, GradientError, Report, Step, Trainer, supervised
from trainer.gradient.report import FREE_READS
from trainer.gradient.transforms import centralise, clip_by_norm, clip_by_value, freeze, noise, thaw
from trainer.optim import Manual, adamw, linear

MSE = supervised(nn.MSELoss())
WINDOW = cut(rows(7), [4, 3])
TRUE = window_gradient(mlp(), WINDOW, "mean")
NAMES = list(TRUE)


def step_with(*transforms: Any, make: Any = Manual, lr: float = 1.0, **toggles: Any) -> tuple[nn.Module, Step]:
    model = mlp()
    return model, Step(model, MSE, make(model.parameters(), lr=lr), transforms=transforms, **toggles)


def moved(*transforms: Any, **toggles: Any) -> tuple[dict[str, Tensor], Report]:
    """The gradient as it reached plain descent at rate 1."""
    model, step = step_with(*transforms, **toggles)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    report = step(WINDOW)
    return {name: before[name] - parameter.detach() for name, parameter in model.named_parameters()}, report


def nan_window() -> list[tuple[Tensor, ...]]:
    inputs, targets = rows(7)
    inputs[2, 1] = math.nan
    return cut((inputs, targets), [4, 3])


# The chain.


def test_transforms_see_the_true_gradient_by_name_and_run_in_their_order_before_the_clip() -> None:
    seen: list[Any] = []

    def look(gradients: dict[str, Tensor], report: Report) -> None:
        seen.append(({name: gradient.clone() for name, gradient in gradients.items()}, report.clocks["steps"]))
        seen.append((report.grad_norm, report.loss, report.skipped))

    def double(gradients: dict[str, Tensor], report: Report) -> dict[str, Tensor]:
        return {name: 2 * gradient for name, gradient in gradients.items()}

    def add_one(gradients: dict[str, Tensor], report: Report) -> None:
        torch._foreach_add_(list(gradients.values()), 1.0)

    gradient, report = moved(look, double, add_one, clip_norm=0.5)
    assert list(seen[0][0]) == NAMES and seen[0][1] == 0
    for name in NAMES:
        torch.testing.assert_close(seen[0][0][name], TRUE[name])
    assert seen[1] == (pytest.approx(norm_of(TRUE)), report.loss, False)
    shaped = {name: 2 * value + 1 for name, value in TRUE.items()}
    assert report.grad_norm == pytest.approx(norm_of(TRUE))
    assert report.grad_norm_after == pytest.approx(0.5) == norm_of(gradient)
    assert report.clip_factor == pytest.approx(0.5 / norm_of(shaped))
    for name in NAMES:
        torch.testing.assert_close(gradient[name], shaped[name] * 0.5 / norm_of(shaped))
    _, report = moved(add_one, double)
    assert report.grad_norm_after == pytest.approx(norm_of({n: 2 * (v + 1) for n, v in TRUE.items()}))


@pytest.mark.parametrize("cutting", [[4, 3], [7], [1, 2, 4]])
@pytest.mark.parametrize("whole", [True, False])
def test_what_a_transform_sees_does_not_depend_on_the_cut(cutting: list[int], whole: bool) -> None:
    seen: dict[str, Tensor] = {}
    _, step = step_with(lambda gradients, report: seen.update({n: g.clone() for n, g in gradients.items()}))
    for micro_batch in (window := cut(rows(7), cutting)):
        step.accumulate(micro_batch, window if whole else None)
    step.finish()
    for name, value in TRUE.items():
        torch.testing.assert_close(seen[name], value)


def test_a_transform_may_change_the_dict_or_return_what_it_replaces() -> None:
    def assigns(gradients: dict[str, Tensor], report: Report) -> None:
        gradients[NAMES[0]] = gradients[NAMES[0]] * 3

    def takes_out(gradients: dict[str, Tensor], report: Report) -> None:
        del gradients[NAMES[1]]

    def none(gradients: dict[str, Tensor], report: Report) -> dict[str, None]:
        return {NAMES[2]: None}

    def last(gradients: dict[str, Tensor], report: Report) -> None:
        assert list(gradients) == [NAMES[0], *NAMES[3:]]

    gradient, _ = moved(assigns, takes_out, none, last)
    torch.testing.assert_close(gradient[NAMES[0]], 3 * TRUE[NAMES[0]])
    assert not gradient[NAMES[1]].any() and not gradient[NAMES[2]].any()
    torch.testing.assert_close(gradient[NAMES[3]], TRUE[NAMES[3]])


class Counts:
    """A transform whose state moves with every run of it."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self, gradients: dict[str, Tensor], report: Report) -> None:
        self.runs += 1

    def state_dict(self) -> dict[str, Any]:
        return {"runs": self.runs}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.runs = state["runs"]


@pytest.mark.parametrize("free", [True, False])
def test_a_transform_never_runs_on_a_skipped_window(free: bool) -> None:
    counts = Counts()
    model, step = step_with(counts, noise(0.1), make=torch.optim.SGD)
    if not free:
        FREE_READS.discard("cpu")
    try:
        assert step(nan_window()).skipped and counts.runs == 0
        assert not step(WINDOW).skipped and counts.runs == 1
        state = step.state_dict()["transforms"]
        before = state_of(model)
        assert step(nan_window()).skipped and counts.runs == 1
        assert torch.equal(step.state_dict()["transforms"][1][1]["cpu"], state[1][1]["cpu"])
        assert differing(before, state_of(model)) == []
    finally:
        FREE_READS.add("cpu")


def test_what_stops_inside_a_transform_leaves_everything_as_it_was() -> None:
    counts, wrong = Counts(), [KeyboardInterrupt(), ValueError("mine")]

    def stops(gradients: dict[str, Tensor], report: Report) -> None:
        if wrong:
            raise wrong.pop()

    model, step = step_with(counts, noise(0.1), stops)
    before = state_of(model)
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error):
            step(WINDOW)
        assert differing(before, state_of(model)) == []
        assert (counts.runs, step.clocks.windows, step.is_torn) == (0, 0, False)
    step(WINDOW)
    other, twin = step_with(Counts(), noise(0.1))
    twin(WINDOW)
    assert differing(state_of(model), state_of(other)) == []


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (
            {NAMES[0]: torch.zeros(2, 2)},
            r"wrong returned a gradient of shape \(2, 2\) for '0.weight', where it must be",
        ),
        ({NAMES[0]: torch.zeros(5, 3)}, "a gradient of dtype float32 for '0.weight', where it must be float64"),
        ({NAMES[0]: torch.zeros(5, 3, dtype=torch.float64, device="meta")}, "a gradient of device meta"),
        ({NAMES[0]: 1.0}, "returned float for '0.weight': return a tensor or None"),
        ({"elsewhere": torch.zeros(1)}, "a gradient for 'elsewhere', which is no parameter under training"),
    ],
)
def test_what_does_not_fit_gets_a_sentence_and_no_step(answer: dict[str, Any], sentence: str) -> None:
    def wrong(gradients: dict[str, Tensor], report: Report) -> dict[str, Any]:
        return answer

    model, step = step_with(wrong)
    before = state_of(model)
    with pytest.raises(GradientError, match=sentence):
        step(WINDOW)
    assert differing(before, state_of(model)) == []


def test_a_transform_that_makes_a_nan_is_named_and_no_step_is_taken() -> None:
    def breaks(gradients: dict[str, Tensor], report: Report) -> None:
        gradients[NAMES[2]].fill_(math.inf)

    model, step = step_with(breaks)
    before = state_of(model)
    with pytest.raises(GradientError, match=r"after its transforms \(breaks\) that of 2.weight is not"):
        step(WINDOW)
    assert differing(before, state_of(model)) == []
    _, step = step_with(breaks, nonfinite="allow")
    assert not step(WINDOW).skipped


def test_what_is_no_transform_is_refused() -> None:
    for wrong in (3, Counts):
        with pytest.raises(ConfigError, match="cannot be called with"):
            step_with(wrong)


def test_bind_sees_the_parameters_before_the_first_window_and_again_when_a_group_joins() -> None:
    seen: list[list[str]] = []

    class Binds:
        def bind(self, parameters: dict[str, Tensor]) -> None:
            seen.append(list(parameters))

        def __call__(self, gradients: dict[str, Tensor], report: Report) -> None: ...

    model = mlp()
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters[:2], lr=0.1)
    step = Step(model, MSE, optimizer, transforms=[Binds()])
    assert seen == [NAMES[:2]]
    step(WINDOW)
    optimizer.add_param_group({"params": parameters[2:]})
    step(WINDOW)
    step(WINDOW)
    assert seen == [NAMES[:2], NAMES]


def test_the_state_of_other_transforms_is_refused_before_anything_changes() -> None:
    _, step = step_with(noise(0.1), Counts())
    step(WINDOW)
    state = step.state_dict()
    _, other = step_with(Counts())
    with pytest.raises(CheckpointError, match="transforms Noise, Counts, and this run's are Counts"):
        other.load_state_dict(state)
    assert other.clocks.windows == 0
    _, again = step_with(noise(0.2), clip_by_value(1.0), Counts())  # one without a state may be there or not
    again.load_state_dict(state)


def test_a_run_may_be_told_to_go_on_with_other_transforms() -> None:
    _, step = step_with(noise(0.1), Counts())
    step(WINDOW)
    state = step.state_dict()
    counts = Counts()
    _, other = step_with(counts, Counts(), noise(0.3))
    state["transforms"] = other.transforms.adapted(state["transforms"])
    other.load_state_dict(state)
    assert (counts.runs, other.transforms._all[1].runs) == (1, 0)
    assert torch.equal(other.state_dict()["transforms"][2][1]["cpu"], step.state_dict()["transforms"][0][1]["cpu"])
    assert step_with()[1].transforms.adapted(step.state_dict()["transforms"]) == []


@pytest.mark.parametrize(
    "make", [lambda: noise(0.05), centralise, lambda: clip_by_norm(0.01), lambda: clip_by_value(0.01)]
)
def test_under_never_the_next_window_adds_to_what_the_transform_left(make: Callable[[], Any]) -> None:
    model, step = step_with(make(), lr=0.0, zero_grad="never")
    alone = make()
    standing: dict[str, Tensor] = {}
    for _ in range(3):
        report = step(WINDOW)
        expected = {name: standing.get(name, 0) + value for name, value in TRUE.items()}
        assert report.grad_norm == pytest.approx(norm_of(expected))
        alone(expected, report)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, expected[name])
        before = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        assert step(nan_window()).skipped
        assert all(torch.equal(p.grad, before[name]) for name, p in model.named_parameters())
        standing = expected


def test_parameters_narrower_than_their_gradient_are_shaped_in_the_gradients_width() -> None:
    seen = []

    def double(gradients: dict[str, Tensor], report: Report) -> dict[str, Tensor]:
        seen.extend(gradient.dtype for gradient in gradients.values())
        return {name: 2 * gradient for name, gradient in gradients.items()}

    for masters in (True, False):
        model = mlp(torch.bfloat16)
        before = state_of(model)
        shaping = [double, freeze("0.*"), noise(0.01), centralise(), clip_by_norm(1.0)]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
        step = Step(model, MSE, optimizer, transforms=shaping, clip_adaptive=0.5, master_parameters=masters)
        report = step(cut(rows(7, torch.bfloat16), [4, 3]))
        assert report.grad_norm_after <= 1.0 + 1e-6
        moving = {name.split(".")[1] for name in differing(before, state_of(model))}
        assert moving == {"2", "4"}
    assert set(seen) == {torch.float32}


# Noise.


@pytest.mark.parametrize("std", [1e-3, 0.1, 10.0])
def test_noise_has_its_mean_and_deviation_and_leaves_the_global_generator_alone(std: float) -> None:
    gradients = {"w": torch.zeros(200, 200), "turn": torch.zeros(100, 100, dtype=torch.complex64)}
    state = torch.get_rng_state()
    noise(std)(gradients, Report(dict, {}, {}, (1, 1, 0)))
    assert torch.equal(state, torch.get_rng_state())
    for values in (gradients["w"], gradients["turn"].real, gradients["turn"].imag):
        assert values.std().item() == pytest.approx(std, rel=0.03)
        assert abs(values.mean().item()) < 4 * std / math.sqrt(values.numel())


def test_noise_is_seeded_and_follows_its_schedule_by_steps_that_were_taken() -> None:
    def drawn(seed: int) -> Tensor:
        gradient, _ = moved(noise(0.1, seed=seed))
        return torch.cat([(gradient[name] - TRUE[name]).flatten() for name in NAMES])

    assert torch.equal(drawn(1), drawn(1)) and not torch.allclose(drawn(1), drawn(2))
    one = noise(2.0, schedule=linear(4))
    counts = []
    _, step = step_with(one, lambda gradients, report: counts.append(one.std(report)))
    for window in (WINDOW, nan_window(), WINDOW, WINDOW):
        step(window)
    assert counts == [2.0 * linear(4)(count) for count in range(3)]


def test_noise_only_where_it_matches_and_a_sparse_gradient_gets_a_sentence() -> None:
    gradient, _ = moved(noise(0.1, match="0.*"))
    changed = [name for name in NAMES if not torch.allclose(gradient[name], TRUE[name], atol=1e-9)]
    assert changed == ["0.weight", "0.bias"]
    with pytest.raises(GradientError, match="noise: the gradient of 'w' is sparse"):
        noise(0.1)({"w": torch.eye(3).to_sparse()}, Report(dict, {}, {}, (1, 1, 0)))


def test_a_run_with_noise_goes_on_bit_for_bit(tmp_path: Path) -> None:
    def trainer(folder: Path | None, steps: int) -> Trainer:
        torch.manual_seed(0)
        model = nn.Linear(3, 1)
        flat = {**QUIET, "seed": 0, "batch_size": 2, "steps": steps, "accumulation_steps": 2}
        shaping = [noise(0.1, schedule=linear(20)), centralise()]
        return Trainer(
            model, MSE, adamw(model.parameters()), data=line_rows(10), transforms=shaping, folder=folder, **flat
        )

    whole = trainer(None, 9)
    whole.fit()
    trainer(tmp_path, 4).fit()
    rest = trainer(tmp_path, 9)
    rest.fit(resume="auto")
    assert differing(state_of(whole.model), state_of(rest.model)) == []
    apart = trainer(None, 9)
    apart.step.transforms._all[0]._seed = 5
    apart.fit()
    assert differing(state_of(whole.model), state_of(apart.model)) != []


# Centralising.


def test_centralised_gradients_sum_to_zero_and_a_second_time_changes_nothing() -> None:
    gradients = {"linear": torch.randn(4, 3).double(), "conv": torch.randn(4, 2, 3, 3).double(), "bias": torch.randn(5)}
    before = {name: gradient.clone() for name, gradient in gradients.items()}
    report = Report(dict, {}, {}, (1, 1, 0))
    centralise()(gradients, report)
    assert torch.equal(gradients["bias"], before["bias"])
    for name in ("linear", "conv"):
        sums = gradients[name].flatten(1).sum(1)
        torch.testing.assert_close(sums, torch.zeros_like(sums), atol=1e-12, rtol=0)
        spread = gradients[name].flatten(1).diff(dim=1)
        torch.testing.assert_close(spread, before[name].flatten(1).diff(dim=1))
    once = {name: gradient.clone() for name, gradient in gradients.items()}
    centralise()(gradients, report)
    for name, value in once.items():
        torch.testing.assert_close(gradients[name], value, atol=1e-12, rtol=0)


def test_centralising_takes_rows_of_sparse_gradients_and_only_what_matches() -> None:
    report = Report(dict, {}, {}, (1, 1, 0))
    table = torch.sparse_coo_tensor([[0, 2]], torch.randn(2, 3), (4, 3), check_invariants=True).coalesce()
    dense = table.to_dense()
    centralise()({"table": table}, report)
    torch.testing.assert_close(table.to_dense(), dense - dense.mean(1, keepdim=True))
    with pytest.raises(GradientError, match="centralise: the gradient of 'w' is sparse in other dimensions"):
        centralise()({"w": torch.eye(3).to_sparse()}, report)
    gradient, _ = moved(centralise(match=["2.weight"]))
    torch.testing.assert_close(gradient["0.weight"], TRUE["0.weight"])
    assert gradient["2.weight"].sum(1).abs().max() < 1e-12


# Freezing and thawing.


def test_a_frozen_parameter_is_not_said_to_get_no_gradient() -> None:
    heard = []

    class Hears:
        def found(self, event: Any) -> None:
            heard.append(event.text)

    for unused in (False, True):
        model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
        if unused:
            model.spare = nn.Parameter(torch.ones(1))
            model.forward = lambda x, m=model: m[1](m[0](x))
        trainer = Trainer(
            model, MSE, adamw(model.parameters()), data=line_rows(10), transforms=[freeze("0.*")], steps=1, **QUIET,
            loggers=[Hears()],
        )  # fmt: skip
        trainer.fit()
        assert trainer.step.transforms.taken == {"0.weight", "0.bias"}
        assert ["'spare'" in text for text in heard] == [True] * unused


KINDS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.3, fused=True),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.3, fused=True),
    "unfused": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.3),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.05, weight_decay=0.3, momentum=0.5),
    "manual": lambda p: Manual(p, lr=0.05),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("zero_grad", ["set_to_none", "zeros", "never"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_frozen_parameter_does_not_move_at_all_and_thaws(kind: str, zero_grad: str, dtype: torch.dtype) -> None:
    model = mlp(dtype)
    window = cut(rows(7, dtype), [4, 3])
    optimizer = KINDS[kind](model.parameters())
    shaping = [freeze("0.*", until=3), freeze(["2.*"], start=2, until=5)]
    step = Step(model, MSE, optimizer, transforms=shaping, zero_grad=zero_grad, clip_norm=10.0)
    for taken in range(7):
        before = state_of(model, optimizer)
        step(window)
        same = before.keys() - set(differing(before, state_of(model, optimizer)))
        for layer, frozen in (("0", taken < 3), ("2", 2 <= taken < 5), ("4", False)):
            for name in (f"0.{layer}.weight", f"0.{layer}.bias"):
                assert (name in same) == frozen, (taken, name)
        if 2 <= taken < 5:  # momentum and averages of the third and fourth parameter stand still
            assert {key for key in before if key.startswith(("1.2.", "1.3."))} <= same


def test_all_parameters_frozen_is_a_step_that_moves_nothing() -> None:
    for kind, make in KINDS.items():
        model = mlp(torch.float32)
        step = Step(model, MSE, make(model.parameters()), transforms=[freeze("*", until=2)])
        for taken in range(4):
            before = state_of(model)
            report = step(cut(rows(7, torch.float32), [4, 3]))
            assert not report.skipped
            assert (differing(before, state_of(model)) == []) == (taken < 2), kind
            assert report.grad_norm > 0 and (report.grad_norm_after == 0.0) == (taken < 2)


def test_the_norm_that_is_clipped_is_that_of_what_is_not_frozen() -> None:
    gradient, report = moved(freeze("0.*"), clip_norm=1e-3)
    assert norm_of(gradient) == pytest.approx(1e-3) and not gradient["0.weight"].any()
    assert report.grad_norm == pytest.approx(norm_of(TRUE))


def test_thawing_layer_by_layer() -> None:
    model, step = step_with(thaw({"0.*": 3, "2.*": 1, "4.*": 0}, clock="windows"), lr=0.1)
    for window in range(4):
        before = state_of(model)
        step(WINDOW)
        moving = {name.split(".")[1] for name in differing(before, state_of(model))}
        assert moving == {layer for layer, end in (("0", 3), ("2", 1), ("4", 0)) if window >= end}


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: step_with(freeze("layer.*")), "freeze: no parameter under training matches 'layer.*'"),
        (lambda: step_with(noise(0.1, match="0.wieght")), "did you mean '0.weight'"),
        (lambda: step_with(centralise([])), "centralise: match is empty"),
        (lambda: freeze("*", until=0), "until=0 is not after start=0"),
        (lambda: freeze("*", start=-1), "start=-1 is not possible"),
        (lambda: freeze("*", until=2.5), "until=2.5 is not possible"),
        (lambda: freeze("*", clock="step"), "clock='step' is not possible: did you mean 'steps'"),
        (lambda: thaw({}), "thaw: until={} is not possible"),
        (lambda: noise(0.0), "noise: std=0.0 is not possible"),
        (lambda: noise(0.1, schedule=3), "the schedule 3 cannot be called"),
        (lambda: clip_by_norm(-1), "clip_by_norm: largest=-1 is not possible"),
        (lambda: clip_by_norm(1, order=0), "order=0 is not possible"),
        (lambda: clip_by_value(math.inf), "clip_by_value: largest=inf is not possible"),
    ],
)
def test_what_is_not_possible_gets_a_sentence(make: Callable[[], Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        make()
    assert sentence in str(error.value)


# Clips.


@pytest.mark.parametrize("order", [1.0, 2.0, math.inf])
def test_clipping_some_by_norm_and_others_by_value(order: float) -> None:
    def norm(gradient: dict[str, Tensor], names: list[str]) -> float:
        return float(torch.cat([gradient[name].flatten() for name in names]).norm(order))

    first = [name for name in NAMES if name.startswith("0")]
    for threshold in torch.logspace(-4, 2, 13, dtype=torch.float64).tolist():
        gradient, _ = moved(clip_by_norm(threshold, order, match="0.*"), clip_by_value(threshold, match=["2.*", "4.*"]))
        assert norm(gradient, first) == pytest.approx(min(threshold, norm(TRUE, first)), rel=1e-9)
        twice, _ = moved(
            *[clip_by_norm(threshold, order, match="0.*"), clip_by_value(threshold, match=["2.*", "4.*"])] * 2
        )
        for name in NAMES:
            torch.testing.assert_close(twice[name], gradient[name], rtol=1e-9, atol=1e-12)
            if name not in first:
                torch.testing.assert_close(gradient[name], TRUE[name].clamp(-threshold, threshold))


# A device, where nothing is read for nothing.


@pytest.mark.parametrize("zero_grad", ["set_to_none", "zeros", "never"])
@pytest.mark.parametrize("toggles", [{"clip_norm": 0.5}, {"clip_adaptive": 0.05}, {"clip_value": 0.1}])
def test_where_no_read_is_free_the_same_comes_out(zero_grad: str, toggles: dict[str, float]) -> None:
    finals = []
    for free in (True, False):
        if not free:
            FREE_READS.discard("cpu")
        try:
            model = mlp(torch.float32)
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, fused=True)
            shaping = [thaw({"0.*": 3, "2.*": 5}), noise(0.02), centralise(), clip_by_norm(0.8, match="4.*")]
            step = Step(model, MSE, optimizer, transforms=shaping, zero_grad=zero_grad, **toggles)
            window = cut(rows(7, torch.float32), [4, 3])
            bad = [(inputs * math.nan, targets) for inputs, targets in window]
            reports = [step(bad if index in (0, 4) else window) for index in range(8)]
            skipped = [report.skipped for report in reports]
            after = [report.grad_norm_after for report in reports]
        finally:
            FREE_READS.add("cpu")
        assert skipped == [index in (0, 4) for index in range(8)]
        finals.append((state_of(model, optimizer), after))
    for name, value in finals[0][0].items():
        torch.testing.assert_close(finals[1][0][name], value, rtol=1e-4, atol=1e-6)
    assert finals[0][1] == [None if one is None else pytest.approx(one, rel=1e-4) for one in finals[1][1]]
