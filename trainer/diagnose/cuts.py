"""Where a parameter loses its gradient: the operation behind which its value goes on to the loss without a graph.

The graph says which parameters the loss is connected to; the trace of a forward says where the values of the others
went.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from trainer.diagnose.trace import Call, Trace, storage_of

# These cut because that is what they are for; any other operation cuts because something else was off.
_DETACHING = {"detach", "detach_", "data"}


@dataclass(frozen=True, slots=True)
class Cut:
    """Why a parameter gets no gradient.

    - `unused`: no call had it.
    - `unread`: what was made of it does not reach the loss; the call is the last that it went into.
    - `left`: nor does it as a tensor, and its value left torch as a number, by one of the calls.
    - `cut`: its value does reach the loss, without a graph behind this call.
    """

    kind: Literal["unused", "unread", "left", "cut"]
    calls: tuple[Call, ...] = ()

    def __str__(self) -> str:
        calls = " or by ".join(map(str, self.calls))
        if self.kind == "unused":
            return "no operation of the forward used it"
        if self.kind == "unread":
            return f"what was made of it does not reach the loss: the last that it went into is {calls}"
        if self.kind == "left":
            return f"its value left torch as a number by {calls}"
        return f"the graph was cut by {calls}{_reason(self.calls[0])}"


def connected(roots: Iterable[Tensor]) -> set[int]:
    """The ids of the leaves that a backward from these roots would reach."""
    found: set[int] = set()
    seen: set[Any] = set()
    ahead: list[Any] = []
    for root in roots:
        if root.grad_fn is not None:
            ahead.append(root.grad_fn)
        elif root.requires_grad:
            found.add(id(root))
    while ahead:
        node = ahead.pop()
        if node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            found.add(id(leaf))
        ahead.extend(following for following, _ in node.next_functions if following is not None)
    return found


class Flow:
    """How the values of a traced forward flowed from the parameters to the roots, with and without a graph.

    Args:
        trace: of the forward that made the roots.
        roots: what is to be differentiated.
        parameters: by name.
    """

    def __init__(self, trace: Trace, roots: Sequence[Tensor], parameters: Mapping[str, Tensor]) -> None:
        self._calls = trace.calls
        self._bits = {name: 1 << index for index, name in enumerate(parameters)}
        self._carried: dict[int, int] = {}
        """Of a tensor or a storage: the bits of the parameters whose values are in it."""
        self._reads: list[int] = []
        """Of each call: the same for all that went in."""
        for name, parameter in parameters.items():
            self._add(parameter, self._bits[name])
        for call in self._calls:
            bits = 0
            for tensor in call.inputs:
                bits |= self._of(tensor)
            self._reads.append(bits)
            for tensor in (*call.outputs, *(changed for changed, _ in call.changed)):
                self._add(tensor, bits)
        self._inner = self._inside_functions()
        self._useful = self._leading_to(roots)

    def cut(self, name: str) -> Cut:
        """Why the parameter of this name, which the roots are not connected to, is not."""
        bit = self._bits[name]
        reading = [call for call, reads in zip(self._calls, self._reads, strict=True) if reads & bit]
        for call in reading:
            if call.order in self._useful and any(self._is_live(one) and self._of(one) & bit for one in call.inputs):
                made = [*call.outputs, *(changed for changed, _ in call.changed)]
                if any(not self._is_live(tensor) for tensor in made):
                    return Cut("cut", (call,))
        if not reading:
            return Cut("unused")
        left = tuple(call for call in reading if call.exits)
        return Cut("left", left) if left else Cut("unread", (reading[-1],))

    def origins(self) -> list[Call]:
        """The calls that made a tensor out of none and whose value reaches the roots."""
        return [call for call in self._calls if call.order in self._useful and not call.inputs and call.outputs]

    def _is_live(self, tensor: Tensor) -> bool:
        """Whether a graph hangs on it, now that the forward is over."""
        return tensor.requires_grad or id(tensor) in self._inner

    def _inside_functions(self) -> set[int]:
        """What a Function of the user's made on the way to its result: the graph knows only the result, which gets its
        node when the Function's forward, where gradients are off, is over."""
        inner: set[int] = set()
        for call in reversed(self._calls):
            if call.gradients_on:
                continue
            fresh = [tensor for tensor in call.outputs if all(tensor is not one for one in call.inputs)]
            if any(tensor.requires_grad or id(tensor) in inner for tensor in fresh):
                inner.update(id(tensor) for tensor in call.inputs if not tensor.requires_grad)
        return inner

    def _leading_to(self, roots: Sequence[Tensor]) -> set[int]:
        """The calls whose results reach the roots by value."""
        wanted = {key for root in roots for key in _keys(root)}
        useful: set[int] = set()
        for call in reversed(self._calls):
            made = [*call.outputs, *(changed for changed, _ in call.changed)]
            if any(key in wanted for tensor in made for key in _keys(tensor)):
                useful.add(call.order)
                wanted.update(key for tensor in call.inputs for key in _keys(tensor))
        return useful

    def _of(self, tensor: Tensor) -> int:
        bits = 0
        for key in _keys(tensor):
            bits |= self._carried.get(key, 0)
        return bits

    def _add(self, tensor: Tensor, bits: int) -> None:
        if bits:
            for key in _keys(tensor):
                self._carried[key] = self._carried.get(key, 0) | bits


def _keys(tensor: Tensor) -> tuple[int, ...]:
    """What a tensor's value is known by: itself, and its storage, which views and detached tensors share."""
    storage = storage_of(tensor)
    return (id(tensor),) if storage is None else (id(tensor), -storage)


def _reason(call: Call) -> str:
    if call.name in _DETACHING:
        return ""
    if not call.gradients_on:
        return ": gradients are switched off there (no_grad)"
    kinds = {tensor.dtype for tensor in call.outputs}
    if kinds and not any(kind.is_floating_point or kind.is_complex for kind in kinds):
        return f": its result is {'bool' if kinds == {torch.bool} else 'whole numbers'}, which have no gradient"
    return ": its result has no gradient"
