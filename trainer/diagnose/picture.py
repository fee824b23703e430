"""The autograd graph of one forward as boxes, arrows and groups: what is drawn, apart from how.

Boxes are the graph's own nodes, told by the forward that made them: the operation, the module's call that it lies in,
the shape that came out, the bytes that it keeps for backward. Leaves go by their names.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from trainer.diagnose.cuts import Flow, connected
from trainer.diagnose.graphs import nodes
from trainer.diagnose.trace import Call, Trace, storage_of

Kind = Literal["operation", "parameter", "input", "root", "cut"]


@dataclass(slots=True)
class Box:
    """One thing that is drawn.

    - `title`: `pow`, or a leaf's name; `lines`: what stands below it: the node's name, the shape, the bytes.
    - `group`: the module calls that it lies in, outermost first.
    - `note`: the user's line, shown where the pointer rests on it.
    - `saved`: bytes that it keeps alive for backward and that nothing before it keeps already.
    """

    key: str
    kind: Kind
    title: str
    lines: list[str] = field(default_factory=list)
    group: tuple[str, ...] = ()
    note: str = ""
    saved: int = 0
    in_place: bool = False


@dataclass(slots=True)
class Picture:
    """Boxes in the order of the forward, and arrows between their keys in its direction: (from, to, is cut)."""

    boxes: list[Box]
    arrows: list[tuple[str, str, bool]]

    @property
    def saved(self) -> int:
        """Bytes kept for backward in all, each storage once, parameters left out."""
        return sum(box.saved for box in self.boxes)


def picture(
    trace: Trace,
    roots: Mapping[str, Tensor],
    leaves: Mapping[str, Tensor],
    inputs: Iterable[Tensor],
    every_node: bool = False,
) -> Picture:
    """What is to be drawn of a traced forward.

    Args:
        trace: of that forward, with its modules.
        roots: what is differentiated, by name.
        leaves: parameters and what else requires a gradient, by name.
        inputs: the tensors of the micro-batch.
        every_node: a box for each node; without it one for each call, whose nodes (linear: a transpose, an addmm) it
            names.
    """
    return _Drawing(trace, roots, leaves, list(inputs), every_node).picture()


class _Drawing:
    def __init__(
        self,
        trace: Trace,
        roots: Mapping[str, Tensor],
        leaves: Mapping[str, Tensor],
        inputs: Sequence[Tensor],
        every_node: bool,
    ) -> None:
        self._trace = trace
        self._roots = roots
        self._leaves = leaves
        self._names = {id(leaf): name for name, leaf in leaves.items()}
        self._inputs = {id(tensor): f"micro-batch {index}" for index, tensor in enumerate(inputs)}
        self._nodes = list(nodes(roots.values()))
        self._tensor_keys: dict[int, str] = {}
        self._boxes: dict[str, Box] = {}
        self._arrows: dict[tuple[str, str], bool] = {}
        self._calls = trace.makers(self._nodes)
        self._keys = {node: f"n{index}" for index, node in enumerate(self._nodes)}
        if not every_node:
            self._keys |= {node: f"o{call.order}" for node, call in self._calls.items() if self._made_one(call)}
        self._kept = {storage_of(leaf) for leaf in leaves.values()}

    def picture(self) -> Picture:
        for node in reversed(self._nodes):  # what came first in the forward comes first
            if getattr(node, "variable", None) is None:
                self._operation(node)
        for node in self._nodes:
            self._arrows_into(node)
        for name, root in self._roots.items():
            self._root(name, root)
        self._cuts()
        return Picture(self._in_order(), [(start, end, cut) for (start, end), cut in self._arrows.items()])

    def _made_one(self, call: Call) -> bool:
        """Whether one box can stand for all nodes of a call: it has one result, or several of one node (chunk)."""
        return len({tensor.grad_fn for tensor in call.outputs if tensor.grad_fn is not None}) == 1

    def _operation(self, node: Any) -> None:
        key = self._keys[node]
        call, made, saved = self._calls.get(node), self._result(node), self._saved(node)
        box = self._boxes.get(key)
        if box is None:
            box = self._boxes[key] = Box(key, "operation", _short(node))
            if call is not None:
                box.group = _group(call)
                box.note = str(call.place) if call.place is not None else ""
        box.saved += saved
        if made is not None and call is not None:
            box.in_place = any(one is other for one in call.outputs for other, _ in call.changed) and node in call.nodes
            if not isinstance(node, BackwardCFunction):
                box.title = call.name.strip("_")
        shape = [_shape(made)] if made is not None else box.lines[1:2]
        name = [node.name()] if made is not None or not box.lines else box.lines[:1]
        box.lines = [*name, *shape, *([f"keeps {size(box.saved)}"] if box.saved else [])]

    def _result(self, node: Any) -> Tensor | None:
        """The tensor that came out where a node was made; None of a node in the middle of a call."""
        call = self._calls.get(node)
        if call is None:
            return None
        if node in call.nodes:
            with_node = [tensor for tensor in call.outputs if tensor.grad_fn is not None]
            return with_node[call.nodes.index(node)]
        return next((tensor for tensor in call.outputs if tensor.grad_fn is node), None)

    def _arrows_into(self, node: Any) -> None:
        if getattr(node, "variable", None) is not None:
            return
        key = self._keys[node]
        for following, _ in node.next_functions:
            if following is None:
                continue
            leaf = getattr(following, "variable", None)
            start = self._leaf(leaf, self._boxes[key].group) if leaf is not None else self._keys[following]
            if start != key:
                self._arrows.setdefault((start, key), False)
        call = self._calls.get(node)
        if call is not None and self._result(node) is not None:
            for tensor in call.inputs:
                if id(tensor) in self._inputs and not tensor.requires_grad:
                    self._arrows.setdefault((self._input(tensor), key), False)

    def _leaf(self, leaf: Tensor, group: tuple[str, ...]) -> str:
        key = self._key_of(leaf, "p")
        if key not in self._boxes:
            name = self._names.get(id(leaf), "a leaf").removeprefix(f"{group[-1].partition(' ')[0]}." if group else "")
            self._boxes[key] = Box(key, "parameter", name, [_shape(leaf)], group)
        elif self._boxes[key].group != group:  # shared between modules: it lies where both do, by its whole name
            self._boxes[key].group = _common(self._boxes[key].group, group)
            self._boxes[key].title = self._names.get(id(leaf), "a leaf")
        return key

    def _key_of(self, tensor: Tensor, kind: str) -> str:
        """A key that is the same each time the same is drawn."""
        return self._tensor_keys.setdefault(id(tensor), f"{kind}{len(self._tensor_keys)}")

    def _input(self, tensor: Tensor) -> str:
        key = self._key_of(tensor, "i")
        if key not in self._boxes:
            self._boxes[key] = Box(key, "input", self._inputs[id(tensor)], [_shape(tensor)])
        return key

    def _root(self, name: str, root: Tensor) -> None:
        key = f"r{name}"
        self._boxes[key] = Box(key, "root", name, [_shape(root)])
        if root.grad_fn is not None:
            self._arrows[self._keys[root.grad_fn], key] = False

    def _cuts(self) -> None:
        """Where the value of a leaf goes on to a root without a graph, and leaves that no root is connected to."""
        missing = {name: leaf for name, leaf in self._leaves.items() if leaf.requires_grad}
        reached = connected(self._roots.values())
        missing = {name: leaf for name, leaf in missing.items() if id(leaf) not in reached}
        if not missing:
            return
        flow = Flow(self._trace, list(self._roots.values()), missing)
        for name, leaf in missing.items():
            cut = flow.cut(name)
            call = cut.calls[0] if cut.calls else None
            start = self._leaf(leaf, _group(call)[:1] if call is not None else ())
            key = f"c{call.order}" if call is not None else f"c{cut.kind}"
            if key not in self._boxes:
                title = call.name.strip("_") if call is not None else "not used"
                kind = {"cut": "the graph is cut", "left": "leaves torch", "unread": "reaches no root"}.get(
                    cut.kind, ""
                )
                box = Box(key, "cut", title, [kind] if kind else [], _group(call) if call is not None else ())
                box.note = str(call.place) if call is not None and call.place is not None else ""
                self._boxes[key] = box
            self._arrows[start, key] = True
            if call is not None and cut.kind == "cut":
                self._onward(call, key)

    def _onward(self, cut: Call, key: str) -> None:
        """Arrows to what goes on with a value that has no graph any more."""
        made = {id(tensor) for tensor in cut.outputs}
        for call in self._trace.calls[cut.order + 1 :]:
            if any(id(tensor) in made for tensor in call.inputs):
                for node in call.nodes:
                    if self._keys.get(node) in self._boxes:
                        self._arrows.setdefault((key, self._keys[node]), True)

    def _saved(self, node: Any) -> int:
        total = 0
        for name in dir(node):
            if name.startswith("_raw_saved_"):
                raw = getattr(node, name)
                for one in raw if isinstance(raw, tuple | list) else [raw]:
                    total += self._bytes(one)
        return total

    def _bytes(self, saved: Any) -> int:
        try:
            data = saved.data
        except (AttributeError, RuntimeError):
            return 0
        if not isinstance(data, Tensor):
            return 0
        storage = storage_of(data)
        if storage is None or storage in self._kept:
            return 0
        self._kept.add(storage)
        return data.untyped_storage().nbytes()

    def _in_order(self) -> list[Box]:
        """The boxes as the forward came to them; a leaf right before what it goes into first."""
        when = {self._keys[node]: float(call.order) for node, call in self._calls.items() if node in self._keys}
        for start, end in self._arrows:
            if start not in when or self._boxes[start].kind in ("parameter", "input"):
                when[start] = min(when.get(start, math.inf), when.get(end, math.inf) - 0.5)
        return sorted(self._boxes.values(), key=lambda box: when.get(box.key, math.inf))


def size(count: int) -> str:
    """Bytes for people: `69.0 MiB`."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count} B"


def _shape(tensor: Tensor) -> str:
    dims = " × ".join(map(str, tensor.shape)) or "scalar"
    kind = str(tensor.dtype).removeprefix("torch.")
    return dims if tensor.dtype is torch.float32 else f"{dims}, {kind}"


def _short(node: Any) -> str:
    return str(node.name()).removesuffix("Backward").rstrip("0123456789").removesuffix("Backward")


def _group(call: Call) -> tuple[str, ...]:
    return tuple(name if not times else f"{name} (call {times + 1})" for name, times in call.modules if name)


def _common(a: tuple[str, ...], b: tuple[str, ...]) -> tuple[str, ...]:
    length = next((index for index, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return a[:length]
