"""A user's exception keeps its traceback, without our frames above it."""

import pytest
import torch

from trainer.config.door import Door
from trainer.config.traceback import print_users


class Broken(torch.nn.Module):
    def forward(self, x):
        return self.deeper(x)

    def deeper(self, x):
        raise ValueError("the user's own")


def test_it_begins_at_the_users_first_frame_and_keeps_all_below(capsys):
    def through_ours():
        node = {"_target_": "torch.nn.Sequential", "_args_": []}
        Door().make(node, "model", "model").append(Broken())(1)

    with pytest.raises(ValueError, match="the user's own") as caught:
        through_ours()
    print_users(caught.value)
    said = capsys.readouterr().err
    assert said.startswith("Traceback") and "in deeper" in said and "ValueError: the user's own" in said
    assert "torch/nn" in said  # below the user's first frame nothing is cut


def test_frames_of_ours_and_of_torch_above_it_are_cut(capsys):
    from trainer.gradient.objective import supervised

    with pytest.raises(ValueError, match="the user's own") as caught:
        supervised(torch.nn.MSELoss())(torch.nn.Sequential(Broken()), (torch.ones(1), torch.ones(1)))
    error = caught.value
    error.__traceback__ = error.__traceback__.tb_next  # without this test's own frame
    print_users(error)
    said = capsys.readouterr().err
    assert "objective.py" not in said and "torch/nn" not in said and "in forward" in said and "in deeper" in said


def test_where_no_code_of_the_users_took_part_the_frames_below_ours_are_left(capsys):
    from trainer.gradient.objective import supervised

    with pytest.raises(RuntimeError) as caught:
        supervised(torch.nn.functional.mse_loss)(torch.nn.Linear(3, 1), (torch.ones(2, 5), torch.ones(2, 1)))
    error = caught.value
    error.__traceback__ = error.__traceback__.tb_next
    print_users(error)
    said = capsys.readouterr().err
    assert "torch/nn/modules/linear.py" in said and "RuntimeError" in said
