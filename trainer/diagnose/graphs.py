"""Walking an autograd graph: its nodes, what they saved for backward, and which of that cannot be read any more."""

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

CHANGED = "has been modified by an inplace operation"
FREED = "after they have already been freed"


def nodes(roots: Iterable[Tensor]) -> Iterator[Any]:
    """Every node behind these tensors, each once, nearest to the roots first."""
    ahead = [root.grad_fn for root in roots if root.grad_fn is not None]
    seen = set(ahead)
    for node in ahead:  # it grows while it is walked
        yield node
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                ahead.append(following)


def unreadable(roots: Iterable[Tensor], why: str) -> list[tuple[Any, list[int]]]:
    """The nodes that saved something which cannot be read because of `why` (CHANGED or FREED), as backward comes to
    them: (node, storages). Of a custom Function, which names nothing that it saved, all its storages are given."""
    found = [(node, _refused(node, why)) for node in nodes(roots)]
    stuck = [(node, storages) for node, storages in found if storages is not None]
    return sorted(stuck, key=lambda one: -one[0]._sequence_nr())


def _refused(node: Any, why: str) -> list[int] | None:
    for name in dir(node):
        if not name.startswith("_saved_") and name != "saved_tensors":
            continue
        try:
            getattr(node, name)
        except RuntimeError as error:
            if why in str(error):
                return _storages(getattr(node, f"_raw{name}" if name[0] == "_" else "_raw_saved_tensors", None))
        except (AttributeError, TypeError, ValueError):
            continue
    return None


def _storages(raw: Any) -> list[int]:
    held = [_data(saved) for saved in (raw if isinstance(raw, tuple | list) else [raw])]
    return [int(data.untyped_storage()._cdata) for data in held if isinstance(data, Tensor)]


def _data(saved: Any) -> Any:
    try:
        return saved.data
    except (AttributeError, RuntimeError):
        return None
