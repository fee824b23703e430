"""Composing through Hydra: what wins over what, what a recipe may not say, and each mistake as one sentence."""

import re

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from trainer.cli import Jobs
from trainer.config import hydra_app
from trainer.errors import ConfigError

RECIPE = """# @package _global_
# trainer train recipe=mine --config-dir .
defaults:
{defaults}
  - override /optimizer: sgd
  - override /schedule: cosine
model: {{_target_: my_model.Net, width: 3}}
objective: {{_target_: torch.nn.MSELoss}}
optimizer: {{lr: 0.5, momentum: 0.9}}
data: {{batch_size: 2, source: {{_target_: my_model.rows}}}}
limits: {{epochs: 1}}
{more}
"""


@pytest.fixture(scope="module")
def shipped():
    with hydra_app.opened(None) as (_, loader):
        yield loader


@pytest.fixture
def own(tmp_path):
    """Composes with a folder of the user's own: own(overrides, more=lines of the recipe, files={path: text})."""

    def composed(*overrides, more="", defaults="", files=(), name="train"):
        (tmp_path / "recipe").mkdir(exist_ok=True)
        (tmp_path / "recipe" / "mine.yaml").write_text(RECIPE.format(more=more, defaults=defaults))
        for path, text in dict(files).items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(text)
        with hydra_app.opened(tmp_path) as (_, loader):
            return hydra_app.composed(hydra_app.compose(loader, name, ["recipe=mine", *overrides]))

    return composed


def test_the_recipe_overlays_the_groups_and_the_command_line_the_recipe(own):
    tree = own("data.batch_size=7")
    assert tree["recipe"] == "mine"
    assert tree["optimizer"] == {
        "_target_": "trainer.optim.sgd",
        "lr": 0.5,
        "momentum": 0.9,
        "weight_decay": 0.0,
        "nesterov": False,
        "groups": [],
    }
    assert tree["schedule"]["_target_"] == "trainer.optim.schedules.cosine"
    assert tree["data"]["batch_size"] == 7


def test_another_optimizer_by_hand_does_away_with_the_recipes_values_for_its_own(own):
    assert own("optimizer=adamw")["optimizer"]["lr"] == 1e-3
    assert "momentum" not in own("optimizer=manual")["optimizer"]
    assert own("optimizer=sgd")["optimizer"]["lr"] == 0.5
    assert own("optimizer=adamw", "optimizer.lr=0.7")["optimizer"]["lr"] == 0.7
    assert own("schedule=none")["schedule"] is None


def test_a_group_of_ones_own_wins_over_the_recipe(own):
    files = {"model/wide.yaml": "_target_: my_model.Wide\n", "data/other.yaml": "source: {_target_: my_model.other}\n"}
    tree = own("model=wide", "data=other", files=files)
    assert tree["model"] == {"_target_": "my_model.Wide"}
    assert tree["data"]["source"] == {"_target_": "my_model.other"} and tree["data"]["batch_size"] == 2


def test_overlays_come_in_order(own):
    overlay = "# @package _global_\nseed: {}\nlimits: {{steps: {}}}\n"
    names = ("experiment/e", "sweep/s", "local/default", "debug/d")
    files = {f"{name}.yaml": overlay.format(number, number) for number, name in enumerate(names)}
    assert own(more="seed: 9", files={})["seed"] == 9
    assert own("experiment=e", files={"experiment/e.yaml": files["experiment/e.yaml"]})["seed"] == 0
    assert own("experiment=e", "sweep=s", files=files)["seed"] == 2  # the machine's own file is there as well
    assert own("experiment=e", "sweep=s", "debug=d", files=files)["seed"] == 3
    assert own("debug=d", "seed=4", files=files)["seed"] == 4


def test_ones_own_recipe_wins_over_a_shipped_one_of_its_name(own, tmp_path):
    text = RECIPE.format(more="seed: 77", defaults="")
    assert own("recipe=digits", files={"recipe/digits.yaml": text})["seed"] == 77


@pytest.mark.parametrize("how", ["trust: [os]", "trust: []"])
def test_a_recipe_cannot_say_whom_to_trust(own, how):
    with pytest.raises(ConfigError, match=r"recipe/mine.yaml says whom to trust, and only you can"):
        own(more=how)
    with pytest.raises(ConfigError, match="only you can"):
        own("trust=[os]", more=how)


def test_nor_can_a_file_that_it_draws_in(own):
    with pytest.raises(ConfigError, match="model/evil.yaml says whom to trust"):
        own(defaults="  - override /model: evil", files={"model/evil.yaml": "# @package _global_\ntrust: [os]\n"})


