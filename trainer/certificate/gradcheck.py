"""Whether a backward is the derivative of its forward: torch's gradcheck, in float64, on what one forward meets.

Of each input a few elements are looked at, from its smallest value to its largest, and all outputs at once, by a fixed
random combination: so it costs some thirty forwards for an input of any size. A backward that is wrong there is tried
once more beside those values, as at a kink (zero, for a ReLU) no quotient is the derivative.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from trainer import rng
from trainer.certificate import wide
from trainer.certificate.batches import cast, copied, mapped
from trainer.certificate.certificate import Finding
from trainer.certificate.lab import Lab
from trainer.certificate.met import Meetings, Met, meeting
from trainer.certificate.quotient import EPS, Function, Subject, UncheckedError, Wrong, look
from trainer.errors import ConfigError, did_you_mean

_MOST_ELEMENTS = 16


@dataclass
class Checked:
    """What came of it all."""

    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def gradcheck(lab: Lab, modules: Sequence[str] = (), meant: Sequence[str] = ()) -> Checked:
    """Check the Functions that the objective's forward of the first micro-batch meets, and these modules by name.

    Args:
        meant: names of Functions whose backward is another on purpose (a straight-through estimator).

    Raises ConfigError for a module that there is not or that forward does not call, and for a Function not met.
    """
    for name in modules:
        if name not in lab.modules:
            raise ConfigError(f"gradcheck: there is no module '{name}': {did_you_mean(name, lab.modules)}")
    said, passed = Checked(), []
    met = _met(lab, set(modules), said)
    _is_met("module", modules, met.modules)
    _is_met("Function", meant, {one.function.__name__ for one in met.functions})
    double = lab.state.wide(torch.float64), wide.plainly(torch.float64)
    with rng.preserved(), lab.state.kept(), double[0], double[1], torch.enable_grad():
        wrong: set[type] = set()
        for one in met.functions:
            name = one.function.__name__
            if one.function in wrong or name in meant or not any(one.needed):
                continue
            found = _judged(str(one), _of_function(one), said)
            if isinstance(found, Wrong):
                wrong.add(one.function)
                reason = (
                    f"{one} is not the derivative of its forward: {found}; if that is meant, as in a straight-through "
                    f"estimator, say --meant {name}."
                )
                said.findings.append(Finding("function", None, one.module, reason, found.error))
            elif found and name not in passed:
                passed.append(name)
        for name, (inputs, keywords) in met.modules.items():
            found = _judged(f"the module '{name}'", _of_module(lab.modules[name], inputs, keywords), said)
            if isinstance(found, Wrong):
                reason = f"its backward is not the derivative of its forward: {found}."
                said.findings.append(Finding("function", None, name, reason, found.error))
            elif found:
                passed.append(f"the module '{name}'")
    if meant:
        said.notes.append(f"the backward of {', '.join(meant)} is not the derivative of its forward, and is meant so.")
    if passed:
        said.notes.append(
            f"gradcheck in float64, eps {EPS:g}: {', '.join(passed)} passed. (In float32 no right backward would: "
            f"a quotient over {2 * EPS:g} keeps {torch.finfo(torch.float32).eps / (2 * EPS):.0%} of rounding.)"
        )
    return said


def _is_met(kind: str, names: Sequence[str], met: Iterable[str]) -> None:
    for name in names:
        if name not in met:
            raise ConfigError(f"gradcheck: forward calls no {kind} '{name}': {did_you_mean(name, met)}")


def _met(lab: Lab, modules: set[str], said: Checked) -> Meetings:
    with rng.preserved(), lab.state.kept(), torch.enable_grad(), meeting(lab.modules, modules) as met:
        try:
            lab.objective(lab.model, copied(lab.window[0]))
        except Exception as error:
            said.notes.append(f"gradcheck saw forward only until it raised {type(error).__name__}.")
    return met


def _of_function(met: Met) -> Subject:
    inputs, names = cast(met.inputs, torch.float64), met.names
    checked = {
        name: one
        for name, one, needed in zip(names, inputs, met.needed, strict=True)
        if needed and (one.is_floating_point() or one.is_complex())
    }

    def call(given: Mapping[str, Tensor]) -> Any:
        arguments = []
        for name, one, needed in zip(names, inputs, met.needed, strict=True):
            if isinstance(one, Tensor):
                # Every input that had a gradient has one now, and none is a leaf, which forward could not change.
                one = given[name].clone() if name in given else one.clone().requires_grad_(needed).clone()
            arguments.append(one)
        return met.function.apply(*arguments)

    return Subject(checked, call)


def _of_module(module: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> Subject:
    held: dict[str, Tensor] = {}

    def number(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point() or tensor.is_complex():
            held[f"input {len(held)}"] = tensor
        return tensor

    arguments = mapped(cast((inputs, keywords), torch.float64), number)
    names = {id(tensor): name for name, tensor in held.items()}
    parameters = {name: one for name, one in module.named_parameters() if one.requires_grad}

    def call(given: Mapping[str, Tensor]) -> Any:
        args, kwargs = mapped(arguments, lambda tensor: given.get(names.get(id(tensor), ""), tensor).clone())
        own = {name: one for name, one in given.items() if name in parameters}
        buffers = {name: one.clone() for name, one in module.named_buffers()}
        return torch.func.functional_call(module, {**buffers, **own}, args, kwargs)

    return Subject({**held, **parameters}, call)


def _judged(what: str, subject: Subject, said: Checked) -> Wrong | bool:
    """The first input whose gradient is wrong, or whether all could be checked; what could not is noted."""
    most = max(2, min(_MOST_ELEMENTS, 512 // max(1, len(subject.inputs))))
    kinks = []
    for name, value in subject.inputs.items():
        try:
            wrong, is_at_kink = look(Function(subject, name), value.detach(), most)
        except UncheckedError as why:
            said.notes.append(f"{what} {why}: it is not checked.")
            return False
        except Exception as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
            said.notes.append(f"{what} does not run in float64 ({first}): it is not checked.")
            return False
        if wrong is not None:
            return wrong
        kinks += [name] * is_at_kink
    if kinks:
        said.notes.append(
            f"{what} differs from the difference quotient where '{kinks[0]}' lies on a kink or a jump of its forward, "
            "and agrees beside it."
        )
    return True
