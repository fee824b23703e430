"""Parameter groups by name: no decay for norms and biases, patterns, and sentences for those that match nothing."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trainer.errors import ConfigError
from trainer.optim import adamw, parameter_groups, sgd
from trainer.optim.groups import check_options


class RootMeanSquareNorm(nn.Module):
    """A norm of the user's own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)) for _ in range(2)])
        self.own = RootMeanSquareNorm()
        self.attention = nn.MultiheadAttention(4, 2)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight


class Plain:
    """A model that is no nn.Module, with tensors and modules in it."""

    def __init__(self) -> None:
        self.weight = torch.ones(2, 1, requires_grad=True)
        self.bias = torch.ones(1, requires_grad=True)
        self.constant = torch.ones(3)
        self.layers = [nn.Linear(2, 2), nn.LayerNorm(2)]
        self.named = {"norm": nn.BatchNorm1d(2)}


def names_in(model: Any, groups: list[dict[str, Any]]) -> list[set[str]]:
    from trainer.gradient.parameters import named_parameters

    names = {id(parameter): name for name, parameter in named_parameters(model).items()}
    return [{names[id(parameter)] for parameter in group["params"]} for group in groups]


NORMS = {"blocks.0.1.weight", "blocks.0.1.bias", "blocks.1.1.weight", "blocks.1.1.bias", "own.scale"}
BIASES = {
    "blocks.0.0.bias", "blocks.0.1.bias", "blocks.1.0.bias", "blocks.1.1.bias", "attention.in_proj_bias",
    "attention.out_proj.bias",
}  # fmt: skip


def test_no_decay_for_norms_and_biases() -> None:
    model = Model()
    groups = parameter_groups(model, [{"match": ["norms", "biases"], "weight_decay": 0.0}])
    rest, without = names_in(model, groups)
    assert without == NORMS | BIASES
    assert rest == {
        "embed.weight", "blocks.0.0.weight", "blocks.1.0.weight", "attention.in_proj_weight",
        "attention.out_proj.weight",
    }  # fmt: skip
    assert [set(group) for group in groups] == [{"params"}, {"params", "weight_decay"}]
    optimizer = adamw(groups, weight_decay=0.1)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm1d(3),
        nn.BatchNorm2d(3),
        nn.InstanceNorm1d(3, affine=True),
        nn.LayerNorm(3),
        nn.GroupNorm(1, 3),
        nn.RMSNorm(3),
    ],
)
def test_every_norm_of_torch_is_one(norm: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), norm)
    rest, norms = parameter_groups(model, [{"match": "norms", "weight_decay": 0.0}])
    assert [id(p) for p in rest["params"]] == [id(model[0].weight)]
    assert [id(p) for p in norms["params"]] == [id(p) for p in norm.parameters()]


def test_a_model_that_is_itself_a_norm() -> None:
    norm = nn.LayerNorm(3)
    (group,) = parameter_groups(norm, [{"match": "norms"}])
    assert [id(p) for p in group["params"]] == [id(norm.weight), id(norm.bias)]


def test_a_wrapper_named_norm_does_not_claim_what_is_in_it() -> None:
    class PreNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.inner = nn.LayerNorm(2), nn.Linear(2, 2)

    model = PreNorm()
    assert names_in(model, parameter_groups(model, [{"match": "norms"}])) == [
        {"inner.weight", "inner.bias"},
        {"norm.weight", "norm.bias"},
    ]


def test_the_first_group_that_matches_has_it() -> None:
    model = Model()
    wanted = [
        {"match": "blocks.0.*", "lr": 0.1},
        {"match": ["biases", "blocks.*"], "lr": 0.2},
        {"match": "*", "lr": 0.3},
    ]
    groups = parameter_groups(model, wanted)
    first, second, third = names_in(model, groups)
    assert first == {"blocks.0.0.weight", "blocks.0.0.bias", "blocks.0.1.weight", "blocks.0.1.bias"}
    assert second == (BIASES | {"blocks.1.0.weight", "blocks.1.1.weight"}) - first
    assert third == {"embed.weight", "own.scale", "attention.in_proj_weight", "attention.out_proj.weight"}
    assert [group["lr"] for group in groups] == [0.1, 0.2, 0.3]
    assert wanted[0] == {"match": "blocks.0.*", "lr": 0.1}


