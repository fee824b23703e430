"""Names in a sentence."""

from collections.abc import Iterable

_NAMED = 4
"""So many are named; the others are counted."""


def listed(names: Iterable[str]) -> str:
    """The first few names, and how many more."""
    names = list(names)
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(f"'{name}'" for name in names[:_NAMED]) + more
