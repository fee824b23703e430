"""What a checkpoint holds: model.safetensors for everybody, and init= from whatever holds parameters."""

import math
import os

import pytest
import torch
from runs import MSE, Line, bits, net, rows, trainer_of
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn

from trainer import CheckpointError, Trainer
from trainer.checkpoint import contents, store
from trainer.checkpoint.run_state import BEST, LAST, MODEL


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
    contents.save_finished_model(tmp_path / MODEL, model)
    assert sorted(load_file(tmp_path / MODEL)) == ["inputs.weight", "scale"]
    by_safetensors, by_us = Tied(), Tied()
    load_model(by_safetensors, str(tmp_path / MODEL))
    contents.load_start(tmp_path / MODEL, by_us)
    for fresh in (by_safetensors, by_us):
        assert torch.equal(fresh.outputs.weight, model.inputs.weight)
        assert fresh.outputs.weight is fresh.inputs.weight
    save_model(model, str(tmp_path / "theirs"))
    other = Tied()
    contents.load_start(tmp_path / "theirs", other)
    assert torch.equal(other.inputs.weight, model.inputs.weight)


def test_overlapping_views_are_saved_each_by_itself(tmp_path) -> None:
    model = nn.Module()
    model.whole = nn.Parameter(torch.arange(6.0))
    model.register_buffer("head", model.whole.detach()[:2])
    model.register_buffer("turned", model.whole.detach().reshape(2, 3).T)
    contents.save_finished_model(tmp_path / MODEL, model)
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
    contents.load_start(tmp_path, fresh)
    assert bits(contents.model_state(fresh)) == bits(contents.model_state(trainer.model))


def test_a_run_begins_with_the_numbers_of_a_model_a_checkpoint_or_a_folder(tmp_path) -> None:
    first = trainer_of("adamw", folder=tmp_path / "first", steps=4)
    first.fit()
    expected = bits(contents.model_state(first.model))
    alone = tmp_path / "alone"
    alone.mkdir()
    for start in (MODEL, LAST, ""):
        trainer = trainer_of("adamw", start=8, steps=4)
        trainer.load(tmp_path / "first" / start)
        assert bits(contents.model_state(trainer.model)) == expected
        assert trainer.step.clocks.steps == 0
        assert not trainer.step.optimizers[0].state, "only parameters and buffers"
    for name in (LAST, BEST, MODEL):
        os.replace(tmp_path / "first" / name, alone / name)
        trainer = trainer_of("adamw", start=8, steps=4)
        trainer.load(alone)
        best = store.load(alone / BEST)["model"] if (alone / BEST).exists() else None
        wanted = bits(best) if name == BEST else expected
        assert bits(contents.model_state(trainer.model)) == wanted


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
        ({"weight": torch.ones(2, 3).double(), "bias": torch.ones(2)}, "'weight' is float64 there and float32"),
    ):
        save_file(state, tmp_path / "start")
        with pytest.raises(CheckpointError, match=sentence):
            contents.load_start(tmp_path / "start", model)
        assert bits(contents.model_state(model)) == before


def test_a_start_that_is_not_there_or_is_something_else(tmp_path) -> None:
    with pytest.raises(
        CheckpointError, match="nothing is not there: name a checkpoint, a model.safetensors or a run's folder"
    ):
        contents.load_start(tmp_path / "nothing", nn.Linear(1, 1))
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not there"):
        contents.load_start(tmp_path, nn.Linear(1, 1))
    (tmp_path / "text").write_text("text")
    with pytest.raises(CheckpointError, match="text cannot be read"):
        contents.load_start(tmp_path / "text", nn.Linear(1, 1))
    store.save(tmp_path / "other", {"a": 1})
    with pytest.raises(CheckpointError, match="other holds no model"):
        contents.load_start(tmp_path / "other", nn.Linear(1, 1))


def test_extra_state_must_be_a_tensor() -> None:
    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"a": 1}

    with pytest.raises(CheckpointError, match="the model's state '_extra_state' is dict: a checkpoint holds tensors"):
        contents.model_state(Extra(1, 1))


def test_extra_state_that_is_a_tensor_goes_round(tmp_path) -> None:
    class Counts(nn.Linear):
        seen = 0

        def get_extra_state(self):
            return torch.tensor(self.seen)

        def set_extra_state(self, state):
            self.seen = int(state)

    model = Counts(1, 1)
    model.seen = 7
    contents.save_finished_model(tmp_path / MODEL, model)
    fresh = Counts(1, 1)
    contents.load_start(tmp_path / MODEL, fresh)
    assert fresh.seen == 7


def test_numbers_of_a_checkpoint_do_not_tie_the_optimizer_to_the_file(tmp_path) -> None:
    trainer_of("momentum", folder=tmp_path, steps=2).fit()
    again = trainer_of("momentum", folder=tmp_path, steps=4)
    again.fit(resume="auto")
    with (tmp_path / LAST).open("r+b") as file:
        file.truncate(0)
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
    assert torch.equal(store.load(tmp_path / LAST)["model"]["weight"], model.weight.detach())


def test_a_model_in_float64_and_one_with_complex_numbers_go_round(tmp_path) -> None:
    class Turn:
        def __init__(self) -> None:
            self.w = torch.randn(3, dtype=torch.complex128, requires_grad=True)

    first, second = Turn(), Turn()
    store.save(tmp_path / "state", {"model": contents.model_state(first)})
    contents.load_model(second, store.load(tmp_path / "state")["model"], "state")
    assert torch.equal(first.w, second.w)


def test_a_state_of_another_optimizer_is_named() -> None:
    from trainer.checkpoint import contents
    from trainer.optim import adamw, sgd

    weight = torch.zeros(2, requires_grad=True)
    saved = contents.optimizer_state(adamw([weight]))
    with pytest.raises(CheckpointError, match="holds the state of AdamW, and the run's optimizer is SGD"):
        contents.load_optimizers([sgd([weight])], [saved], "here")