def test_the_command_line_and_ones_own_root_and_machine_can(own):
    assert own("trust=[os]")["trust"] == ["os"]
    assert own(files={"local/default.yaml": "# @package _global_\ntrust: [json]\n"})["trust"] == ["json"]
    root = "defaults: [train, _self_]\ntrust: [timm]\n"
    assert own(files={"root.yaml": root, "local/default.yaml": ""}, name="root")["trust"] == ["timm"]


@pytest.mark.parametrize(
    "node",
    [
        "{callbacks: {evil: {_target_: os.system, command: touch canary}}}",
        "{launcher: {_target_: os.system}}",
        "{sweeper: {_target_: os.system}}",
        "{job_logging: {handlers: {evil: {(): os.system}}}}",
        "{job: {env_set: {LD_PRELOAD: evil.so}}}",
        "{output_subdir: ../..}",
    ],
)
def test_a_recipe_cannot_make_hydra_call_anything(own, node):
    with pytest.raises(ConfigError, match=r"recipe/mine.yaml sets hydra\.\w+, where it may only set"):
        own(more=f"hydra: {node}")


@pytest.mark.parametrize(
    "word", ["trust", "+trust", "trust.0", "hydra.launcher._target_", "++hydra.job.chdir", "a=1 trust"]
)
def test_nor_can_it_do_so_through_a_sweep(own, word):
    with pytest.raises(ConfigError, match="which only you can say"):
        own(more=f"hydra: {{sweeper: {{params: {{'{word}': '[os]'}}}}}}")


def test_nor_through_the_file_of_a_machine_or_a_group_of_hydra(own):
    with pytest.raises(ConfigError, match="local/default.yaml says whom to trust"):
        own(defaults="  - /local/default@_global_", files={"local/default.yaml": "trust: [os]\n"})
    evil = {"hydra/launcher/evil.yaml": "_target_: os.system\n", "local/default.yaml": ""}
    with pytest.raises(ConfigError, match="recipe/mine.yaml takes hydra/launcher/evil.yaml|what Hydra calls only you"):
        own(defaults="  - override /hydra/launcher: evil", files=evil)


def test_a_recipe_may_say_where_its_runs_lie_and_what_its_sweep_takes(own):
    own(more="hydra: {run: {dir: here}, sweep: {dir: there}, sweeper: {params: {seed: '0,1'}}}")


def test_names_of_terms_and_loggers_are_the_users_to_choose(shipped):
    words = ["recipe=digits", "gradient.coefficients.mine=2.0", "loggers.others.mine={_target_: my.Logger}"]
    tree = hydra_app.composed(hydra_app.compose(shipped, "train", words))
    assert tree["gradient"]["coefficients"] == {"mine": 2.0}
    assert tree["loggers"]["others"] == {"mine": {"_target_": "my.Logger"}}


SENTENCES = [
    (["gradient.clip_nrm=1"], "there is no setting 'gradient.clip_nrm': did you mean 'gradient.clip_norm'?"),
    (["+gradient.clip_nrm=1"], "there is no setting 'gradient.clip_nrm': did you mean 'clip_norm'?"),
    (["+gradient.foo=1"], "there is no setting 'gradient.foo': choose one of: accumulate_in, accumulation_steps,"),
    (["gradient.clip_norm=-1"], "gradient.clip_norm=-1 is not possible: input should be greater than 0."),
    (["clip_norm=1"], "there is no setting 'clip_norm': did you mean 'gradient.clip_norm'?"),
    (["lr=1"], "there is no setting 'lr': did you mean 'optimizer.lr'?"),
    (["modle=3"], "there is no setting 'modle': did you mean 'model'?"),
    (["+modle=3"], "there is no setting 'modle': did you mean 'model'?"),
    (["optimizer.lrr=3"], "there is no setting 'optimizer.lrr': did you mean 'optimizer.lr'?"),
    (["~gradient.clipnorm"], "there is no setting 'gradient.clipnorm': did you mean 'gradient.clip_norm'?"),
    (["recipe=digit"], "there is no recipe 'digit': did you mean 'digits'?"),
    (["optimizer=adam"], "there is no optimizer 'adam': did you mean 'adamw'?"),
    (["optimizer=[adam]"], "there is no optimizer 'adam': did you mean 'adamw'?"),
    (["optimizer=3"], "'optimizer=3' is not possible: write optimizer=NAME with one of: adamw, manual, sgd."),
    (["experiment=x"], "there is no experiment to choose from: put yours into experiment/ of a folder"),
    (["seed=abc"], "seed='abc' is not possible: input should be a valid integer."),
    (["data.batch_size=0"], "data.batch_size=0 is not possible: input should be greater than or equal to 1."),
    (["+trust=[os]"], "the setting 'trust' is there already: write trust=VALUE without the +."),
    (["+precision=fp32"], "the setting 'precision' is there already: write precision=VALUE without the +."),
    (["gradient.clip_norm=1,2"], "'gradient.clip_norm=1,2' has several values: add -m to run each of them"),
    (["seed=range(3)"], "'seed=range(3)' has several values: add -m"),
    (["gradient..x=1"], "'gradient..x=1' is not understood: write key=value"),
    (["a=[1"], "'a=[1' is not understood"),
    (["seed=${nope}"], "seed: Interpolation key 'nope' not found."),
    (["seed=???"], "seed has no value yet (???): write seed=VALUE."),
    (["model.width=???"], "model.width has no value yet (???): write model.width=VALUE."),
    (["foo@bar=3"], "there is no setting 'foo': choose one of:"),
    (["hydra.run.dirr=3"], "there is no setting 'hydra.run.dirr': did you mean 'hydra.run.dir'?"),
    (["precision=fp17"], "precision='fp17' is not possible"),
    (
        ["activation_checkpointing=budget"],
        "there is no activation_checkpointing 'budget': choose one of: none, segments.",
    ),
    (["model._target_=os.system"], "model._target_=os.system is refused"),
]


