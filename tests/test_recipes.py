"""The shipped recipes, with the figures that they promise."""

import statistics
import sys

import pytest
import torch
from torch import Tensor
from trainer.recipes import digits, xor

from trainer.config import catalogue, hydra_app, schema
from trainer.config.build import build
from trainer.config.door import Door
from trainer.errors import DataError

SILENT = ["loggers.console=false"]


def trainer_of(*overrides, folder=None):
    with hydra_app.opened(None) as (_, loader):
        config = schema.read(hydra_app.composed(hydra_app.compose(loader, "train", [*overrides, *SILENT])))
    return build(config, Door(), folder)


def by_hand(seed: int) -> tuple[Tensor, Tensor]:
    """The tutorial's loop as it is written: one batch of four, mean squared error, lr 0.01, 1000 epochs."""
    torch.manual_seed(seed)
    model = xor.ManualLinear(2, 1)
    inputs, targets = xor.table().train
    for _ in range(1000):
        loss = ((model.forward(inputs) - targets) ** 2).mean()
        loss.backward()
        with torch.no_grad():
            for parameter in (model.w, model.b):
                parameter -= 0.01 * parameter.grad
                parameter.grad = None
    return model.w.detach(), model.b.detach()


def test_xor_trains_as_the_tutorial_does_and_says_why_it_cannot_learn(capsys):
    trainer = trainer_of("recipe=xor", "data.shuffle=false")
    stop = trainer.fit()
    w, b = by_hand(seed=0)
    assert stop.clocks["steps"] == 1000
    torch.testing.assert_close(trainer.model.w.detach(), w, rtol=0, atol=1e-6)
    torch.testing.assert_close(trainer.model.b.detach(), b, rtol=0, atol=1e-6)
    assert stop.metrics["loss"] == pytest.approx(0.25, abs=0.005)
    predictions = trainer.model.forward(xor.table().train[0]).flatten().tolist()
    assert predictions == pytest.approx([0.5] * 4, abs=0.1)
    said = capsys.readouterr().out
    assert said.count("xor") >= 5 and "No straight line" in said and "recipe=xor_mlp" in said
    assert f"0 xor 0 = 0, predicted {predictions[0]:.3f}" in said


def test_xor_is_no_module_and_moves_by_hand():
    trainer = trainer_of("recipe=xor")
    assert not isinstance(trainer.model, torch.nn.Module) and trainer.model.w.is_leaf
    assert type(trainer.step.optimizers[0]).__name__ == "Manual"


@pytest.mark.parametrize("seed", range(3))
def test_xor_mlp_gets_four_of_four(seed):
    assert trainer_of("recipe=xor_mlp", f"seed={seed}").fit().metrics["accuracy"] == 1.0


def test_digits_reaches_97_percent_of_held_out_rows_over_five_seeds():
    found = [trainer_of("recipe=digits", f"seed={seed}", "evaluation.every=null").fit() for seed in range(5)]
    assert statistics.mean(stop.metrics["accuracy"] for stop in found) >= 0.97
    assert max(stop.seconds for stop in found) < 60


def test_the_held_out_digits_are_the_same_for_every_run_and_in_no_training_row():
    torch.manual_seed(1)
    first = digits.images()
    torch.manual_seed(2)
    second = digits.images()
    assert torch.equal(first.evaluation[0], second.evaluation[0]) and len(first.evaluation[0]) == 360
    assert (
        len(first.train[0]) == 1797 - 360
        and first.train[0].shape[1] == 64
        and 0 <= first.train[0].min() <= first.train[0].max() == 1
    )
    assert not torch.equal(digits.images(seed=1).evaluation[0], first.evaluation[0])
    rows = torch.cat((first.train[0], first.evaluation[0]))
    counts = {tuple(row) for row in rows.tolist()}
    assert len(counts) == 1797  # no image twice, so none on both sides


def test_digits_without_scikit_learn_and_with_too_many_held_out_rows(monkeypatch):
    with pytest.raises(DataError, match="held_out=1797 is not possible"):
        digits.images(held_out=1797)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match="pip install scikit-learn"):
        digits.images()


@pytest.mark.parametrize("recipe", sorted(catalogue.options("recipe")))
@pytest.mark.parametrize(
    "option", ["optimizer=sgd", "optimizer=adamw", "schedule=cosine", "gradient.accumulation_steps=2"]
)
def test_every_recipe_runs_with_other_options(recipe, option, tmp_path):
    needs = []
    if recipe == "tabular":  # the only one that comes without data
        (tmp_path / "my.csv").write_text("a,price\n" + "".join(f"{row},{row * row + 0.5}\n" for row in range(20)))
        needs = [f"data.source.path='{tmp_path / 'my.csv'}'", "data.source.target=price"]
    if recipe == "finetune":
        pytest.importorskip("transformers")
        needs = ["data.source.characters=20000", "data.source.length=32", "model.config.hidden_size=16"]
    if recipe == "char_lm":  # its held-out text takes seconds
        needs = ["data.source.characters=12000", "data.source.largest=8000", "data.source.held_out=3"]
    stop = trainer_of(f"recipe={recipe}", option, "debug=fast", *needs).fit()
    assert stop.clocks["steps"] == 3 and stop.metrics["loss"] > 0
