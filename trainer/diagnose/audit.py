"""Whether the wiring is right: parameters that no optimizer has, that no gradient reaches, that a step does not move.

What can be seen without a step is seen at the start, the rest in the first step that is taken. A forward is run once
more only where a parameter went without a gradient, to say where the graph was cut.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from trainer.diagnose.cuts import Flow, connected, leaves
from trainer.diagnose.graphs import withholding
from trainer.diagnose.instrument import Instrument
from trainer.diagnose.losses import Losses
from trainer.diagnose.mistakes import Forward
from trainer.diagnose.places import assigned
from trainer.diagnose.strays import flat, not_leaves, strays
from trainer.diagnose.words import listed
from trainer.gradient import norms
from trainer.gradient.objective import who
from trainer.gradient.parameters import named_modules, named_parameters
from trainer.gradient.report import Report

_LOST = 0.9
"""The share of a low-precision parameter's elements which a step leaves as they are, from which on it is said."""


def wiring(model: Any, parameters: Mapping[str, Tensor]) -> list[str]:
    """What is wrong with who holds which parameter, a sentence each.

    Args:
        parameters: those of the optimizers, by name (`Trained.by_name`).
    """
    own = named_parameters(model)
    trained = {id(parameter) for parameter in parameters.values()}
    held = {id(parameter) for parameter in own.values()}
    strange = [name for name, parameter in parameters.items() if id(parameter) not in held]
    left_out = [name for name, one in own.items() if one.requires_grad and id(one) not in trained]
    frozen = [name for name, parameter in parameters.items() if not parameter.requires_grad]
    said = []
    if strange and len(strange) == len(parameters):
        said.append(
            "none of the optimizer's parameters is the model's: it was built on a copy, or before the model was "
            "replaced, and the model will not change. Build it from this model's parameters."
        )
        return said
    if unfit := not_leaves(model):
        said.append(
            f"requires a gradient but is the result of an operation, so no optimizer can train it: {listed(unfit)}. "
            "Make it a leaf: requires_grad_() comes last, or nn.Parameter around it."
        )
    if left_out:
        said.append(f"in the model but in no optimizer, so not trained: {listed(left_out)}.")
    if frozen:
        said.append(f"in the optimizer but with requires_grad off, so not trained: {listed(frozen)}.")
    return said


def without_gradient(parameters: Mapping[str, Tensor], forward: Forward) -> list[str]:
    """The parameters that ought to have a gradient after a backward and have none, with where the graph was cut."""
    missing = [name for name, parameter in parameters.items() if parameter.requires_grad and parameter.grad is None]
    if not missing:
        return []
    trace, roots = forward.again()
    if not roots:
        return [f"no gradient reached {listed(missing)}."]
    reached = connected(roots)
    flow = Flow(trace, roots, parameters)
    now = named_parameters(forward.model)
    by_reason: dict[str, list[str]] = {}
    replaced = [name for name in missing if name in now and now[name] is not parameters[name]]
    for name in missing:
        if name in replaced:
            continue
        why = _not_given(roots, parameters[name]) if id(parameters[name]) in reached else str(flow.cut(name))
        by_reason.setdefault(why, []).append(name)
    said = [f"no gradient reached {listed(names)}: {why}." for why, names in by_reason.items()]
    return said + [_replaced(name, forward.model) for name in replaced]


def of_forward(forward: Forward, roots: Sequence[Tensor]) -> list[str]:
    """What is wrong with the gradients that a backward from these roots gives. Each `.grad` is left as it was."""
    reached = leaves(roots)
    before = {id(one): (one, one.grad) for one in (*reached.values(), *forward.parameters.values())}
    try:
        for leaf, _ in before.values():
            leaf.grad = None
        live = [root for root in roots if root.requires_grad]
        if live:  # without inputs=, which reentrant checkpointing refuses
            torch.autograd.backward(live, [torch.ones_like(root) for root in live])
        return [*strays(reached, forward), *without_gradient(forward.parameters, forward), *_zero(forward)]
    finally:
        for leaf, gradient in before.values():
            leaf.grad = gradient


def _replaced(name: str, model: Any) -> str:
    holder, _, key = name.rpartition(".")
    place = assigned(named_modules(model).get(holder, model), key, but_in="__init__")
    where = f" in {place}" if place is not None else ""
    return (
        f"'{name}' of the model is replaced by another parameter while the forward runs{where}, and the optimizer has "
        "the old one: change its values under torch.no_grad() (copy_, clamp_), outside of the forward."
    )


def _not_given(roots: Sequence[Tensor], parameter: Tensor) -> str:
    """Why a parameter had no gradient although the forward is connected to it, when it is run again."""
    function = withholding(roots, parameter)
    if function is not None:
        return f"backward of {function} gave none for what it was part of"
    return "this forward does not always use it"


