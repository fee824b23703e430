"""Whether arguments fit what they are given to, said before it is called."""

import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from trainer.errors import ConfigError, did_you_mean

_PLAIN = (int, float, bool, str, type(None))


def fits(
    target: Callable[..., Any],
    name: str,
    key: str,
    positional: Sequence[Any],
    keywords: Mapping[str, Any],
    partial: bool,
) -> None:
    """Hold arguments against a signature. Raises ConfigError that names the key and the nearest parameter."""
    try:
        signature = inspect.signature(target)
    except (TypeError, ValueError):  # some things written in C have none
        return
    parameters = signature.parameters
    by_name = {
        word: parameter
        for word, parameter in parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    free = list(by_name)[len(positional) :] if positional else list(by_name)
    for word in keywords:
        if word not in by_name and not takes_any:
            raise ConfigError(f"there is no '{key}.{word}': of what {name} takes, {_nearest(word, free)}")
        if word in by_name and word not in free and by_name[word].kind is not inspect.Parameter.KEYWORD_ONLY:
            raise ConfigError(f"{key}.{word} cannot be set: it is given to {name} already.")
    try:
        (signature.bind_partial if partial else signature.bind)(*positional, **keywords)
    except TypeError as error:
        raise ConfigError(f"{key}: {name} cannot be called so: {error}") from None
    hints = _hints(target)
    for word, value in keywords.items():
        if word in hints and not _is(value, hints[word]):
            raise ConfigError(f"{key}.{word}={value!r} is not possible: {name} wants {_say(hints[word])}.")


def _nearest(word: str, names: list[str]) -> str:
    return did_you_mean(word, names) if names else "nothing can be set."


def _hints(target: Callable[..., Any]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(target.__init__ if isinstance(target, type) else target)  # type: ignore[misc]
    except Exception:  # a hint that cannot be evaluated is nothing to hold a value against
        return {}


def _is(value: Any, hint: Any) -> bool:
    """Whether a plain value is of a plain type. What is not plain (a made object, a container) is not judged."""
    options = (
        typing.get_args(hint)
        if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
        else (hint,)
    )
    if not isinstance(value, _PLAIN) or not all(option in _PLAIN for option in options):
        return True
    if isinstance(value, int) and not isinstance(value, bool) and float in options:
        return True
    return type(value) in options


def _say(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint)
