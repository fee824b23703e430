"""The optimizers' part of a checkpoint: what does not fit, and numbers that are none."""

import math

import pytest
import torch
from runs import MSE, rows, trainer_of
from torch import nn

from trainer import CheckpointError, DivergedError, Trainer
from trainer.checkpoint import folder, of_optimizers
from trainer.checkpoint.nested import snapshot
from trainer.optim import adamw, sgd


def test_a_state_of_another_optimizer_is_named() -> None:
    weight = torch.zeros(2, requires_grad=True)
    saved = of_optimizers.optimizer_state(adamw([weight]))
    with pytest.raises(CheckpointError, match="holds the state of AdamW, and the run's optimizer is SGD"):
        of_optimizers.load_optimizers([sgd([weight])], [saved], "here")


def stepped(kind=adamw):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    optimizers = [kind(model[0].parameters(), lr=0.1), sgd(model[1].parameters(), lr=0.1, momentum=0.9)]
    model(torch.ones(3, 2)).sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    return model, optimizers


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_none_is_found_in_a_state_and_in_its_copy_and_its_parameter_named(value) -> None:
    model, optimizers = stepped()
    names = of_optimizers.parameter_names(optimizers, dict(model.named_parameters()))
    assert names == [["0.weight", "0.bias"], ["1.weight", "1.bias"]]
    own = [of_optimizers.is_third_party(one) for one in optimizers]
    assert own == [False, False]

    def check(saved) -> None:
        of_optimizers.check_finite(saved, names, own, "here")
        of_optimizers.check_finite_copy(snapshot({"optimizers": saved}).tensors["optimizers"], names, own)

    check([of_optimizers.optimizer_state(one) for one in optimizers])
    for optimizer, parameter, key in (
        (optimizers[0], model[0].bias, "exp_avg_sq"),
        (optimizers[1], model[1].weight, "momentum_buffer"),
    ):
        held = optimizer.state[parameter][key].clone()
        optimizer.state[parameter][key].view(-1)[-1] = value
        name = next(name for name, one in model.named_parameters() if one is parameter)
        saved = [of_optimizers.optimizer_state(one) for one in optimizers]
        with pytest.raises(CheckpointError, match=f"here: '{key}' of the optimizer's state for '{name}' is not finite"):
            of_optimizers.check_finite(saved, names, own, "here")
        with pytest.raises(DivergedError, match=f"'{key}' of the optimizer's state for '{name}' is not finite, so"):
            of_optimizers.check_finite_copy(snapshot({"optimizers": saved}).tensors["optimizers"], names, own)
        optimizer.state[parameter][key].copy_(held)


def test_what_others_keep_may_be_infinite_but_not_nan() -> None:
    class Smallest(torch.optim.SGD):
        """Keeps the smallest loss so far, which begins at infinity."""

    model, optimizers = stepped(Smallest)
    own = [of_optimizers.is_third_party(one) for one in optimizers]
    assert own == [True, False]
    names = of_optimizers.parameter_names(optimizers, dict(model.named_parameters()))
    optimizers[0].state[model[0].weight]["smallest"] = torch.tensor(math.inf)
    of_optimizers.check_finite([of_optimizers.optimizer_state(one) for one in optimizers], names, own, "here")
    optimizers[0].state[model[0].weight]["smallest"] = torch.tensor(math.nan)
    with pytest.raises(CheckpointError, match="'smallest' .* for '0.weight' is not finite"):
        of_optimizers.check_finite([of_optimizers.optimizer_state(one) for one in optimizers], names, own, "here")


@pytest.mark.parametrize("background", [True, False])
def test_a_run_whose_optimizer_broke_is_not_saved_and_keeps_its_last_good_checkpoint(background, tmp_path) -> None:
    class Breaks:
        def step(self, report, seconds) -> None:
            if trainer.step.clocks.steps == 5:
                next(iter(trainer.step.optimizers[0].state.values()))["exp_avg"].fill_(math.nan)

    settings = {"steps": 8, "checkpoint_every": 2, "checkpoint_clock": "steps", "checkpoint_best": False}
    trainer = trainer_of("adamw", folder=tmp_path, **settings, checkpoint_background=background, nonfinite="skip")
    trainer._loggers = type(trainer._loggers)([Breaks()])
    with pytest.raises(DivergedError, match="'exp_avg' of the optimizer's state for '0.weight' is not finite"):
        trainer.fit()
    assert folder.last(tmp_path).name == "step-000004"


def test_a_run_that_allows_such_numbers_is_saved_and_goes_on_with_them(tmp_path) -> None:
    model = nn.Linear(3, 1)

    def run(steps: int) -> Trainer:
        optimizer = adamw(model.parameters(), lr=0.1)
        broken = lambda model, batch: MSE(model, batch) * math.nan  # noqa: E731
        trainer = Trainer(
            model, broken, optimizer, data=rows(4), steps=steps, folder=tmp_path, console=False, nonfinite="allow"
        )
        trainer.fit(resume="auto")
        return trainer

    run(2)
    assert run(3).step.clocks.steps == 3