class Wiring(Instrument):
    """Says at the start of a run who holds which parameter, where that is wrong."""

    def __init__(self, step: Any) -> None:
        self._step = step

    def notes(self) -> list[str]:
        return wiring(self._step.model, self._step.parameters.by_name)


class FirstStep:
    """Calls a step until one was taken, and looks at that one.

    Args:
        step: the run's.
        found: what each finding is told to.
        over: called when it was.
    """

    def __init__(self, step: Any, found: Callable[[str], None], over: Callable[[], None]) -> None:
        self._step = step
        self._found = found
        self._over = over

    def __call__(self, window: Sequence[Any], norms: bool = False, between: Callable[[], None] | None = None) -> Report:
        parameters = self._step.parameters.by_name
        before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        reached: dict[int, Tensor] = {}

        def look(_: Any, roots: Sequence[Tensor]) -> None:
            if not reached:
                reached.update(leaves(roots))

        objective = self._step.objective
        watched = self._step.objective = Watched(objective, self._step.model)
        self._step.after_backward.append(look)
        try:
            report: Report = self._step(window, norms, between)
        finally:
            self._step.after_backward.remove(look)
            self._step.objective = objective
        if not report.skipped:
            self._over()
            forward = Forward(self._step.model, self._step.objective, window[0], parameters)
            # What a transform has frozen has no gradient any more, and had one.
            given = {name: one for name, one in parameters.items() if name not in self._step.transforms.taken}
            for finding in (
                *watched.said,
                *strays(reached, forward),
                *without_gradient(given, forward),
                *_zero(forward),
                *not_moved(before, parameters, report.lr),
            ):
                self._found(finding)
        return report


class Watched:
    """An objective whose first call is looked at for losses that are given what does not go together."""

    def __init__(self, objective: Any, model: Any) -> None:
        self._objective = objective
        self.__qualname__ = who(objective).removeprefix("the objective ")
        self.said: list[str] = []
        # What is compiled would be compiled for the look and then once more.
        within_reach = (objective, *_reads(objective), model, *named_modules(model).values())
        self._is_over = any(_is_compiled(one) for one in within_reach)

    def __call__(self, model: Any, micro_batch: Any) -> Any:
        if self._is_over:
            return self._objective(model, micro_batch)
        self._is_over = True
        losses = Losses(micro_batch)
        answer = losses.within(lambda: self._objective(model, micro_batch))
        self.said = losses.said
        return answer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._objective, name)


def _reads(function: Any) -> list[Any]:
    """What a function can reach besides its arguments: its closure, the globals it names, a partial's parts."""
    found = [getattr(function, name, None) for name in ("func", "__self__")]
    found += getattr(function, "args", ())
    function = inspect.unwrap(getattr(function, "__func__", function))
    if isinstance(function, FunctionType):
        with suppress(ValueError):  # a cell that is still empty
            outside = inspect.getclosurevars(function)
            found += [*outside.nonlocals.values(), *outside.globals.values()]
    return found


def _is_compiled(one: Any) -> bool:
    compiled = ("_orig_mod", "_compiled_call_impl", "_torchdynamo_orig_callable")
    return any(vars(one).get(name) is not None for name in compiled) if hasattr(one, "__dict__") else False


def _zero(forward: Forward) -> list[str]:
    """Gradients that are zero because something is flat. Others may well be (behind a layer that begins at zero)."""
    given = {name: one.grad for name, one in forward.parameters.items() if one.grad is not None}
    names = [name for name, gradient in given.items() if not float(norms.norm([gradient]))]
    return flat(names, forward) if names else []


def not_moved(before: Mapping[str, Tensor], parameters: Mapping[str, Tensor], lr: float) -> list[str]:
    """The parameters that a step left as they were although they have a gradient."""
    if lr == 0.0:
        return []  # a warm-up may begin there
    still, lost = [], []
    for name, parameter in parameters.items():
        gradient = parameter.grad
        if gradient is None or not float(norms.norm([gradient])):
            continue
        same = float((parameter.detach() == before[name]).float().mean())
        if same == 1.0:
            still.append(name)
        elif same >= _LOST and parameter.dtype in (torch.bfloat16, torch.float16):
            lost.append(name)
    said = []
    if still:
        said.append(
            f"the first step did not move {listed(still)}, which has a gradient: the step is lost in rounding (a "
            f"learning rate of {lr:g} is too small for it), or the optimizer leaves it out."
        )
    if lost:
        said.append(
            f"the first step moved less than a tenth of the elements of {listed(lost)}: in {parameters[lost[0]].dtype} "
            "most of it is lost in rounding; keep float32 masters or raise the learning rate."
        )
    return said
