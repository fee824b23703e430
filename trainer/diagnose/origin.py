"""The way back from a number that is not finite to where it began, in a forward that was traced and in a backward.

An infinity that a call was given as a number (`masked_fill(mask, -inf)`) is meant: what made a NaN out of it is at
fault, and not the mask.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from trainer.diagnose.numbers import FINITE, INF, level
from trainer.diagnose.trace import Call, storage_of


@dataclass(frozen=True)
class Seen:
    """A call of which something came out that is not finite.

    - `given`, `made`: the tensors, with how finite they were when they went in and when they came out.
    - `result`: what came out, in words.
    - `planted`: whether what is not finite was among the numbers that it was given.
    """

    call: Call
    given: list[tuple[Tensor, int]]
    made: list[tuple[Tensor, int]]
    result: str
    planted: bool

    @property
    def worst(self) -> int:
        return max(how for _, how in self.made)


@dataclass(frozen=True)
class Origin:
    """Where it began: in a call (`by`), or in a tensor (`leaf`) that no call has made and that `by` was given."""

    by: Seen | None
    leaf: Tensor | None = None


def in_forward(seen: Sequence[Seen], wrong: Tensor, counted: Collection[int]) -> Origin:
    """The origin of what is wrong with a tensor at the end of a forward.

    Args:
        seen: the calls of which something came out that is not finite, in order.
        counted: ids of the tensors in which an infinity is a fault (data, parameters). In others it may be a mask's.
    """
    return _Walk(seen, counted).back(wrong, len(seen), None)


class _Walk:
    def __init__(self, seen: Sequence[Seen], counted: Collection[int]) -> None:
        self._seen = seen
        self._counted = counted
        self._known: dict[int, Origin] = {}

    def back(self, wrong: Tensor, end: int, taken_by: Seen | None) -> Origin:
        """The origin of a tensor that was not finite when `taken_by`, the call number `end`, took it."""
        storage = storage_of(wrong)
        for number in range(end - 1, -1, -1):
            made = [one for one, how in self._seen[number].made if how != FINITE]
            if any(one is wrong or (storage is not None and storage_of(one) == storage) for one in made):
                if number not in self._known:
                    self._known[number] = self._of(number)
                return self._known[number]
        return Origin(taken_by, wrong)

    def _of(self, number: int) -> Origin:
        seen = self._seen[number]
        wrong = sorted((pair for pair in seen.given if pair[1] != FINITE), key=lambda pair: -pair[1])
        if not wrong:
            return Origin(seen)
        origins = [self.back(tensor, number, seen) for tensor, _ in wrong]
        worse = seen.worst > wrong[0][1]
        blamed = (origin for origin in origins if not (worse and self._is_meant(origin)))
        return next(blamed, Origin(seen))

    def _is_meant(self, origin: Origin) -> bool:
        if origin.leaf is not None:
            return level(origin.leaf) == INF and id(origin.leaf) not in self._counted
        return origin.by is not None and origin.by.planted and origin.by.worst == INF


@dataclass
class Flowed:
    """What a node of a backward was given and what it gave, edge by edge: how finite each was. In order of time."""

    order: int
    came: list[int]
    gave: list[int]
    tensors: list[Tensor] = field(default_factory=list)
    """What came, and (last) the first of what it gave that is not finite: kept only where that is one."""


def watched(every: Sequence[Any], run: Callable[[], Any]) -> tuple[dict[Any, Flowed], Any]:
    """What flowed through each node while `run` walked the graph, and what `run` returned."""
    flowed: dict[Any, Flowed] = {}

    def watch(node: Any) -> Callable[[Any, Any], None]:
        def look(gave: Sequence[Tensor | None], came: Sequence[Tensor | None]) -> None:
            into, out = _levels(came), _levels(gave)
            one = flowed[node] = Flowed(len(flowed), into, out)
            if max(into, default=FINITE) == FINITE and max(out, default=FINITE) != FINITE:
                wrong = next(tensor for tensor, how in zip(gave, out, strict=True) if how and tensor is not None)
                one.tensors = [*(tensor for tensor in came if tensor is not None), wrong]

        return look

    handles = [node.register_hook(watch(node)) for node in every]
    try:
        result = run()
    finally:
        for handle in handles:
            handle.remove()
    return flowed, result


def _levels(tensors: Sequence[Tensor | None]) -> list[int]:
    return [FINITE if tensor is None else level(tensor) for tensor in tensors]


def in_backward(every: Sequence[Any], flowed: Mapping[Any, Flowed], leaves: Sequence[Any]) -> Any | None:
    """The first node, in time, that made what reached one of the leaves' nodes; None where only sums of finite parts
    did that."""
    parents: dict[Any, list[tuple[Any, int, int]]] = {}
    for node in every:
        for edge, (following, place) in enumerate(node.next_functions):
            if following is not None:
                parents.setdefault(following, []).append((node, edge, place))
    found, ahead, known = [], list(leaves), set(leaves)
    while ahead:
        node = ahead.pop()
        for parent, edge, _ in parents.get(node, ()):
            flow = flowed.get(parent)
            if parent in known or flow is None or edge >= len(flow.gave) or flow.gave[edge] == FINITE:
                continue
            known.add(parent)
            if max(flow.came, default=FINITE) == FINITE:
                found.append(parent)
            else:
                ahead.append(parent)
    return min(found, key=lambda node: flowed[node].order, default=None)


def gradients(roots: Sequence[Tensor], seeds: Sequence[Tensor], leaves: Sequence[Tensor]) -> list[Tensor | None]:
    """What backward gives each leaf; None for one that it does not reach."""
    taking = [(root, seed) for root, seed in zip(roots, seeds, strict=True) if root.requires_grad]
    if not taking or not leaves:
        return [None] * len(leaves)
    outputs, starts = zip(*taking, strict=True)
    return list(torch.autograd.grad(outputs, list(leaves), starts, allow_unused=True))
