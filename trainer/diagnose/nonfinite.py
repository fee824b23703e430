"""Where a number stopped being finite: the call of the forward, or the node of the backward, that made an infinity or
a NaN out of finite numbers and from which it came into the loss or a gradient; and which rows are enough for it.

A forward is run under a function mode that looks at every result; if the loss is finite, a backward with a hook on
every node. From what is wrong in the end the way is followed back to where it began: what is masked with an infinity
and never comes out of a softmax again is no fault. It costs several forwards, and is for one window that went wrong.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from trainer import rng
from trainer.diagnose.enough import enough
from trainer.diagnose.graphs import nodes
from trainer.diagnose.numbers import FINITE, bad, level, spread
from trainer.diagnose.origin import Origin, Seen, gradients, in_backward, in_forward, watched
from trainer.diagnose.places import Place
from trainer.diagnose.trace import Call, Trace, storage_of, tells_only, tensors_in
from trainer.gradient.objective import Objective, Term, terms_of
from trainer.gradient.parameters import named_modules, named_parameters
from trainer.gradient.skips import KeptBuffers

_SHOWN = 20
"""So many row numbers are listed in full."""


@dataclass(frozen=True)
class Culprit:
    """What turned finite numbers into others.

    - `where`: input, parameter, elsewhere, forward or backward.
    - `what`: the call (`log()`), the node (`SqrtBackward0`), or the name of what came in bad already.
    - `module`: the innermost module's name that it lies in; empty outside of all.
    - `ranges`: of each tensor that went in: smallest and largest number, shape and dtype, in words.
    - `result`: what came out: `inf`, `-inf` or `nan`, and how many of how many elements.
    - `rows`: rows of the micro-batch that are enough to cause it, where that could be found.
    - `out_of`: what it made that of.
    """

    where: str
    what: str
    module: str = ""
    place: Place | None = None
    ranges: list[str] = field(default_factory=list)
    result: str = ""
    rows: list[int] | None = None
    out_of: str = "finite numbers"

    def __str__(self) -> str:
        """One sentence, and what it got on lines of their own."""
        inside = f" in module '{self.module}'" if self.module else ""
        at = f", {self.place}" if self.place is not None else ""
        if self.where in ("input", "parameter"):
            said = f"{self.what} is not finite before anything is done with it: {self.result}."
        elif self.where == "elsewhere":
            said = (
                f"{self.what}{inside}{at} got {self.result} in a tensor that was made outside of the forward, or by "
                "code that is not seen (compiled, say)."
            )
        else:
            said = f"{self.what}{inside}{at} made {self.result} out of {self.out_of} in {self.where}."
        lines = [f"  it got {one}" for one in self.ranges]
        if self.rows is not None:
            what = "hold it" if self.where == "input" else "are enough"
            lines.append(f"  rows of the micro-batch that {what}: {listed(self.rows)}")
        return "\n".join([said, *lines])

    @property
    def kind(self) -> tuple[Any, ...]:
        """Equal for two that are one and the same fault."""
        return self.where, self.what, self.module, self.place


@dataclass(frozen=True)
class Suspect:
    """One micro-batch's forward and backward, as they are run to be looked at.

    Args:
        seed: what backward starts from at each term.
        seeds: the same for each term by name; a term that is not named here counts for nothing.
        around: what the forward runs in: autocast, or nothing.
        state: generators as they were when the micro-batch came (`rng.capture`), so that the same is drawn.
        wanted: names of the parameters whose gradient matters; all where it is None.
    """

    model: Any
    objective: Objective
    micro_batch: Any
    seed: float = 1.0
    seeds: Mapping[str, float] | None = None
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    state: Mapping[str, Any] | None = None
    wanted: frozenset[str] | None = None

    def roots(self, answer: Any) -> tuple[list[Term], list[Tensor]]:
        """The terms that count, and what backward starts from at each."""
        named = self.seeds
        terms = [term for term in terms_of(answer, self.objective) if named is None or term.name in named]
        seeds = []
        for term in terms:
            number = self.seed if named is None else named[term.name]
            seed = torch.full_like(term.value, number)
            seeds.append(seed if term.vector is None else term.vector.to(term.value) * seed)
        return terms, seeds

    def leaves(self) -> dict[str, Tensor]:
        """The parameters that a gradient is asked for."""
        own = named_parameters(self.model).items()
        return {n: p for n, p in own if p.requires_grad and (self.wanted is None or n in self.wanted)}


def culprit(suspect: Suspect, with_rows: bool = True) -> Culprit | None:
    """What went wrong; None where the loss and every gradient are finite."""
    found, draws = _first(suspect)
    if found is None or not with_rows or found.where in ("input", "parameter"):
        return found

    def is_enough(micro_batch: Any) -> bool:
        again, _ = _first(replace(suspect, micro_batch=micro_batch))
        return again is not None and again.kind == found.kind

    return replace(found, rows=enough(suspect.micro_batch, is_enough, draws))


def _first(suspect: Suspect) -> tuple[Culprit | None, bool]:
    """The culprit, and whether the forward draws random numbers."""
    buffers = KeptBuffers(suspect.model)
    buffers.keep()
    trace = _Looking(named_modules(suspect.model))
    try:
        with rng.preserved():
            if suspect.state is not None:
                rng.restore(suspect.state)
            drawn = rng.drawing()
            with suspect.around(), trace:
                answer = suspect.objective(suspect.model, suspect.micro_batch)
            draws = drawn()
            terms, seeds = suspect.roots(answer)
            wrong = next((term.value for term in terms if level(term.value) != FINITE), None)
            if wrong is None:
                return _of_backward(suspect, trace, [term.value for term in terms], seeds), draws
            counted = {id(tensor) for _, _, tensor in _given(suspect)}
            return _of_forward(suspect, in_forward(trace.seen, wrong, counted)), draws
    finally:
        buffers.put_back()  # not before backward, which may have saved them


class _Looking(Trace):
    """A trace that remembers how finite everything was when it went into each call, and when it came out."""

    def __init__(self, modules: Mapping[str, Any]) -> None:
        super().__init__(modules)
        self.seen: list[Seen] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        count = len(self.calls)
        given = [] if tells_only(func) else [(one, level(one)) for one in tensors_in((args, kwargs or {}))]
        result = super().__torch_function__(func, types, args, kwargs)
        if len(self.calls) > count:
            call = self.calls[-1]
            made = [(one, level(one)) for one in (*call.outputs, *(changed for changed, _ in call.changed))]
            wrong = next((one for one, how in made if how != FINITE), None)
            if wrong is not None:
                planted = _has_infinity((args, kwargs or {})) and all(how == FINITE for _, how in given)
                self.seen.append(Seen(call, given, made, bad(wrong), planted))
        return result


def _has_infinity(value: Any) -> bool:
    """Whether an infinity or a NaN is among the plain numbers of a call."""
    if isinstance(value, float):
        return not math.isfinite(value)
    if isinstance(value, Mapping):
        return any(_has_infinity(one) for one in value.values())
    return isinstance(value, list | tuple) and any(_has_infinity(one) for one in value)


def _given(suspect: Suspect) -> Iterator[tuple[str, str, Tensor]]:
    """What came into the forward, each with the kind of its place and its name."""
    for index, tensor in enumerate(tensors_in(suspect.micro_batch)):
        yield "input", f"tensor {index} of the micro-batch", tensor
    for name, parameter in named_parameters(suspect.model).items():
        yield "parameter", f"the parameter '{name}'", parameter


def _of_forward(suspect: Suspect, origin: Origin) -> Culprit:
    by, leaf = origin.by, origin.leaf
    if leaf is not None:
        for where, name, tensor in (*_given(suspect), *_buffers(suspect.model)):
            if tensor is leaf or (storage_of(tensor) == storage_of(leaf) is not None):
                return Culprit(where, name, result=bad(tensor), rows=_holding(tensor) if where == "input" else None)
    if by is None:
        return Culprit("elsewhere", "the objective", result="what it returned")
    call = by.call
    what, module = f"{call.name}()", _module(call)
    if leaf is not None:
        return Culprit("elsewhere", what, module, call.place, result=bad(leaf))
    given = [tensor for tensor, _ in by.given if all(tensor is not changed for changed, _ in call.changed)]
    infinite = any(how != FINITE for _, how in by.given)
    out_of = "a number that it was given" if by.planted else "infinite numbers" if infinite else "finite numbers"
    ranges = [spread(tensor) for tensor in given]
    return Culprit("forward", what, module, call.place, ranges, by.result, out_of=out_of)


def _holding(tensor: Tensor) -> list[int] | None:
    """The rows with something in them that is not finite."""
    if not tensor.dim() or tensor.layout is not torch.strided:
        return None
    return [row for row, values in enumerate(tensor.detach()) if level(values) != FINITE]


def listed(rows: Sequence[int]) -> str:
    """Numbers in words, the first of them where there are many."""
    more = f" and {len(rows) - _SHOWN:,} more" if len(rows) > _SHOWN else ""
    return ", ".join(f"{row:,}" for row in rows[:_SHOWN]) + more


def _buffers(model: Any) -> Iterator[tuple[str, str, Tensor]]:
    for prefix, module in named_modules(model).items():
        for name, buffer in module.named_buffers(recurse=False):
            yield "parameter", f"the buffer '{f'{prefix}.{name}' if prefix else name}'", buffer


def _of_backward(suspect: Suspect, trace: Trace, roots: Sequence[Tensor], seeds: Sequence[Tensor]) -> Culprit | None:
    every = list(nodes(roots))
    leaves = suspect.leaves()
    flowed, found = watched(every, lambda: gradients(roots, seeds, list(leaves.values())))
    wrong = {id(p): g for p, g in zip(leaves.values(), found, strict=True) if g is not None and level(g) != FINITE}
    if not wrong:
        return None
    ends = [node for node in every if id(getattr(node, "variable", None)) in wrong]
    node = in_backward(every, flowed, ends)
    if node is None:
        name = next(name for name, parameter in leaves.items() if id(parameter) in wrong)
        return Culprit(
            "backward", f"the sum of the parts of the gradient of '{name}'", result=bad(wrong[id(leaves[name])])
        )
    *came, made = flowed[node].tensors
    call = trace.makers(every).get(node)
    place, module = (call.place, _module(call)) if call is not None else (None, "")
    return Culprit("backward", node.name(), module, place, [spread(one) for one in came], bad(made))


def _module(call: Call) -> str:
    return next((name for name, _ in reversed(call.modules) if name), "")
