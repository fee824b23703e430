"""Parameters and modules by name, of modules and of plain objects."""

import pytest
import torch
from reference import mlp
from torch import nn

from trainer.errors import ConfigError
from trainer.gradient.parameters import Trained, named_for, named_modules, named_parameters
from trainer.optim import Manual


class Plain:
    def __init__(self) -> None:
        self.w = torch.ones(2, requires_grad=True)
        self.again = self.w
        self.frozen = torch.ones(2)
        self.made = self.w * 2
        self.layers = [nn.Linear(1, 1, bias=False), {"norm": nn.BatchNorm1d(1)}]
        self.text = "w"


def test_a_plain_object_holds_leaves_in_attributes_lists_mappings_and_modules() -> None:
    model = Plain()
    assert list(named_parameters(model)) == ["w", "layers.0.weight", "layers.1.norm.weight", "layers.1.norm.bias"]
    assert named_parameters(model)["w"] is model.w
    assert list(named_modules(model)) == ["layers.0", "layers.1.norm"]


def test_a_module_gives_its_own_names_and_tied_parameters_once() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight = model[0].weight
    assert list(named_parameters(model)) == ["0.weight"]
    assert list(named_modules(model)) == ["", "0", "1"]


def test_the_optimizers_parameters_are_named_by_the_model_or_by_their_place() -> None:
    model, stray = Plain(), torch.ones(1, requires_grad=True)
    named = named_for(model, [Manual([{"params": [model.w]}, {"params": [stray]}])])
    assert list(named) == ["w", "optimizer0.group1.0"]
    assert named["optimizer0.group1.0"] is stray


def test_no_parameters_and_shared_ones_are_refused() -> None:
    model = Plain()
    empty = Manual([{"params": []}])
    with pytest.raises(ConfigError, match="holds no parameters: build it from those of the model"):
        named_for(model, [empty])
    with pytest.raises(ConfigError, match="'w' is in optimizer 0 and in optimizer 1"):
        named_for(model, [Manual([model.w]), Manual([model.w])])


def test_a_group_that_joins_later_is_reached_by_backward() -> None:
    model = mlp()
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters[:2], lr=0.1)
    trained = Trained(model, [optimizer])
    assert len(trained.inputs) == 2
    optimizer.add_param_group({"params": parameters[2:4]})
    trained.refresh()
    assert len(trained.inputs) == 4
    optimizer.add_param_group({"params": parameters[4:]})
    trained.refresh()
    assert trained.inputs == ()
