"""What --help says, and our parser under the check of Python 3.14."""

import pytest

from trainer.config import help, schema
from trainer.errors import ConfigError
from trainer.settings import Settings, fields_of, section_of


@pytest.mark.parametrize("verb", [None, *help.VERBS])
def test_every_help_string_is_one_that_python_3_14_takes(verb):
    """3.14's add_argument expands each help string at once; Hydra's is an object, and fails (hydra issue 3121)."""
    parser = help.parser(verb)
    formatter = parser._get_formatter()
    for action in parser._actions:
        assert isinstance(action.help, str) and isinstance(formatter._expand_help(action), str)
    check = getattr(parser, "_check_help", None)  # where this is 3.14 itself
    if check is not None:
        for action in parser._actions:
            check(action)
    assert parser.format_help()


def test_the_overview_has_every_verb_recipe_and_setting_with_a_line():
    text = help.overview()
    lines = {line.split("  ")[1].split("=")[0]: line for line in text.splitlines() if line.startswith("  ")}
    for name, line in [*help.VERBS.items(), *help.recipe_lines(None)]:
        assert line and any(row.startswith(f"  {name} ") and row.endswith(line) for row in text.splitlines())
    for name in fields_of(Settings):
        section = section_of(Settings, name)
        for full, field in [(name, fields_of(Settings)[name])] if section is None else [
            (f"{name}.{leaf}", leaf_field) for leaf, leaf_field in fields_of(section).items()
        ]:  # fmt: skip
            assert field.description in lines[full], full
    for name in (*schema.NODES, "data.source", "loggers.others", "run", "trust"):
        assert name in lines
    assert "gradient.clip_norm=null" in text and "best.mode=min" in text and "data.shuffle=true" in text


@pytest.mark.parametrize("verb", help.VERBS)
def test_a_verbs_help_has_its_flags_and_examples(verb):
    text = help.about(verb, None)
    assert all(example in text for example in help._EXAMPLES[verb])
    assert ("--config-dir, -cd DIR" in text) == (verb != "state")
    assert ("--multirun, -m" in text) == (verb not in ("recipes", "state"))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--mutlirun"], "there is no flag '--mutlirun': did you mean '--multirun'?"),
        (["--cfg", "jb"], "invalid choice: 'jb'"),
        (["--config-dir"], "expected one argument"),
    ],
)
def test_a_wrong_flag_is_a_sentence(words, sentence):
    with pytest.raises(ConfigError, match="^[^\n]*$") as caught:
        help.parser("train").parse_intermixed_args(words)
    assert sentence in str(caught.value)


def test_flags_and_overrides_may_come_in_any_order():
    options = help.parser("train").parse_intermixed_args(["recipe=xor", "-m", "seed=1,2", "--config-dir", "here", "~a"])
    assert (
        options.multirun and options.overrides == ["recipe=xor", "seed=1,2", "~a"] and str(options.config_dir) == "here"
    )
