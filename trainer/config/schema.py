"""Every key of a config: the settings, the words about the run, and the nodes that are built. No torch here."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass as checked

from trainer.errors import ConfigError, did_you_mean
from trainer.settings import Settings, fields_of, setting, validated

NODES = {
    "model": "the model: any object that holds tensors with requires_grad",
    "objective": "what is differentiated: objective(model, micro_batch), or a loss of torch",
    "metrics": "metrics(model, micro_batch) -> {name: Sum}, for evaluation",
    "optimizer": "the optimizer, given the parameters, or the groups that optimizer.groups names",
    "skip_if": "a rule of one's own, skip_if(report) -> True or a sentence where the step must not be taken",
    "schedule": "the factor of each learning rate, by a clock (null: constant)",
}
"""The keys that hold a `_target_`, with a line each. Two more lie deeper: data.source and loggers.others.NAME."""

SOURCE = "where the data comes from: a Split(train, evaluation)"
TRANSFORMS = "what changes the gradient before it is clipped: nodes in their order, as a list or by names of yours"
OTHERS = "loggers of one's own, by name"
GROUPS = "parameter groups: a list of {match: [names, norms, biases], option: value}"


@checked(frozen=True, config=ConfigDict(extra="forbid", strict=True))
class Words:
    """What a config says about the run besides its settings."""

    recipe: str | None = setting(None, "which recipe to take")
    description: str | None = setting(None, "a line about the recipe")
    run: str | None = setting(None, "name of the run: its folder, where the same command goes on (null: the time)")
    resume: str | None = setting(None, "never, auto, last or a checkpoint's path (null: auto where the run has a name)")
    accept: list[str] = setting([], "changed keys that a run which goes on may go on with; what is safe needs none")
    init: str | None = setting(None, "a checkpoint or model.safetensors to take the parameters from")
    trust: list[str] = setting([], "packages whose code a _target_ may call; only yours to say, never a recipe's")


@dataclass(frozen=True)
class RunConfig:
    """A whole config, checked.

    `nodes` has the plain values of each key of NODES and of `source`; `others` those of each logger of the user's own,
    `transforms` those of each gradient transform, by key and in order.
    `plain` is the config as it was composed, for the records.
    """

    words: Words
    settings: Settings
    nodes: Mapping[str, Any]
    groups: tuple[Mapping[str, Any], ...]
    others: Mapping[str, Any]
    transforms: Mapping[str, Any]
    plain: Mapping[str, Any]


def defaults() -> dict[str, Any]:
    """All keys with their defaults, as plain values: what Hydra composes onto."""
    tree = {**dataclasses.asdict(Words()), **dataclasses.asdict(Settings()), **dict.fromkeys(NODES)}
    tree["data"]["source"] = None
    tree["loggers"]["others"] = {}
    tree["gradient_transforms"] = None
    return tree


def read(composed: Mapping[str, Any]) -> RunConfig:
    """Check a composed config (plain values, resolved). Raises ConfigError with one sentence that names the key."""
    _names_are_words(composed, "")
    words = {name: composed[name] for name in fields_of(Words) if name in composed}
    for name in ("run", "init", "resume"):
        if isinstance(words.get(name), int) and not isinstance(words[name], bool):
            words[name] = str(words[name])  # run=7 is a name as good as any
    known = {*words, *NODES, "gradient_transforms", *fields_of(Settings)}
    for name in composed:
        if name not in known:
            raise ConfigError(f"there is no setting '{name}': {did_you_mean(name, known)}")
    toggles = {name: composed[name] for name in fields_of(Settings) if name in composed}
    toggles["data"], data = _take(toggles, "data", "source")
    toggles["loggers"], others = _take(toggles, "loggers", "others")
    optimizer, groups = composed.get("optimizer"), None
    if isinstance(optimizer, Mapping):
        optimizer, groups = _take(composed, "optimizer", "groups")
    nodes = {name: composed.get(name) for name in NODES} | {"optimizer": optimizer, "source": data}
    for name, node in nodes.items():
        _is_node("data.source" if name == "source" else name, node)
    if not isinstance(others, Mapping | None):
        raise ConfigError(f"loggers.others={others!r} is not possible: give each logger of your own a name.")
    for name, node in (others or {}).items():
        _is_node(f"loggers.others.{name}", node)
    return RunConfig(
        validated(Words, words),
        validated(Settings, toggles),
        nodes,
        _groups(groups),
        {name: node for name, node in (others or {}).items() if node is not None},
        _transforms(composed.get("gradient_transforms")),
        composed,
    )


def _transforms(nodes: Any) -> dict[str, Any]:
    """The nodes by key, whether they were listed or named; null leaves one out."""
    if isinstance(nodes, list):
        nodes = dict(enumerate(nodes))
    if not isinstance(nodes, Mapping | None) or "_target_" in (nodes or {}):
        raise ConfigError(
            f"gradient_transforms={nodes!r} is not possible: it is a list of nodes with a _target_, or nodes by names."
        )
    found = {f"gradient_transforms.{name}": node for name, node in (nodes or {}).items() if node is not None}
    for key, node in found.items():
        _is_node(key, node)
    return found


def _take(tree: Mapping[str, Any], section: str, key: str) -> tuple[Any, Any]:
    """A section without one of its keys, and the value that it had there."""
    values = tree.get(section)
    if not isinstance(values, Mapping):
        return values, None
    return {name: value for name, value in values.items() if name != key}, values.get(key)


def _is_node(key: str, node: Any) -> None:
    if node is None:
        return
    if not isinstance(node, Mapping):
        raise ConfigError(f"{key}={node!r} is not possible: it is built from a _target_ and its arguments.")
    if not isinstance(node.get("_target_"), str):
        raise ConfigError(f"{key} has no _target_: name the class or function that makes it.")


def _groups(groups: Any) -> tuple[Mapping[str, Any], ...]:
    if groups is None:
        return ()
    if not isinstance(groups, list) or not all(isinstance(group, Mapping) and "match" in group for group in groups):
        raise ConfigError(
            f"optimizer.groups={groups!r} is not possible: it is a list of {{match: [names], option: value}}."
        )
    return tuple(groups)


def _names_are_words(tree: Any, where: str) -> None:
    if isinstance(tree, Mapping):
        for name, value in tree.items():
            path = f"{where}.{name}" if where else str(name)
            if not isinstance(name, str):
                raise ConfigError(f"the key {path} is {type(name).__name__}, not a word: put it in quotes.")
            _names_are_words(value, path)
    elif isinstance(tree, list):
        for index, value in enumerate(tree):
            _names_are_words(value, f"{where}.{index}")
