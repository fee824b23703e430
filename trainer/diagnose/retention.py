"""Graphs that stay alive after their step: found while memory still lasts, with who holds them.

A sentinel is laid into the metadata of a root's node, and a weak reference to it tells whether the node is still there.
(A weak reference to the loss would miss `total += loss`, which keeps the node and not the tensor; nodes take none.)
"""

import gc
import sys
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from torch import Tensor

from trainer.diagnose.graphs import nodes
from trainer.diagnose.holders import named_holder
from trainer.diagnose.instrument import Instrument

_KEY = "trainer.retention"
_DENSE, _SPARSE = 16, 64
"""So many micro-batches at first are marked, then one of so many: it is a large model that has not much time."""
_ALIVE = 4
"""So many marked graphs alive at once are no longer the one or two that somebody looks at."""
_DEEP = 20_000
_COLLECTIONS = 3
"""So often it is found out that only rings of references were waiting; a model that makes them is left alone then."""


class _Sentinel:
    __slots__ = ("__weakref__",)


class Retention(Instrument):
    """Called with the roots of each backward when it is over.

    Args:
        step: whose backwards these are; the holder is looked for in its model and objective too.
        found: hears the sentence, once.
        more: what else the holder is looked for in, by the name that it goes by.
    """

    def __init__(self, step: Any, found: Callable[[str], None], **more: Any) -> None:
        self._found = found
        self._searched = {"model": step.model, "objective": step.objective, **more}
        self._count = 0
        self._marks: deque[weakref.ref[_Sentinel]] = deque(maxlen=_ALIVE)
        self._collections = 0
        self._is_over = False

    def __call__(self, _: Any, roots: list[Tensor]) -> None:
        self._count += 1
        if self._is_over or (self._count > _DENSE and self._count % _SPARSE):
            return
        node = roots[0].grad_fn if roots else None
        if node is None:
            return
        if len(self._marks) == _ALIVE and self._all_alive():
            gc.collect()  # a graph in a ring of references is only waiting for this
            self._collections += 1
            self._is_over = self._all_alive() or self._collections == _COLLECTIONS
            if self._all_alive():
                self._found(self._sentence())
                return
        sentinel = _Sentinel()
        metadata: Any = node.metadata
        metadata[_KEY] = sentinel
        self._marks.append(weakref.ref(sentinel))

    def _all_alive(self) -> bool:
        return all(mark() is not None for mark in self._marks)

    def _sentence(self) -> str:
        holder = named_holder(_holds_marked, {**self._searched, **_variables()})
        who = f"'{holder[0]}' holds them" if holder is not None else "something holds them that could not be found"
        return (
            f"the graphs of earlier micro-batches stay alive, {_ALIVE} of the last {_ALIVE} that were looked at, and "
            f"memory grows with each: {who}; keep loss.item() or loss.detach() instead of the loss."
        )


def _holds_marked(tensor: Tensor) -> bool:
    """Whether a marked node lies in the graph that hangs on a tensor."""
    if tensor.grad_fn is None:
        return False
    for index, node in enumerate(nodes([tensor])):
        if _KEY in node.metadata:
            return True
        if index > _DEEP:
            return False
    return False


def _variables() -> dict[str, Any]:
    """The local variables of the functions that are running, as far as they hold tensors or lists."""
    return dict(_of_frames())


def _of_frames() -> Iterator[tuple[str, Any]]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        package = frame.f_globals.get("__name__", "").partition(".")
        if package[0] not in ("trainer", "torch") or package[2].startswith("recipes"):
            for name, value in frame.f_locals.items():
                if isinstance(value, Tensor | list | dict | tuple):
                    yield name, value
        frame = frame.f_back
