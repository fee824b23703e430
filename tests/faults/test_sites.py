"""NaN and the infinities at every site, in every precision: never in a parameter, and the culprit is named."""

import itertools
import math
import os

import pytest
import torch
from runs import QUIET, bits, error, net, rows
from tally import Tally, scratch
from torch import nn

from trainer import CheckpointError, ConfigError, DivergedError, Trainer, supervised
from trainer.checkpoint import contents, folder, store
from trainer.gradient.skips import KeptBuffers
from trainer.optim import adamw

MSE = supervised(nn.MSELoss())
VALUES = (math.nan, math.inf, -math.inf)
PRECISIONS = ("fp32", "fp64", "bf16")
SITES = {
    "data": "the loss of micro-batch {at} of 3 is",
    "targets": "the loss of micro-batch {at} of 3 is",
    "activations": "the loss of micro-batch {at} of 3 is",
    "loss": "the loss of micro-batch {at} of 3 is",
    "gradient": "the gradient of 4.weight is not finite, while the loss is",
}


class Poisons:
    """An objective that puts a value at a site, in one micro-batch of one window."""

    def __init__(self, site: str, value: float, at: int) -> None:
        self.site, self.value, self.at = site, value, at
        self.calls = 0
        self.weight = MSE.weight

    def __call__(self, model, batch):
        self.calls += 1
        if self.calls != 3 + self.at or not torch.is_grad_enabled():
            return MSE(model, batch)
        inputs, targets = (part.clone() for part in batch)
        if self.site == "data":
            inputs[0, 1] = self.value
        elif self.site == "targets":
            targets[0, 0] = self.value
        elif self.site == "activations":
            with model[4].register_forward_pre_hook(lambda _, args: self.put(args[0])):
                return MSE(model, (inputs, targets))
        elif self.site == "loss":
            return MSE(model, (inputs, targets)) * self.value
        elif self.site == "gradient":
            handle = model[4].weight.register_hook(lambda gradient: (handle.remove(), self.put(gradient))[1])
        return MSE(model, (inputs, targets))

    def put(self, tensor):
        poisoned = tensor.clone()
        poisoned.flatten()[0] = self.value
        return poisoned


def run(precision: str, objective=MSE, **settings) -> Trainer:
    torch.manual_seed(0)
    model = net()
    data = rows(36)
    wanted = {
        **QUIET,
        "batch_size": 4,
        "accumulation_steps": 3,
        "seed": 1,
        "clip_norm": 5.0,
        "audit": False,
        **settings,
    }
    return Trainer(
        model, objective, adamw(model.parameters(), lr=0.01), data=data, precision=precision, metrics=error, **wanted
    )


def skipped(precision: str, site: str, value: float, at: int) -> str | None:
    """What is wrong after a window with a poisoned micro-batch; None where it was skipped as promised."""
    trainer = run(precision, Poisons(site, value, at), steps=1)
    trainer.fit()
    model, step = trainer.model, trainer.step
    states = [bits(contents.model_state(model)), bits([one.state_dict() for one in step.optimizers])]
    trainer._feed.start()
    windows = trainer._feed.windows()
    report = step(next(windows))
    told = f"{site}, {value}, {precision}, micro-batch {at}"
    if not report.skipped:
        return f"{told}: it was not skipped"
    if not report.reason.startswith(SITES[site].format(at=at)):
        return f"{told}: the reason is '{report.reason}'"
    if [bits(contents.model_state(model)), bits([one.state_dict() for one in step.optimizers])] != states:
        return f"{told}: parameters, buffers or optimizer changed"
    after = step(next(windows))
    return f"{told}: the next window was skipped too" if after.skipped else None


def rate(precision: str, value: float) -> str | None:
    trainer = run(precision, steps=1)
    trainer.fit()
    before = bits(dict(trainer.model.named_parameters()))
    trainer.step.optimizers[0].param_groups[0]["lr"] = value
    dtype = next(trainer.model.parameters()).dtype
    try:
        trainer.step([tuple(part.to(dtype) for part in rows(4))])
    except ConfigError:
        changed = bits(dict(trainer.model.named_parameters())) != before
        return f"lr {value}, {precision}: a parameter changed" if changed else None
    return f"lr {value}, {precision}: it was taken"


