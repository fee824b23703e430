"""The change of a step over the parameter's norm, against what is computed by hand."""

import math

import pytest
import torch
from torch import nn

from trainer import Step
from trainer.diagnose.update_ratio import UpdateRatio
from trainer.optim import adamw, sgd

ROWS = torch.tensor([[1.0, 2.0], [3.0, -1.0]])


def made(lr: float = 0.1, every: int = 1, optimizer=None) -> tuple[Step, UpdateRatio]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    step = Step(model, lambda m, x: m(x).square().mean(), optimizer or sgd(model.parameters(), lr=lr))
    return step, UpdateRatio(step, every)


def test_it_is_what_one_computes_by_hand() -> None:
    step, ratio = made()
    weight = step.parameters.by_name["1.weight"]
    with torch.no_grad():
        step.parameters.by_name["1.bias"].zero_()
    before = {name: one.detach().clone() for name, one in step.parameters.by_name.items()}
    report = step([ROWS[:1], ROWS[1:]])
    ratio.look(step.parameters.by_name, report)
    assert weight.grad is not None
    # Plain SGD moves by lr times the gradient.
    expected = 0.1 * float(weight.grad.norm()) / float(before["1.weight"].norm())
    assert report.measured["update_ratio/1.weight"] == pytest.approx(expected, rel=1e-5)
    moved = [one.detach() - before[name] for name, one in step.parameters.by_name.items()]
    whole = math.hypot(*(float(one.norm()) for one in moved)) / math.hypot(*(float(b.norm()) for b in before.values()))
    assert report.measured["optimizer/update_ratio"] == pytest.approx(whole, rel=1e-5)
    assert "update_ratio/1.bias" not in report.measured  # it was zero: no number of times


@pytest.mark.parametrize("make", [adamw, torch.optim.AdamW])
def test_whatever_the_optimizer_does_counts(make) -> None:
    torch.manual_seed(0)
    model = nn.Linear(2, 1)
    step = Step(model, lambda m, x: 0.0 * m(x).mean(), make(model.parameters(), lr=0.5, weight_decay=0.1))
    ratio = UpdateRatio(step, 1)
    ratio.look(step.parameters.by_name, report := step([ROWS]))
    # Without a gradient only the decay is left: each parameter shrinks by lr times decay.
    assert report.measured["update_ratio/weight"] == pytest.approx(0.05, rel=1e-4)
    assert report.measured["optimizer/update_ratio"] == pytest.approx(0.05, rel=1e-4)


def test_one_of_so_many_windows_and_only_what_is_new_is_shown() -> None:
    step, ratio = made(every=3)
    shown = []
    for window in range(1, 8):
        report = step([ROWS])
        ratio.look(step.parameters.by_name, report)
        if report.measured:
            shown.append(window)
        assert ratio._before == {}
    assert shown == [1, 3, 6]


def test_a_step_whose_report_nobody_read_is_measured_before_the_next() -> None:
    step, ratio = made(every=2)
    step([ROWS])
    before = {name: one.detach().clone() for name, one in step.parameters.by_name.items()}
    step([ROWS])
    after = {name: one.detach().clone() for name, one in step.parameters.by_name.items()}
    report = step([ROWS])
    ratio.look(step.parameters.by_name, report)
    expected = float((after["0.weight"] - before["0.weight"]).norm()) / float(before["0.weight"].norm())
    assert report.measured["update_ratio/0.weight"] == pytest.approx(expected, rel=1e-5)


def test_a_skip_moves_nothing_and_has_none() -> None:
    step, ratio = made()
    report = step([torch.full((2, 2), math.nan)])
    ratio.look(step.parameters.by_name, report)
    assert report.skipped and report.measured == {} and ratio.latest is None
    assert ratio.words() == []


def test_it_changes_no_bit_and_says_what_it_saw() -> None:
    (plain, _), (watched, ratio) = made(every=10**9), made()
    for _ in range(5):
        plain([ROWS])
        ratio.look(watched.parameters.by_name, watched([ROWS]))
    for name, one in plain.parameters.by_name.items():
        assert torch.equal(one, watched.parameters.by_name[name])
    (said,) = ratio.words()
    assert said.startswith("a step moves the parameters by ")
    assert " of their norm (median); at last by " in said
    _, went_on = made()
    went_on.load_state_dict(ratio.state_dict())
    assert went_on.words() == []
    went_on.latest = ratio.latest
    assert went_on.words() == ratio.words()
