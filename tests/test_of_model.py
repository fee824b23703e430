"""The model's part of a checkpoint: what is in it, and what does not fit is named."""

import pytest
import torch
from torch import nn

from trainer import CheckpointError
from trainer.checkpoint import of_model, store


def test_extra_state_must_be_a_tensor() -> None:
    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"a": 1}

    with pytest.raises(CheckpointError, match="the model's state '_extra_state' is dict: a checkpoint holds tensors"):
        of_model.model_state(Extra(1, 1))


def test_a_model_in_float64_and_one_with_complex_numbers_go_round(tmp_path) -> None:
    class Turn:
        def __init__(self) -> None:
            self.w = torch.randn(3, dtype=torch.complex128, requires_grad=True)

    first, second = Turn(), Turn()
    store.save(tmp_path / "state", {"model": of_model.model_state(first)})
    of_model.load_model(second, store.load(tmp_path / "state")["model"], "state")
    assert torch.equal(first.w, second.w)


def test_what_does_not_fit_is_named_and_nothing_is_changed() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    state = {name: tensor.clone() + 1 for name, tensor in of_model.model_state(model).items()}
    before = {name: tensor.clone() for name, tensor in of_model.model_state(model).items()}
    for change, sentence in (
        ({"0.bias": None}, r"here has no '0\.bias' \(1 missing\)"),
        ({"0.bais": torch.ones(2)}, r"here holds '0\.bais' \(1 left over\), which the model has not: did you mean"),
        ({"0.bias": torch.ones(3)}, r"'0\.bias' has shape \(3,\) there and \(2,\) in the model"),
        ({"1.num_batches_tracked": torch.ones(())}, "is float32 there and int64 in the model"),
    ):
        other = {name: tensor for name, tensor in {**state, **change}.items() if tensor is not None}
        with pytest.raises(CheckpointError, match=sentence):
            of_model.load_model(model, other, "here")
        assert all(torch.equal(before[name], tensor) for name, tensor in of_model.model_state(model).items())
    of_model.load_model(model, state, "here")
    assert all(torch.equal(state[name], tensor) for name, tensor in of_model.model_state(model).items())
