"""Where a parameter loses its gradient: the operation behind which its value goes on to the loss without a graph.

The graph says which parameters the loss is connected to; the trace of a forward says where the values of the others
went.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from trainer.diagnose.trace import Call, Trace, storage_of

# These cut because that is what they are for; any other operation cuts because something else was off.
_DETACHING = {"detach", "detach_", "data"}
_SHOWN = 3
"""So many places at which values left torch are said; of others only how many they are."""


@dataclass(frozen=True, slots=True)
class Cut:
    """Why a parameter gets no gradient.

    - `unused`: no call had it.
    - `unread`: what was made of it does not reach the loss; the call is the last that it went into.
    - `left`: nor does it as a tensor, and its value left torch as a number, by one of the calls.
    - `cut`: its value does reach the loss, without a graph behind this call.
    - `unknown`: what became of it was not seen.
    """

    kind: Literal["unused", "unread", "left", "cut", "unknown"]
    calls: tuple[Call, ...] = ()
    why: str = ""

    def __str__(self) -> str:
        places = list(dict.fromkeys(map(str, self.calls)))
        calls = " or by ".join(places[:_SHOWN]) + (
            f" or by {len(places) - _SHOWN} more" if len(places) > _SHOWN else ""
        )
        if self.kind == "unused":
            return "no operation of the forward used it"
        if self.kind == "unread":
            return f"what was made of it does not reach the loss: the last that it went into is {calls}"
        if self.kind == "left":
            return f"its value left torch as a number by {calls}"
        if self.kind == "unknown":
            return "where the graph was cut could not be seen"
        return f"the graph was cut by {calls}{self.why}"


def connected(roots: Iterable[Tensor]) -> set[int]:
    """The ids of the leaves that a backward from these roots would reach."""
    return set(leaves(roots))


def leaves(begin: Any, but: Collection[Any] = ()) -> dict[int, Tensor]:
    """The leaves that a backward from these roots, or from a node, would reach, by id.

    Args:
        but: nodes that are not walked through.
    """
    found: dict[int, Tensor] = {}
    seen: set[Any] = set(but)
    ahead: list[Any] = []
    for root in begin if isinstance(begin, Iterable) else ():
        if root.grad_fn is not None:
            ahead.append(root.grad_fn)
        elif root.requires_grad:
            found[id(root)] = root
    if not isinstance(begin, Iterable):
        ahead, seen = [begin], seen - {begin}
    while ahead:
        node = ahead.pop()
        if node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            found[id(leaf)] = leaf
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
        self._is_partial = trace.elsewhere
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
            changed = {key for tensor, _ in call.changed for key in _keys(tensor)}
            for tensor in call.outputs:
                views = [one for one in call.inputs if not changed and _share(one, tensor)]
                self._add(tensor, self._of(views[0]) if len(views) == 1 else bits)  # a view is made of one alone
            for tensor, _ in call.changed:
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
                dead = [tensor for tensor in made if not self._is_live(tensor) and self._of(tensor) & bit]
                if dead:
                    return Cut("cut", (call,), _reason(call, dead))
        hidden = self._written_unseen(reading, bit)
        if hidden is not None:
            return Cut("cut", (hidden,), ": it writes through .data or a detached view, without a graph")
        derivatives = [call for call in reading if call.name == "grad"]
        if derivatives and (derivatives[-1].order in self._useful or derivatives[-1] is reading[-1]):
            return Cut("cut", (derivatives[-1],), ": the derivative that it takes does not depend on it")
        if not reading:
            return Cut("unknown" if self._is_partial else "unused")
        left = tuple(call for call in reading if call.exits)
        if left:
            return Cut("left", left)
        last = reading[-1]
        is_seen = last.order not in self._useful and not any(map(_is_transformed, (*last.inputs, *last.outputs)))
        return Cut("unread", (last,)) if is_seen and not self._is_partial else Cut("unknown")

    def _written_unseen(self, reading: Sequence[Call], bit: int) -> Call | None:
        """The call that wrote a value with a graph into a memory that is read, later, without one."""
        for call in reading:
            for tensor in call.inputs if call.order in self._useful else ():
                if self._is_live(tensor) or not self._of(tensor) & bit:
                    continue
                storage = storage_of(tensor)
                for writer in reading:
                    into = [one for one, _ in writer.changed if storage is not None and storage_of(one) == storage]
                    source = [one for one in writer.inputs if self._is_live(one) and storage_of(one) != storage]
                    if into and source and writer.order < call.order:
                        return writer
        return None

    def last_cut(self) -> Cut | None:
        """The last call behind which a value that had a graph goes on to the roots without one, whatever it is of."""
        for call in reversed(self._calls):
            had = call.order in self._useful and any(self._is_live(tensor) for tensor in call.inputs)
            if had and call.outputs and not any(self._is_live(tensor) for tensor in call.outputs):
                return Cut("cut", (call,), _reason(call, call.outputs))
        return None

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


def _share(one: Tensor, other: Tensor) -> bool:
    storage = storage_of(one)
    return storage is not None and storage == storage_of(other)


def _is_transformed(tensor: Tensor) -> bool:
    """Whether it is what vmap or torch.func work on, whose values go on in tensors that no call has made."""
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(tensor))


def _reason(call: Call, dead: Sequence[Tensor]) -> str:
    if call.name in _DETACHING:
        return ""
    if call.name == "grad":
        return ": without create_graph=True its result has no graph"
    if not call.gradients_on:
        return ": gradients are switched off there (no_grad)"
    kinds = {tensor.dtype for tensor in dead}
    if kinds and not any(kind.is_floating_point or kind.is_complex for kind in kinds):
        return f": its result is {'bool' if kinds == {torch.bool} else 'whole numbers'}, which have no gradient"
    return ": its result has no gradient"
