"""The finished model for everybody, and init= from whatever holds parameters."""

import math
import os

import pytest
import torch
from runs import MSE, Line, bits, net, rows, saved, trainer_of
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn

from trainer import CheckpointError, Trainer
from trainer.checkpoint import contents, finished, store
from trainer.checkpoint.finished import MODEL
from trainer.checkpoint.folder import found
from trainer.checkpoint.run_state import BEST, LAST


class Tied(nn.Module):
    """Input and output share a table; a buffer that is not saved, one that is, and a transposed view of a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs = nn.Embedding(5, 4)
        self.outputs = nn.Linear(4, 5, bias=False)
        self.outputs.weight = self.inputs.weight
        self.register_buffer("scale", torch.tensor(2.0))
        self.register_buffer("scratch", torch.rand(3), persistent=False)

    def forward(self, x):
        return self.outputs(self.inputs(x)) * self.scale


def test_the_finished_model_is_loadable_by_safetensors_alone_under_the_callers_names(tmp_path) -> None:
    trainer = trainer_of("adamw", folder=tmp_path, steps=3)
    trainer.fit()
    found = load_file(tmp_path / MODEL)
    assert bits(found) == bits(dict(trainer.model.state_dict()))
    torch.manual_seed(9)
    fresh = net()
    assert load_model(fresh, str(tmp_path / MODEL)) == (set(), [])
    fresh.eval()
    trainer.model.eval()
    assert torch.equal(fresh(rows(4)[0]), trainer.model(rows(4)[0]))


def test_tied_parameters_are_there_once_and_load_into_both_names(tmp_path) -> None:
    model = Tied()
    finished.save_finished_model(tmp_path / MODEL, model)
    assert sorted(load_file(tmp_path / MODEL)) == ["inputs.weight", "scale"]
    by_safetensors, by_us = Tied(), Tied()
    load_model(by_safetensors, str(tmp_path / MODEL))
    finished.load_start(tmp_path / MODEL, by_us)
    for fresh in (by_safetensors, by_us):
        assert torch.equal(fresh.outputs.weight, model.inputs.weight)
        assert fresh.outputs.weight is fresh.inputs.weight
    save_model(model, str(tmp_path / "theirs"))
    other = Tied()
    finished.load_start(tmp_path / "theirs", other)
    assert torch.equal(other.inputs.weight, model.inputs.weight)


def test_overlapping_views_are_saved_each_by_itself(tmp_path) -> None:
    model = nn.Module()
    model.whole = nn.Parameter(torch.arange(6.0))
    model.register_buffer("head", model.whole.detach()[:2])
    model.register_buffer("turned", model.whole.detach().reshape(2, 3).T)
    finished.save_finished_model(tmp_path / MODEL, model)
    found = load_file(tmp_path / MODEL)
    assert {name: tensor.tolist() for name, tensor in found.items()} == {
        "whole": [0, 1, 2, 3, 4, 5],
        "head": [0, 1],
        "turned": [[0, 3], [1, 4], [2, 5]],
    }


def test_a_plain_object_with_a_module_in_it(tmp_path) -> None:
    trainer = trainer_of("plain", folder=tmp_path, steps=3)
    trainer.fit()
    found = load_file(tmp_path / MODEL)
    assert sorted(found) == [
        "norm.bias", "norm.num_batches_tracked", "norm.running_mean", "norm.running_var", "norm.weight", "w",
    ]  # fmt: skip
    assert found["norm.num_batches_tracked"] == 8  # windows of 3, 3 and 2
    fresh = Line()
    finished.load_start(tmp_path, fresh)
    assert bits(contents.model_state(fresh)) == bits(contents.model_state(trainer.model))


def test_a_run_begins_with_the_numbers_of_a_model_a_checkpoint_or_a_folder(tmp_path) -> None:
    first = trainer_of("adamw", folder=tmp_path / "first", steps=4)
    first.fit()
    expected = bits(contents.model_state(first.model))
    for start in (MODEL, LAST, "", found(tmp_path / "first")):
        trainer = trainer_of("adamw", start=8, steps=4)
        trainer.load(tmp_path / "first" / start)
        assert bits(contents.model_state(trainer.model)) == expected
        assert trainer.step.clocks.steps == 0
        assert not trainer.step.optimizers[0].state, "only parameters and buffers"
    # A folder's model first, then its best checkpoint.
    best = bits(saved(tmp_path / "first", BEST)["model"])
    assert best != expected
    (tmp_path / "first" / MODEL).unlink()
    for start in ("", BEST):
        trainer.load(tmp_path / "first" / start)
        assert bits(contents.model_state(trainer.model)) == best


def test_a_start_that_does_not_fit_is_named_and_changes_nothing(tmp_path) -> None:
    model = nn.Linear(3, 2)
    before = bits(contents.model_state(model))
    for state, sentence in (
        ({"weight": torch.ones(2, 3)}, r"has no 'bias' \(1 missing\)"),
        (
            {"weight": torch.ones(2, 3), "bias": torch.ones(2), "extra": torch.ones(1)},
            "holds 'extra' .* which the model has not",
        ),
        (
            {"weight": torch.ones(3, 2), "bias": torch.ones(2)},
            r"'weight' has shape \(3, 2\) there and \(2, 3\) in the model",
        ),
        ({"weight": torch.ones(2, 3).long(), "bias": torch.ones(2)}, "'weight' is int64 there and float32"),
    ):
        save_file(state, tmp_path / "start")
        with pytest.raises(CheckpointError, match=sentence):
            finished.load_start(tmp_path / "start", model)
        assert bits(contents.model_state(model)) == before


def test_a_start_in_another_precision_becomes_the_models_own(tmp_path) -> None:
    state = {"weight": torch.full((2, 3), 1 / 3, dtype=torch.float64), "bias": torch.ones(2, dtype=torch.bfloat16)}
    save_file(state, tmp_path / "start")
    model = nn.Linear(3, 2)
    finished.load_start(tmp_path / "start", model)
    assert model.weight.dtype == model.bias.dtype == torch.float32
    assert model.weight[0, 0].item() == torch.tensor(1 / 3).item() and model.bias[0].item() == 1


def test_a_start_that_is_not_there_or_is_something_else(tmp_path) -> None:
    with pytest.raises(CheckpointError, match="nothing is not there: name a checkpoint or a run's folder"):
        finished.load_start(tmp_path / "nothing", nn.Linear(1, 1))
    with pytest.raises(CheckpointError, match="holds no checkpoint: name one, or a run's folder"):
        finished.load_start(tmp_path, nn.Linear(1, 1))
    (tmp_path / "text").write_text("text")
    with pytest.raises(CheckpointError, match="text cannot be read"):
        finished.load_start(tmp_path / "text", nn.Linear(1, 1))
    store.save(tmp_path / "other", {"a": 1})
    with pytest.raises(CheckpointError, match="other holds no model"):
        finished.load_start(tmp_path / "other", nn.Linear(1, 1))
    save_file({"weight": torch.ones(1, 1)}, tmp_path / "old", metadata={"trainer": "{}"})
    with pytest.raises(CheckpointError, match="old is a checkpoint of an earlier version, which was one file"):
        finished.load_start(tmp_path / "old", nn.Linear(1, 1))


def test_a_model_with_complex_numbers_is_refused_with_a_sentence(tmp_path) -> None:
    with pytest.raises(CheckpointError, match="the model's 'weight' is complex: a model.safetensors holds"):
        finished.save_finished_model(tmp_path / MODEL, nn.Linear(1, 1, dtype=torch.complex64))
    assert os.listdir(tmp_path) == []


def test_extra_state_that_is_a_tensor_goes_round(tmp_path) -> None:
    class Counts(nn.Linear):
        seen = 0

        def get_extra_state(self):
            return torch.tensor(self.seen)

        def set_extra_state(self, state):
            self.seen = int(state)

    model = Counts(1, 1)
    model.seen = 7
    finished.save_finished_model(tmp_path / MODEL, model)
    fresh = Counts(1, 1)
    finished.load_start(tmp_path / MODEL, fresh)
    assert fresh.seen == 7


def test_numbers_of_a_checkpoint_do_not_tie_the_optimizer_to_the_file(tmp_path) -> None:
    trainer_of("momentum", folder=tmp_path, steps=2).fit()
    again = trainer_of("momentum", folder=tmp_path, steps=4)
    again.fit(resume="auto")
    for path in found(tmp_path).iterdir():
        path.write_bytes(b"")
    assert all(math.isfinite(float(s["momentum_buffer"].sum())) for s in again.step.optimizers[0].state.values())


def test_an_averaging_optimizer_gives_its_average_to_the_finished_model(tmp_path) -> None:
    class Halves(torch.optim.SGD):
        def eval(self):
            with torch.no_grad():
                [p.div_(3) for group in self.param_groups for p in group["params"]]

        def train(self):
            pass

    model = nn.Linear(3, 1)
    trainer = Trainer(
        model, MSE, Halves(model.parameters(), lr=0.01), data=rows(4), steps=2, folder=tmp_path, console=False
    )
    trainer.fit()
    assert torch.equal(load_file(tmp_path / MODEL)["weight"], model.weight.detach() / 3)
    assert torch.equal(saved(tmp_path)["model"]["weight"], model.weight.detach())
