"""Which parameters a transform is about: patterns of their names."""

import fnmatch
from collections.abc import Iterable, Sequence

from trainer.errors import ConfigError, did_you_mean


class Patterns:
    """Names with wildcards (`encoder.*`); without any, all parameters.

    `find` must have seen the names before `in` is asked.
    """

    def __init__(self, who: str, patterns: str | Sequence[str] | None) -> None:
        self._who = who
        self._patterns = None if patterns is None else [patterns] if isinstance(patterns, str) else list(patterns)
        if self._patterns is not None and not all(isinstance(one, str) for one in self._patterns):
            raise ConfigError(f"{who}: match={patterns!r} is not possible: give names of parameters with wildcards.")
        if self._patterns == []:
            raise ConfigError(f"{who}: match is empty: give names of parameters with wildcards (encoder.*).")
        self._found: frozenset[str] | None = None

    def find(self, names: Iterable[str]) -> None:
        """Raises ConfigError for a pattern that matches nothing."""
        if self._patterns is None:
            return
        names = list(names)
        found: set[str] = set()
        for pattern in self._patterns:
            matched = {name for name in names if fnmatch.fnmatchcase(name, pattern)}
            if not matched:
                raise ConfigError(
                    f"{self._who}: no parameter under training matches '{pattern}': {did_you_mean(pattern, names)}"
                )
            found |= matched
        self._found = frozenset(found)

    def __contains__(self, name: str) -> bool:
        return self._found is None or name in self._found
