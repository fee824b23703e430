"""What only a whole config can get wrong."""

import pytest

from tests.test_config_schema import whole
from trainer.config import checks, schema
from trainer.errors import ConfigError

RECIPES = ["xor", "digits"]


def limits(**values):
    return {"limits": {"epochs": None, **values}}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"recipe": None, "model": None}, "there is no recipe: write recipe=NAME with one of: digits, xor."),
        ({"objective": None}, "objective is missing"),
        ({"data": {"source": None}}, "data.source is missing"),
        (limits(), "the run would never end: set one of limits.epochs"),
        (limits(steps=9, patience=2) | {"evaluation": {"every": None}}, "limits.patience counts evaluations"),
        ({"run": "a/b"}, "run='a/b' is not possible"),
        ({"run": ".."}, "run='..' is not possible"),
        ({"run": "10:30"}, "run='10:30' is not possible"),
        ({"run": ""}, "run='' is not possible"),
        ({"trust": ["torch.nn"]}, "trust='torch.nn' is not possible"),
        ({"init": "a", "resume": "b"}, "init and resume are both set"),
        (
            {"init": "nowhere.safetensors"},
            "init=nowhere.safetensors: there is no such file or folder: name one that exists.",
        ),
        ({"resume": "lats"}, "there is no such file or folder: did you mean 'last', or name one that exists."),
        (
            {"resume": "nowhere"},
            "resume=nowhere: there is no such file or folder: choose one of: auto, last, never, or name",
        ),
        ({"seed": 2**63}, "seed=9223372036854775808 is not possible: it is larger than 2^63 - 1"),
        ({"data": {"batch_size": 10**30, "source": {"_target_": "a.b"}}}, "data.batch_size=1000000000"),
    ],
)
def test_each_is_refused_with_its_sentence(changes, sentence):
    with pytest.raises(ConfigError, match=r"^[^\n]*$") as caught:
        checks.check(schema.read(whole(**changes)), "train", RECIPES)
    assert sentence in str(caught.value)


def test_a_whole_config_passes_and_evaluation_needs_no_end():
    checks.check(schema.read(whole()), "train", RECIPES)
    checks.check(schema.read(whole(**limits())), "eval", RECIPES)


@pytest.mark.parametrize("name", ["mine", "a-b_c.1", "lr=0.1", "7"])
def test_plain_names_make_folders(name):
    checks.check(schema.read(whole(run=name)), "train", RECIPES)
