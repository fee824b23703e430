"""Where a number stopped being finite: the first call of the forward, or the first node of the backward, that made an
infinity or a NaN out of finite numbers; and which rows of the micro-batch are enough for it.

A forward is run under a function mode that looks at every result; if all of them are finite, a backward with a hook on
every node. It costs several forwards, and is for one window that went wrong.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from trainer import rng
from trainer.diagnose.graphs import nodes
from trainer.diagnose.places import Place
from trainer.diagnose.trace import Call, Trace, tensors_in
from trainer.gradient.objective import Objective, terms_of
from trainer.gradient.parameters import named_modules, named_parameters
from trainer.gradient.skips import KeptBuffers

_TRIALS = 200
"""At most so many runs to find the rows."""


@dataclass(frozen=True)
class Culprit:
    """What turned finite numbers into others.

    - `where`: input, parameter, forward or backward.
    - `what`: the call (`log`), the node (`SqrtBackward0`), or the name of what came in bad already.
    - `module`: the innermost module's name that it lies in; empty outside of all.
    - `ranges`: of each tensor that went in: smallest and largest number, shape and dtype, in words.
    - `result`: what came out: `inf`, `-inf` or `nan`, and how many of how many elements.
    - `rows`: rows of the micro-batch that are enough to cause it, where that could be found.
    """

    where: str
    what: str
    module: str = ""
    place: Place | None = None
    ranges: list[str] = field(default_factory=list)
    result: str = ""
    rows: list[int] | None = None

    def __str__(self) -> str:
        """One sentence, and what it got on lines of their own."""
        if self.where in ("input", "parameter"):
            return f"{self.what} is not finite before anything is done with it: {self.result}."
        inside = f" in module '{self.module}'" if self.module else ""
        at = f", {self.place}" if self.place is not None else ""
        said = f"{self.what}{inside}{at} made {self.result} out of finite numbers in {self.where}."
        lines = [f"  it got {one}" for one in self.ranges]
        if self.rows is not None:
            lines.append(f"  rows of the micro-batch that are enough: {', '.join(map(str, self.rows))}")
        return "\n".join([said, *lines])


@dataclass(frozen=True)
class Suspect:
    """One micro-batch's forward and backward, as they are run to be looked at.

    Args:
        seed: what backward starts from at each term (the loss scale, under fp16).
        around: what the forward runs in: autocast, or nothing.
        state: generators as they were when the micro-batch came (`rng.capture`), so that the same is drawn.
    """

    model: Any
    objective: Objective
    micro_batch: Any
    seed: float = 1.0
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    state: Mapping[str, Any] | None = None


def culprit(suspect: Suspect, with_rows: bool = True) -> Culprit | None:
    """The first thing that went wrong; None where all stays finite."""
    found = _first(suspect, suspect.micro_batch)
    if found is None or not with_rows or found.where == "parameter":
        return found
    rows = _rows(suspect, found)
    return found if rows is None else Culprit(**{**vars(found), "rows": rows})


def _first(suspect: Suspect, micro_batch: Any) -> Culprit | None:
    for index, tensor in enumerate(tensors_in(micro_batch)):
        if not is_finite(tensor):
            return Culprit("input", f"tensor {index} of the micro-batch", result=_bad(tensor))
    for name, parameter in named_parameters(suspect.model).items():
        if not is_finite(parameter):
            return Culprit("parameter", f"the parameter '{name}'", result=_bad(parameter))
    buffers = KeptBuffers(suspect.model)
    buffers.keep()
    trace = _Looking(named_modules(suspect.model))
    try:
        with rng.preserved():
            if suspect.state is not None:
                rng.restore(suspect.state)
            with suspect.around(), trace:
                answer = suspect.objective(suspect.model, micro_batch)
    finally:
        buffers.put_back()
    if trace.bad is not None:
        return _of_call(trace.bad)
    terms = terms_of(answer, suspect.objective)
    roots = [term.value for term in terms if term.value.requires_grad]
    seeds = [torch.full_like(root, suspect.seed) for root in roots]
    return _of_backward(trace, roots, seeds)


class _Looking(Trace):
    """A trace that remembers the first call whose result is not finite although all that went in was."""

    def __init__(self, modules: Mapping[str, Any]) -> None:
        super().__init__(modules)
        self.bad: Call | None = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        seen = len(self.calls)
        result = super().__torch_function__(func, types, args, kwargs)
        if self.bad is None and len(self.calls) > seen:
            call = self.calls[-1]
            made = [*call.outputs, *(tensor for tensor, _ in call.changed)]
            if any(not is_finite(tensor) for tensor in made):
                self.bad = call
        return result


def _of_call(call: Call) -> Culprit:
    made = next(tensor for tensor in (*call.outputs, *(one for one, _ in call.changed)) if not is_finite(tensor))
    given = [tensor for tensor in call.inputs if all(tensor is not one for one, _ in call.changed)]
    return Culprit(
        "forward", f"{call.name}()", _module(call), call.place, [spread(tensor) for tensor in given], _bad(made)
    )


def _of_backward(trace: Trace, roots: Sequence[Tensor], seeds: Sequence[Tensor]) -> Culprit | None:
    bad: list[tuple[Any, list[Tensor], Tensor]] = []

    def watched(node: Any) -> Callable[[Any, Any], None]:
        def look(given: Sequence[Tensor | None], came: Sequence[Tensor | None]) -> None:
            if bad or any(one is not None and not is_finite(one) for one in came):
                return
            wrong = next((one for one in given if one is not None and not is_finite(one)), None)
            if wrong is not None:
                bad.append((node, [one for one in came if one is not None], wrong))

        return look

    every = list(nodes(roots))
    handles = [node.register_hook(watched(node)) for node in every]
    leaves = [node.variable for node in every if getattr(node, "variable", None) is not None]
    try:
        found = torch.autograd.grad(roots, leaves, seeds, allow_unused=True) if leaves else ()
    finally:
        for handle in handles:
            handle.remove()
    if not bad:
        # Each path is finite; their sum in a leaf may still not be.
        wrong = next((one for one in found if one is not None and not is_finite(one)), None)
        return None if wrong is None else Culprit("backward", "the sum of a gradient's parts", result=_bad(wrong))
    node, came, wrong = bad[0]
    call = trace.makers(every).get(node)
    place, module = (call.place, _module(call)) if call is not None else (None, "")
    return Culprit("backward", node.name(), module, place, [spread(one) for one in came], _bad(wrong))


def _rows(suspect: Suspect, found: Culprit) -> list[int] | None:
    """The fewest rows with which the same goes wrong, by halving; None where the micro-batch cannot be cut."""
    first = next(iter(tensors_in(suspect.micro_batch)), None)
    if first is None or not first.dim():
        return None
    count = first.shape[0]
    trials = 0

    def is_enough(rows: list[int]) -> bool:
        nonlocal trials
        trials += 1
        if trials > _TRIALS:
            return False
        again = _first(suspect, _taken(suspect.micro_batch, rows, count))
        return again is not None and (again.where, again.what, again.module) == (found.where, found.what, found.module)

    try:
        return _fewest(list(range(count)), is_enough)
    except (RuntimeError, ValueError, IndexError, TypeError):
        return None  # the model wants whole micro-batches


def _fewest(rows: list[int], is_enough: Callable[[list[int]], bool]) -> list[int]:
    """Zeller and Hildebrandt's delta debugging (2002): a set from which no part can be left out any more."""
    parts = 2
    while len(rows) > 1:
        size = -(-len(rows) // parts)
        chunks = [rows[start : start + size] for start in range(0, len(rows), size)]
        smaller = next((chunk for chunk in chunks if is_enough(chunk)), None)
        if smaller is not None:
            rows, parts = smaller, 2
            continue
        rest = next((left for left in (_without(rows, chunk) for chunk in chunks) if left and is_enough(left)), None)
        if rest is not None:
            rows, parts = rest, max(2, parts - 1)
        elif parts >= len(rows):
            break
        else:
            parts = min(len(rows), 2 * parts)
    return rows


def _without(rows: list[int], chunk: list[int]) -> list[int]:
    gone = set(chunk)
    return [row for row in rows if row not in gone]


def _taken(value: Any, rows: list[int], count: int) -> Any:
    """The micro-batch with these rows only; tensors of another length stay whole."""
    if isinstance(value, Tensor):
        return value[rows] if value.dim() and value.shape[0] == count else value
    if isinstance(value, Mapping):
        return {key: _taken(item, rows, count) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [_taken(item, rows, count) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def is_finite(tensor: Tensor) -> bool:
    """Whether every number in it is; whole numbers are."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    values = tensor.detach()
    if values.layout is not torch.strided:
        values = values.coalesce().values()
    return bool(values.isfinite().all())


def spread(tensor: Tensor) -> str:
    """`4 × 8 float32 in [-1.2, 3.4]`."""
    shape = " × ".join(map(str, tensor.shape)) or "a scalar"
    kind = str(tensor.dtype).removeprefix("torch.")
    if not tensor.numel() or tensor.is_complex() or tensor.layout is not torch.strided:
        return f"{shape} {kind}"
    values = tensor.detach()
    if values.is_floating_point():
        values = values[values.isfinite()].double()
        if not values.numel():
            return f"{shape} {kind}"
    return f"{shape} {kind} in [{values.min().item():.4g}, {values.max().item():.4g}]"


def _bad(tensor: Tensor) -> str:
    values = tensor.detach()
    if values.layout is not torch.strided:
        values = values.coalesce().values()
    kinds = [
        word
        for word, there in (
            ("nan", values.isnan()),
            ("inf", values == float("inf")) if not values.is_complex() else ("inf", values.isinf()),
            ("-inf", values == float("-inf")) if not values.is_complex() else ("inf", values.isinf()),
        )
        if bool(there.any())
    ]
    wrong = int((~values.isfinite()).sum())
    return f"{' and '.join(dict.fromkeys(kinds))} ({wrong:,} of {values.numel():,})"


def _module(call: Call) -> str:
    return next((name for name, _ in reversed(call.modules) if name), "")
