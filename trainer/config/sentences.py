"""One sentence out of what Hydra says in many lines, with the nearest right name."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.errors import did_you_mean


@dataclass(frozen=True)
class Known:
    """The names that there are: the keys of the composed config, and the options of each group."""

    keys: Mapping[str, Any]
    groups: Mapping[str, Sequence[str]]


def explain(error: BaseException, overrides: Sequence[str], known: Callable[[], Known]) -> str:
    """The sentence for an error of Hydra or OmegaConf; `known` is only asked where a name was wrong."""
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, KeyboardInterrupt):
            raise KeyboardInterrupt from error  # OmegaConf wraps whatever comes up while it resolves a value
        inner = inner.__cause__ or inner.__context__
    text = str(error)
    override = getattr(error, "override", None)
    if override is not None:
        return f"'{override}' is not understood: write key=value, +key=value or ~key, and close brackets and quotes."
    options = getattr(error, "options", None)
    missing = getattr(error, "missing_cfg_file", None)
    plugin = re.search(r"hydra/(?:sweeper|launcher)/(optuna|joblib|submitit)", missing or "")
    if plugin:
        return (
            f"{missing} comes with a plugin of Hydra's that is not installed: "
            f"write pip install 'gradtrainer[{plugin[1]}]', then the same command again."
        )
    if options is not None and missing:
        group, _, name = missing.rpartition("/")
        return f"there is no {group} '{name}': {did_you_mean(name, options)}"
    if missing and missing.partition("/")[0] in (groups := known().groups):
        group, _, name = missing.partition("/")
        return f"there is no {group} '{name}': {did_you_mean(name, groups[group])}"
    if missing:
        return f"there is no config '{missing}': look at the name, and at --config-dir."
    if match := re.search(r"Missing mandatory value: (\S+)", text):
        key = getattr(error, "full_key", None) or match[1]
        return f"{key} has no value yet (???): write {key}=VALUE."
    if match := re.search(r"Could not (?:override|delete|delete from config\.) '([^']+)'", text):
        return _no_key(match[1].partition("@")[0].partition("=")[0] or match[1], text, known())
    if match := re.search(r"config group '([^']+)' does not exist", text):
        return _no_key(match[1], text, known())
    if match := re.search(r"Override (.*) looks like .* group '' does not exist", text):
        return f"'{match[1]}' names no group: write GROUP@PACKAGE=NAME."
    if match := re.search(r"An item is already at '([^']+)'", text):
        return already(match[1])
    if match := re.search(r"(?:Ambiguous value for argument|Sweep parameters) '([^']+)'", text):
        return f"'{match[1]}' has several values: add -m to run each of them, or write key=[value,value] for a list."
    if "Config group override" in text:
        for word in overrides:
            group, _, value = word.lstrip("+~").partition("=")
            group, at, _ = group.partition("@")
            if group in known().groups and value not in known().groups[group]:
                return f"'{word}' is not possible: {_options(group, known())}"
            if at and not group:
                return f"'{word}' names no group: write GROUP@PACKAGE=NAME."
    return _plain(error, overrides)


def already(key: str) -> str:
    """The sentence for `+key` where the key is there."""
    return f"the setting '{key}' is there already: write {key}=VALUE without the +."


def _no_key(key: str, text: str, known: Known) -> str:
    key = key.strip("/")
    if key in known.groups and not known.groups[key]:
        return f"there is no {key} to choose from: put yours into {key}/ of a folder, and give it with --config-dir."
    if key in known.groups and "defaults list" not in text:
        return f"'{key}' is a group: {_options(key, known)}"
    tree: Any = known.keys
    path = key.split(".")
    for depth, part in enumerate(path):
        if isinstance(tree, Mapping) and part in tree:
            tree = tree[part]
            continue
        where = ".".join(path[:depth])
        names = [str(name) for name in tree] if isinstance(tree, Mapping) else []
        if not where:
            names = [*(name for name in names if name != "hydra"), *known.groups]
        wrong = ".".join(path[: depth + 1])
        elsewhere = [full for full in _leaves(known.keys) if full.rpartition(".")[2] == path[-1] and full != key]
        if elsewhere and not where.startswith("hydra"):
            return f"there is no setting '{wrong}': did you mean '{elsewhere[0]}'?"
        hint = did_you_mean(part, set(names))
        if where and hint.startswith("did you mean '"):
            hint = hint.replace("did you mean '", f"did you mean '{where}.", 1)
        return f"there is no setting '{wrong}': {hint}"
    return f"'{key}' does not have all of these keys yet: add one with +{key}.NAME=VALUE, or all with ++{key}={{...}}."


def _options(group: str, known: Known) -> str:
    return f"write {group}=NAME with one of: {', '.join(sorted(known.groups.get(group, ())))}."


def _leaves(tree: Mapping[str, Any], where: str = "") -> list[str]:
    found: list[str] = []
    for name, value in tree.items():
        if not where and name == "hydra":
            continue
        path = f"{where}.{name}" if where else str(name)
        found += _leaves(value, path) if isinstance(value, Mapping) and value else [path]
    return found


def _plain(error: BaseException, overrides: Sequence[str]) -> str:
    """What is left: all that was said, on one line, and the words that it was said to."""
    said: list[str] = []
    inner: BaseException | None = error
    while inner is not None:
        line = _one_line(str(inner))
        if line and line not in said:
            said.append(line)
        inner = inner.__cause__
    mark = getattr(error, "problem_mark", None)
    key = re.search(r"full_key: (\S+)", " ".join([str(error), *([str(error.__cause__)] if error.__cause__ else [])]))
    where = f"{mark.name}, line {mark.line + 1}: " if mark is not None else f"{key[1]}: " if key else ""
    words = f" (from {' '.join(overrides)})" if overrides else ""
    return f"the config cannot be composed{words}: {where}{'; '.join(said) or type(error).__name__}."


def _one_line(text: str) -> str:
    """A message of Hydra without its line breaks, drawings and addresses."""
    text = re.sub(r"\n\s*(full_key|object_type|reference_type)[^\n]*", "", text)
    lines = [line for line in text.splitlines() if line.strip() and not re.fullmatch(r"[\s^~]*", line)]
    return " ".join(" ".join(lines).split()).rstrip(".")