@pytest.mark.parametrize(("words", "sentence"), SENTENCES)
def test_each_mistake_is_one_sentence_with_the_nearest_right_name(shipped, words, sentence):
    with pytest.raises(ConfigError) as caught:
        Jobs("train", None).check(hydra_app.compose(shipped, "train", ["recipe=digits", *words]))
    assert sentence in str(caught.value) and "\n" not in str(caught.value) and caught.value.exit_code == 2


def test_a_broken_file_is_named_with_its_line(own):
    with pytest.raises(ConfigError, match=r"mine.yaml, line \d+: "):
        own(more="seed: [1")


def test_folders_are_named_by_the_recipe_and_the_time_or_the_runs_name(shipped, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = hydra_app.compose(shipped, "train", ["recipe=xor", "run=mine"])
    assert config.hydra.run.dir == "outputs/xor/mine"
    config = hydra_app.compose(shipped, "train", ["recipe=xor"])
    first = config.hydra.run.dir
    assert re.fullmatch(r"outputs/xor/\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d", first)
    assert re.fullmatch(r"outputs/xor/sweep-[-_\d]+", config.hydra.sweep.dir)
    (tmp_path / first).mkdir(parents=True)
    again = hydra_app.compose(shipped, "train", ["recipe=xor"]).hydra.run.dir
    assert again != first


KEYS = [
    "seed", "precision", "gradient", "gradient.clip_norm", "gradient.accumulation_steps", "gradient.coefficients",
    "data", "data.batch_size", "data.source", "limits.time", "loggers.others", "optimizer", "optimizer.lr",
    "optimizer.groups", "model", "recipe", "schedule", "trust", "run", "best.mode", "activation_checkpointing", "debug",
    "hydra.mode", "hydra.job",
]  # fmt: skip
VALUES = [
    "null", "true", "-1", "0", "1e400", "nan", "inf", "abc", "adamw", "digits", "[1,a]", "{a: 1}", "{1: {b: [nan]}}",
    "''",     "${seed}", "${nope.x}", "${oc.env:NOT_SET_ANYWHERE}", "'a,b'", "1,2", "range(1,3)", "[", "???",
    "{_target_: os.system}",
    "{_target_: torch.load, f: x}", "${gradient}", "choice(1,2)", "fast", "segments",
]  # fmt: skip
keys = st.sampled_from(KEYS)
wrong = st.builds(lambda key, at: key[:at] + key[at + 1 :], keys, st.integers(0, 12)) | st.text(
    "abc.@/_", min_size=1, max_size=5
)
words = st.builds(
    "".join,
    st.tuples(st.sampled_from(["", "", "", "+", "++", "~"]), keys | wrong, st.just("="), st.sampled_from(VALUES)),
)


@given(st.lists(words, min_size=1, max_size=3))
@settings(
    max_examples=30, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck), derandomize=True
)
def test_any_words_make_a_valid_config_or_one_sentence_that_names_one_of_them(shipped, overrides):
    try:
        Jobs("train", None).check(hydra_app.compose(shipped, "train", ["recipe=digits", *overrides]))
    except ConfigError as error:
        names = [word.lstrip("+~").partition("=")[0] for word in overrides]
        said = str(error)
        assert error.exit_code == 2 and "\n" not in said
        parts = {part for name in names for part in re.split(r"[.@/]", name) if part} | set(overrides)
        assert any(part in said for part in parts) or "the run would never end" in said, (overrides, said)


def test_an_interrupt_inside_omegaconf_stays_one():
    from trainer.config.sentences import Known, explain

    error = ValueError("wrapped")
    error.__cause__ = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        explain(error, (), lambda: Known({}, {}))
