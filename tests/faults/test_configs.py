"""Configs made at random: a valid run, or one sentence with exit code 2 that names the key. Never a traceback."""

import copy
import os
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tally import Tally, times

from trainer.config import build, catalogue, checks, hydra_app, schema
from trainer.config.door import Door
from trainer.errors import ConfigError, TrainerError

NUMBERS = st.one_of(
    st.integers(-3, 40),
    st.sampled_from([0, -1, 2**31, 2**63, 10**30]),
    st.floats(allow_nan=True, allow_infinity=True),
    st.sampled_from([0.0, -0.5, 1e-300, 1e300]),
)
VALUES = st.one_of(
    NUMBERS,
    st.none(),
    st.booleans(),
    st.text(max_size=6),
    st.sampled_from(
        ["none", "null", "auto", "steps", "epochs", "tokens", "fp16", "bf16", "mean", "last", "..", "a/b", "skip"]
    ),
    st.lists(NUMBERS, max_size=2),
    st.dictionaries(st.text(max_size=4), NUMBERS, max_size=2),
    st.just({"_target_": "os.system", "command": "touch canary"}),
)


def base() -> dict[str, Any]:
    """A small recipe as it is composed, writing and saying nothing."""
    words = [
        "recipe=xor_mlp",
        "loggers.console=false",
        "loggers.tensorboard=false",
        "loggers.metrics=false",
        "limits.steps=2",
    ]
    with hydra_app.opened(None) as (_, loader):
        return hydra_app.composed(hydra_app.compose(loader, "train", words))


def paths(tree: Any, above: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = []
    for name, value in tree.items():
        found.append((*above, name))
        if isinstance(value, dict) and value:
            found += paths(value, (*above, name))
    return found


BASE = base()
PATHS = paths(BASE)
CHANGES = st.lists(
    st.one_of(
        st.tuples(st.just("set"), st.sampled_from(PATHS), VALUES),
        st.tuples(st.just("misspell"), st.sampled_from(PATHS), st.integers(0, 20)),
        st.tuples(st.just("add"), st.sampled_from(PATHS), st.text("abcdefg_.$", min_size=1, max_size=5)),
        st.tuples(st.just("drop"), st.sampled_from(PATHS), st.none()),
    ),
    min_size=1,
    max_size=3,
)


def changed(changes: list[tuple[str, tuple[str, ...], Any]]) -> tuple[dict[str, Any], set[str]]:
    """A config with the changes, and the words of which a sentence about it must name one."""
    tree = copy.deepcopy(BASE)
    names = {part for _, path, _ in changes for part in path} | {str(value) for _, _, value in changes}
    for what, path, value in changes:
        inside = tree
        for name in path[:-1]:
            inside = inside.get(name) if isinstance(inside, dict) else None
        if not isinstance(inside, dict) or path[-1] not in inside:
            continue
        name = path[-1]
        if what == "set":
            inside[name] = value
        elif what == "misspell":
            at = value % len(name)
            names.add(name[:at] + "x" + name[at:])
            inside[name[:at] + "x" + name[at:]] = inside.pop(name)
        elif what == "add":
            inside[value] = 1
        else:
            del inside[name]
    return tree, names


def outcome(tree: dict[str, Any]) -> tuple[str, str]:
    """What becomes of a config, and the sentence where it is refused. Lets every exception through that is no error of
    ours."""
    try:
        config = schema.read(tree)
        checks.check(config, "train", catalogue.options("recipe", None))
        door = Door(config.words.trust, ())
        build.judge(config, door)
        limits = config.settings.limits
        if limits.steps is None or limits.steps > 20:
            return "valid, and too long to run here", ""
        if max(config.settings.data.batch_size, config.settings.gradient.accumulation_steps) > 10**6:
            return "valid, and too large to run here", ""
        if config.settings.data.workers or config.settings.device not in ("auto", "cpu"):
            return "valid, and for another machine", ""
        trainer = build.build(config, door)
        trainer.fit()
    except ConfigError as error:
        return "refused", str(error)
    except TrainerError as error:
        return f"ended with exit code {error.exit_code}", str(error)
    return "a valid run", ""


def judged(changes: Any, tally: Tally) -> None:
    tree, names = changed(changes)
    what, said = outcome(tree)
    wrong = None
    if what == "refused" and not any(name and name in said for name in names):
        wrong = f"{changes}: '{said}' names none of it"
    elif said.count("\n") or "Traceback" in said:
        wrong = f"{changes}: '{said}' is more than a sentence"
    tally.note(what, wrong)


def trials(count: int) -> Tally:
    tally = Tally()

    @settings(
        max_examples=count, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    @given(CHANGES)
    def one(changes) -> None:
        judged(changes, tally)

    one()
    return tally


def test_a_config_made_at_random_runs_or_is_refused_with_its_key(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    tally = trials(times(300))
    assert not tally.broken, str(tally)
    assert tally.outcomes["a valid run"] >= 10 and tally.outcomes["refused"] >= 50, str(tally)
    assert not os.path.exists("canary")


def test_an_exception_that_is_no_error_of_ours_is_found(monkeypatch) -> None:
    """Negative control: with one check less, the same trials end in a traceback or in a sentence without the key."""
    monkeypatch.setattr(checks, "check", lambda *_: None)
    monkeypatch.setattr(schema, "_is_node", lambda *_: None)
    try:
        tally = trials(400)
    except Exception as error:
        assert not isinstance(error, TrainerError)
    else:
        assert tally.broken
