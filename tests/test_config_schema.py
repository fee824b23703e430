"""A composed config read into settings, words and nodes."""

import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trainer.config import checks, schema
from trainer.errors import ConfigError
from trainer.settings import Settings, fields_of


def whole(**changes):
    tree = schema.defaults()
    tree |= {
        "recipe": "mine",
        "model": {"_target_": "trainer.recipes.digits.mlp", "width": 4},
        "objective": {"_target_": "torch.nn.MSELoss"},
        "optimizer": {
            "_target_": "trainer.optim.adamw",
            "lr": 0.1,
            "groups": [{"match": ["norms"], "weight_decay": 0.0}],
        },
    }
    tree["data"]["source"] = {"_target_": "trainer.recipes.digits.images"}
    tree["limits"]["epochs"] = 1
    return tree | changes


def test_defaults_read_back_as_the_settings_own_defaults():
    config = schema.read(schema.defaults())
    assert config.settings == Settings()
    assert config.words == schema.Words()
    assert config.groups == () and config.others == {}


def test_reserved_keys_are_taken_out_of_their_sections():
    config = schema.read(whole(loggers={"every": 7, "others": {"mine": {"_target_": "my.Logger"}, "off": None}}))
    assert config.settings.loggers.every == 7
    assert dict(config.others) == {"mine": {"_target_": "my.Logger"}}
    assert config.nodes["source"] == {"_target_": "trainer.recipes.digits.images"}
    assert "groups" not in config.nodes["optimizer"]
    assert config.groups == ({"match": ["norms"], "weight_decay": 0.0},)


def test_a_number_is_a_name_as_good_as_any():
    assert schema.read(whole(run=7)).words.run == "7"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"modle": 3}, "there is no setting 'modle': did you mean 'model'?"),
        ({"seed": "abc"}, "seed='abc' is not possible"),
        ({"seed": True}, "seed=True is not possible"),
        ({"trust": "os"}, "trust='os' is not possible"),
        ({"model": 3}, "model=3 is not possible: it is built from a _target_"),
        ({"model": {"width": 3}}, "model has no _target_"),
        ({"optimizer": {"_target_": "a.b", "groups": 3}}, "optimizer.groups=3 is not possible"),
        ({"optimizer": {"_target_": "a.b", "groups": [{"lr": 1}]}}, "it is a list of {match: [names]"),
        ({"loggers": {"others": 3}}, "loggers.others=3 is not possible"),
        ({"loggers": {"others": {"a": 3}}}, "loggers.others.a=3 is not possible"),
        ({"gradient": {"clip_norm": math.nan}}, "gradient.clip_norm=nan is not possible"),
        ({"gradient": {1: 2}}, "the key gradient.1 is int, not a word"),
        ({"gradient": 3}, "gradient=3 is not possible"),
        ({"data": {"batch_size": 0}}, "data.batch_size=0 is not possible"),
    ],
)
def test_what_does_not_fit_is_one_sentence_with_the_key(changes, sentence):
    with pytest.raises(ConfigError) as caught:
        schema.read(whole(**changes))
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


plain = (
    st.none()
    | st.booleans()
    | st.integers(-3, 10**20)
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from(("auto", "mean"))
)
anything = st.recursive(
    plain,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=2),
    max_leaves=4,
)


@st.composite
def changed(draw):
    """A whole config in which up to three places, there before or not, hold something else."""
    tree = whole()
    keys = []
    for _ in range(draw(st.integers(1, 3))):
        section = draw(st.sampled_from(sorted(tree)))
        node = tree[section]
        if isinstance(node, dict) and draw(st.integers(0, 9)):
            near = st.sampled_from(sorted(map(str, node))) if node else st.just("new")
            key = draw(near | near.map(lambda name: name[:-1]) | st.text(max_size=4))
            node[key] = draw(anything)
            keys.append(section)
        else:
            name = draw(st.just(section) | st.just(section[1:]) | st.text(max_size=4))
            tree[name] = draw(anything)
            keys.append(name)
    return tree, keys


@given(changed())
@settings(max_examples=270, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
def test_any_config_is_valid_or_one_sentence_that_names_the_key(example):
    tree, keys = example
    try:
        config = schema.read(tree)
        checks.check(config, "train", ["digits"])
    except ConfigError as error:
        assert error.exit_code == 2
        said = str(error)
        related = {
            "limits": "run would never end",
            "init": "resume",
            "resume": "init",
            "recipe": "recipe",
            "evaluation": "limits",
        }
        assert any(key in said or related.get(key, "\0") in said for key in keys), said
    else:
        assert isinstance(config.settings, Settings) and set(fields_of(Settings)) <= set(tree)
