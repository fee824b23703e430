"""The verdict at the end of a run: one line for a healthy one, and the right words for each that is not."""

import math

import pytest
import torch
from torch import nn

from trainer import Trainer, supervised
from trainer.errors import DivergedError
from trainer.optim import sgd

QUIET = {"console": False, "tensorboard": False, "metrics_file": False, "log_every": 1, "batch_size": 8, "seed": 0}


def health(model: nn.Module, data: tuple[torch.Tensor, torch.Tensor] | None = None, **settings) -> list[str]:
    x = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
    lr = settings.pop("lr", 0.05)
    loss = supervised(nn.MSELoss())
    trainer = Trainer(model, loss, sgd(model.parameters(), lr=lr), data=data or (x, x[:, :2]), **QUIET | settings)
    try:
        return trainer.fit().health
    except DivergedError:
        return trainer._health.words()


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("settings", [{}, {"clip_norm": 0.5}, {"tensorboard": True}])
def test_a_healthy_run_gets_one_line(settings) -> None:
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 2))
    (line,) = health(model, epochs=10, **settings)
    assert line.startswith("good: median norm ")
    assert ("clipped in" in line) == ("clip_norm" in settings)


def test_a_deep_chain_of_sigmoids_vanishes() -> None:
    model = nn.Sequential(*(layer for _ in range(12) for layer in (nn.Linear(4, 4), nn.Sigmoid())), nn.Linear(4, 2))
    lines = health(model, epochs=3)
    assert lines[0] == "not well: first step, vanishing"  # the first step is lost in rounding there
    assert lines[2].startswith("vanishing: '0.weight', '2.weight', ")
    assert len(lines) == 4


def test_a_learning_rate_that_is_too_large_explodes_and_then_only_skips() -> None:
    lines = health(nn.Linear(4, 2), epochs=200, lr=3.0, clip_norm=None)
    assert lines[0] == "not well: exploding, skipped"
    assert lines[1].startswith("exploding: since step ")
    assert ", up to " in lines[1] and " was usual" in lines[1]
    assert lines[2].startswith("skipped: 100 of ")


def test_one_planted_nan_is_one_skip() -> None:
    x = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
    x[9, 1] = math.nan
    lines = health(nn.Linear(4, 2), (x, torch.zeros(32, 2)), shuffle=False, epochs=1)
    assert lines[0] == "not well: skipped"
    assert lines[1] == "skipped: 1 of 4 windows (25 %), the last after step 1: the loss of micro-batch 1 of 1 is nan"


def test_without_the_audit_nothing_is_judged_and_with_no_step_neither() -> None:
    assert health(nn.Linear(4, 2), epochs=1, audit=False) == []
    assert health(nn.Linear(4, 2), steps=0) == []


def test_what_was_wrong_before_a_stop_is_still_wrong_after_it(tmp_path) -> None:
    def made(epochs: int) -> Trainer:
        torch.manual_seed(0)
        model = nn.ModuleDict({"used": nn.Linear(4, 2), "forgotten": nn.Linear(4, 2)})
        x = torch.randn(32, 4)
        x[9, 1] = math.nan
        loss = supervised(nn.MSELoss())
        return Trainer(
            model,
            lambda m, pair: loss(m["used"], pair),
            sgd(model.parameters(), lr=0.01),
            data=(x, x[:, :2]),
            folder=tmp_path,
            epochs=epochs,
            **QUIET,
        )

    before = made(1).fit().health
    after = made(2).fit(resume="auto").health
    assert before[0] == after[0] == "not well: first step, skipped"
    assert (
        before[1]
        == after[1]
        == ("first step: no gradient reached 'forgotten.weight', 'forgotten.bias': no operation of the forward used it")
    )
    assert before[2].startswith("skipped: 1 of 4 windows")
    assert after[2].startswith("skipped: 2 of 8 windows")
