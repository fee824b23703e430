"""Walking an autograd graph: its nodes, what they saved for backward, and which of that cannot be read any more."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

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


def withholding(roots: Iterable[Tensor], leaf: Tensor) -> str | None:
    """The custom Function whose backward gave None towards a leaf that it is connected to, by name; None where each
    gives something. It runs a backward of its own, which leaves no `.grad`."""
    roots = [root for root in roots if root.grad_fn is not None]
    ours = [node for node in nodes(roots) if isinstance(node, BackwardCFunction)]
    guilty: list[str] = []

    def watched(node: Any) -> Callable[[Any, Any], None]:
        behind = [index for index, (following, _) in enumerate(node.next_functions) if _leads_to(following, leaf)]

        def look(given: Sequence[Tensor | None], _: Any) -> None:
            if any(given[index] is None for index in behind):
                guilty.append(node.name().removesuffix("Backward"))

        return look

    handles = [node.register_hook(watched(node)) for node in ours]
    try:
        seeds = [torch.ones_like(root) for root in roots]
        torch.autograd.grad(roots, [leaf], seeds, retain_graph=True, allow_unused=True)
    except RuntimeError:
        return None  # the error of that backward is not what is asked about
    finally:
        for handle in handles:
            handle.remove()
    return guilty[0] if guilty else None


def _leads_to(node: Any, leaf: Tensor) -> bool:
    ahead, seen = [node], set()
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        if getattr(node, "variable", None) is leaf:
            return True
        seen.add(node)
        ahead.extend(following for following, _ in node.next_functions)
    return False
