"""The gradient norm of each layer over a run: rows, columns, what is merged, skips, and going on."""

import math

import pytest
import torch
from torch import Tensor, nn

from trainer import Step
from trainer.diagnose.history import History, layers_of
from trainer.optim import sgd

NAN = math.nan


def ran(history: History, losses: list[float], model: nn.Module | None = None, **toggles: float) -> Step:
    """One step for each factor of the loss; every report is looked at, every skip is told."""
    torch.manual_seed(0)
    model = model or nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    step = Step(model, lambda m, pair: pair[1] * m(pair[0]).square().mean(), sgd(model.parameters(), lr=0.0), **toggles)
    for factor in losses:
        report = step([(torch.ones(2, 3), factor)])
        if report.skipped:
            history.skip(step.parameters.by_name, report)
        history.look(step.parameters.by_name, report)
    return step


def same(left: list[list[float]], right: list[list[float]]) -> bool:
    return torch.allclose(torch.tensor(left), torch.tensor(right), rtol=1e-6, atol=0, equal_nan=True)


def test_a_row_is_the_norm_of_all_parameters_of_a_layer() -> None:
    history = History()
    step = ran(history, [1.0, 10.0])
    gradients = {name: one.grad for name, one in step.parameters.by_name.items()}
    expected = [math.hypot(gradients[f"{n}.weight"].norm(), gradients[f"{n}.bias"].norm()) for n in (0, 1)]
    assert history.layers == {"0.*": ["0.weight", "0.bias"], "1.*": ["1.weight", "1.bias"]}
    assert same(history.rows, [[norm / 10 for norm in expected], expected])
    assert (history.places, history.skips) == ([1, 2], [0, 0])


@pytest.mark.parametrize("clip_norm", [1e-3, 1e3])
def test_the_norm_is_the_one_before_the_clip(clip_norm: float) -> None:
    clipped, plain = History(), History()
    ran(clipped, [1.0, 2.0], clip_norm=clip_norm)
    ran(plain, [1.0, 2.0])
    assert same(clipped.rows, plain.rows)


def test_a_skip_is_counted_in_its_column_and_what_was_not_finite_is_marked() -> None:
    class Half(nn.Module):
        """The factor reaches only the second layer's gradient."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 1), nn.Linear(3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.first(x) + self.second(x)

    torch.manual_seed(0)
    model, history = Half(), History()
    model.second.weight.register_hook(lambda gradient: gradient * spoil[0])
    spoil = [1.0]
    step = Step(model, lambda m, x: m(x).mean(), sgd(model.parameters(), lr=0.0))
    for factor in (1.0, NAN, NAN, 1.0):
        spoil[0] = factor
        report = step([torch.ones(2, 3)])
        if report.skipped:
            history.skip(step.parameters.by_name, report)
        history.look(step.parameters.by_name, report)
    assert list(history.layers) == ["first.*", "second.*"]
    assert history.skips == [0, 2]
    assert history.places == [1, 2]
    assert history.rows[0] == history.rows[1][:1] + history.rows[0][1:]
    assert math.isfinite(history.rows[0][1])
    assert history.rows[1][1] == math.inf


def test_a_run_that_ends_in_skips_has_a_column_for_them() -> None:
    history = History(columns=2)
    ran(history, [1.0, 1.0, 1.0, NAN, NAN])
    assert history.skips == [0, 2]
    assert history.rows[1] == [math.inf, math.inf]
    assert history.places == [2, 3]


def test_where_the_loss_is_not_finite_no_gradient_counts_as_one_that_is() -> None:
    history = History()
    step = ran(history, [1.0])
    with torch.no_grad():
        step.parameters.by_name["1.bias"].fill_(1e20)  # whose square is infinite, and the derivative of that is not
    report = step([(torch.ones(2, 3), 1.0)])
    history.skip(step.parameters.by_name, report)
    assert all(bool(one.grad.isfinite().all()) for one in step.parameters.by_name.values())
    history.look(step.parameters.by_name, report)
    assert history.rows[1] == [math.inf, math.inf]


def test_columns_are_merged_and_none_of_the_run_is_lost() -> None:
    history = History(columns=4)
    factors = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0]
    one = History()
    ran(one, [1.0])
    for count in range(1, len(factors) + 1):
        fresh = History(columns=4)
        ran(fresh, factors[:count])
        assert len(fresh.rows) <= 4
        assert fresh.places[-1] == count
        assert same([[max(column) for column in zip(*fresh.rows, strict=True)]], [[count * n for n in one.rows[0]]])
    ran(history, factors)
    assert history.places == [4, 8, 9]
    assert same(history.rows, [[factor * norm for norm in one.rows[0]] for factor in (4.0, 8.0, 9.0)])


def test_a_layer_without_a_gradient_is_no_layer_with_a_gradient_of_zero() -> None:
    model = nn.ModuleDict({"used": nn.Linear(3, 1), "not": nn.Linear(3, 1), "flat": nn.Linear(3, 1)})
    history = History()
    step = Step(model, lambda m, x: m["used"](x).mean() + 0 * m["flat"](x).mean(), sgd(model.parameters(), lr=0.0))
    history.look(step.parameters.by_name, step([torch.ones(2, 3)]))
    used, without, flat = history.rows[0]
    assert used > 0
    assert math.isnan(without)
    assert flat == 0


def test_it_goes_on_from_its_state_as_if_nothing_had_happened() -> None:
    whole, before, after = (History(columns=4) for _ in range(3))
    factors = [1.0, 5.0, NAN, 2.0, 7.0, NAN, 3.0, 1.0, 4.0]
    ran(whole, factors)
    step = ran(before, factors[:5])
    after.load_state_dict(before.state_dict() or {})
    for factor in factors[5:]:
        report = step([(torch.ones(2, 3), factor)])
        if report.skipped:
            after.skip(step.parameters.by_name, report)
        after.look(step.parameters.by_name, report)
    assert same(after.rows, whole.rows)
    assert (after.places, after.skips, after.layers) == (whole.places, whole.skips, whole.layers)
    assert History().state_dict() is None


def test_with_another_clock_on_the_axis_it_begins_anew() -> None:
    before, after = History("steps"), History("rows")
    step = ran(before, [1.0, NAN])
    after.load_state_dict(before.state_dict() or {})
    assert after.rows == []
    report = step([(torch.ones(2, 3), 1.0)])
    after.look(step.parameters.by_name, report)
    assert (after.places, after.skips) == ([4], [0])


def test_names_are_cut_until_there_is_room() -> None:
    names = [f"blocks.{block}.{part}.{kind}" for block in range(3) for part in "ab" for kind in ("weight", "bias")]
    assert list(layers_of(["w", "b"])) == ["w", "b"]
    assert list(layers_of([*names, "head"])) == [f"blocks.{b}.{p}.*" for b in range(3) for p in "ab"] + ["head"]
    assert list(layers_of([*names, "head"], most=5)) == ["blocks.0.*", "blocks.1.*", "blocks.2.*", "head"]
    assert list(layers_of([*names, "head"], most=2)) == ["blocks.*", "head"]
    flat = [f"w{number}" for number in range(10)]
    assert list(layers_of(flat, most=4)) == ["w0 … w2", "w3 … w5", "w6 … w8", "w9"]
    for most in (1, 2, 3, 4, 100):
        cut = layers_of([*names, *flat], most=most)
        assert len(cut) <= most
        assert [name for inside in cut.values() for name in inside] == [*names, *flat]