def optimizer_state(precision: str, value: float) -> str | None:
    told = f"optimizer state, {value}, {precision}"
    with scratch() as where:
        trainer = run(precision, steps=2, folder=where, checkpoint_background=False)
        trainer.fit()
        good = folder.last(where)
        state = store.load(good)
        state["optimizers"][0]["state"][0]["exp_avg"].view(-1)[0] = value
        store.save(where / "checkpoints" / "step-000009", state)
        try:
            run(precision, steps=3, folder=where).fit(resume=where / "checkpoints" / "step-000009")
            return f"{told}: it was loaded"
        except CheckpointError as error_:
            if "exp_avg" not in str(error_):
                return f"{told}: {error_}"
        except DivergedError:
            return f"{told}: it was loaded"
        trainer.step.optimizers[0].state[next(trainer.model.parameters())]["exp_avg"].view(-1)[0] = value
        before = sorted(path.name for path in good.parent.iterdir())
        try:
            trainer.state.save("last")
            return f"{told}: it was saved"
        except DivergedError:
            pass
        return (
            None if sorted(path.name for path in good.parent.iterdir()) == before else f"{told}: something was written"
        )


def trials(micro_batches: int) -> Tally:
    """Every site with every value in every precision; in so many of the window's three micro-batches."""
    tally = Tally()
    for turn, (site, value, precision) in enumerate(itertools.product(SITES, VALUES, PRECISIONS)):
        for at in range(micro_batches):
            tally.note("skipped, culprit named", skipped(precision, site, value, 1 + (turn + at) % 3))
    for turn, (value, precision) in enumerate(zip(VALUES, PRECISIONS, strict=True)):
        for at in range(micro_batches):
            other = PRECISIONS[(turn + at) % 3]
            tally.note("refused before the step", rate(other, value))
            tally.note("refused on load and on save", optimizer_state(precision if at == 0 else other, value))
    return tally


def test_nothing_that_is_not_finite_reaches_a_parameter() -> None:
    tally = trials(3 if float(os.environ.get("TRIALS", "1")) > 1 else 1)
    assert not tally.broken, str(tally)
    assert tally.trials >= 51


# Negative controls.


def test_without_the_verdict_the_poison_is_found() -> None:
    class Allowed(Poisons):
        pass

    trainer = run("fp32", Allowed("gradient", math.nan, 1), steps=2, nonfinite="allow", clip_norm=None)
    trainer.fit()
    assert any(bool(parameter.isnan().any()) for parameter in trainer.model.parameters())


def test_without_the_kept_buffers_a_skip_is_seen_to_change_the_model(monkeypatch) -> None:
    assert skipped("fp32", "data", math.nan, 2) is None
    monkeypatch.setattr(KeptBuffers, "put_back", lambda *_: None)
    assert "changed" in (skipped("fp32", "data", math.nan, 2) or "")


def test_without_the_check_a_broken_optimizer_state_is_found(monkeypatch) -> None:
    monkeypatch.setattr(contents, "check_finite", lambda *_: None)
    assert "it was loaded" in (optimizer_state("fp32", math.nan) or "")


@pytest.mark.parametrize("nonfinite", ["skip"])
def test_the_last_good_checkpoint_is_kept_where_all_is_skipped(nonfinite, tmp_path) -> None:
    objective = Poisons("loss", math.nan, 1)
    trainer = run(
        "fp32",
        objective,
        steps=50,
        nonfinite=nonfinite,
        folder=tmp_path,
        skips_in_a_row=4,
        checkpoint_every=1,
        checkpoint_clock="steps",
    )
    call = Poisons.__call__

    def from_the_second_on(model, batch):
        objective.calls = 3 if trainer.step.clocks.steps >= 1 else 0
        return call(objective, model, batch)

    trainer.step.objective = from_the_second_on
    with pytest.raises(DivergedError, match="4 steps in a row were skipped"):
        trainer.fit()
    state = store.load(folder.last(tmp_path))
    assert state["step"]["clocks"]["steps"] == 1
    assert all(bool(tensor.isfinite().all()) for tensor in state["model"].values())