def test_a_group_that_has_nothing_left_is_left_out() -> None:
    model = nn.Linear(2, 2)
    groups = parameter_groups(model, [{"match": "*"}, {"match": "biases", "weight_decay": 0.0}])
    assert len(groups) == 1
    assert len(parameter_groups(nn.Linear(2, 2, bias=False), [{"match": ["norms", "biases"]}])) == 1


def test_every_parameter_is_in_exactly_one_group() -> None:
    model = Model()
    for wanted in ([], [{"match": "norms"}], [{"match": ["*.weight", "norms"]}, {"match": "biases"}]):
        found = [id(p) for group in parameter_groups(model, wanted) for p in group["params"]]
        assert sorted(found) == sorted(id(p) for p in model.parameters())


def test_tied_parameters_come_once() -> None:
    model = Model()
    groups = parameter_groups(model, [{"match": "embed.*", "lr": 0.1}])
    assert sum(p is model.embed.weight for group in groups for p in group["params"]) == 1
    assert [id(p) for p in groups[1]["params"]] == [id(model.head.weight)]


def test_frozen_parameters_are_left_out() -> None:
    model = Model()
    model.blocks.requires_grad_(False)
    groups = parameter_groups(model, [{"match": "norms"}])
    assert names_in(model, groups)[1] == {"own.scale"}
    with pytest.raises(ConfigError, match=r"no parameter that requires a gradient matches 'blocks\.\*'"):
        parameter_groups(model, [{"match": "blocks.*"}])
    model.requires_grad_(False)
    with pytest.raises(ConfigError, match="the model Model has no parameter that requires a gradient"):
        parameter_groups(model)


def test_a_plain_object() -> None:
    model = Plain()
    groups = parameter_groups(model, [{"match": "norms"}, {"match": "biases"}, {"match": "layers.*", "lr": 0.1}])
    assert names_in(model, groups) == [
        {"weight"},
        {"layers.1.weight", "layers.1.bias", "named.norm.weight", "named.norm.bias"},
        {"bias", "layers.0.bias"},
        {"layers.0.weight"},
    ]
    assert all(tensor is not model.constant for group in groups for tensor in group["params"])


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        ([{"match": "encoder.*"}], r"optimizer\.groups: no parameter .* matches 'encoder\.\*': choose one of: "),
        ([{"match": ["biases", "head.wieght"]}], r"matches 'head\.wieght': did you mean 'head\.weight'\?"),
        ([{"match": "norm"}], r"matches 'norm'"),
        ([{"match": 3}], r"matches '3'"),
        ([{"lr": 0.1}], r"a group has no 'match'"),
        ([{"match": [], "lr": 0.1}], r"a group has no 'match'"),
        ([{"match": "", "lr": 0.1}], r"a group has no 'match'"),
        (["norms"], r"optimizer\.groups: 'norms' is no group: write \{match: norms"),
        ({"match": "norms"}, r"optimizer\.groups is a list of groups"),
    ],
)
def test_what_is_refused(groups: Any, words: str) -> None:
    model = nn.Module()
    model.head = nn.Linear(2, 2)
    with pytest.raises(ConfigError, match=words):
        parameter_groups(model, groups)


def test_options_that_the_optimizer_does_not_have() -> None:
    """Torch takes any key into a group and passes over it."""
    groups = parameter_groups(Model(), [{"match": "norms", "weight_decai": 0.0}])
    for make in (adamw, sgd):
        with pytest.raises(ConfigError, match=r"has no option 'weight_decai': did you mean 'weight_decay'\?"):
            make(groups)
    check_options(torch.optim.Adam([{"params": [torch.ones(1, requires_grad=True)], "lr": 0.1, "initial_lr": 0.2}]))
    named: list[tuple[str, Tensor]] = list(Model().named_parameters())
    check_options(torch.optim.Adam(named))
