"""certify(...): the certificate of a model, an objective and a window, or of somebody else's loop."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from trainer.certificate.audit import audit
from trainer.certificate.certificate import Certificate
from trainer.certificate.examine import examine
from trainer.certificate.gradcheck import gradcheck as check_functions
from trainer.certificate.lab import Lab
from trainer.certificate.paths import Loop, LoopPath, Path, StepPath
from trainer.certificate.reference import Asked
from trainer.data.sources import source_of
from trainer.diagnose.unseen import UNSEEN
from trainer.errors import ConfigError, GradientError
from trainer.gradient.invariants import check_writes
from trainer.gradient.objective import as_objective
from trainer.gradient.parameters import named_for, named_parameters
from trainer.optim.update import as_optimizers
from trainer.settings import DataSettings, GradientSettings, step_settings
from trainer.step import Step


def certify(
    model: Any,
    objective: Any,
    optimizer: Any = None,
    data: Any = None,
    *,
    loop: Loop | None = None,
    lr: float | None = None,
    batch_size: int = 32,
    accumulation_steps: int = 1,
    count_rows: Callable[[Any], int] | None = None,
    gradcheck: Sequence[str] | None = (),
    meant: Sequence[str] = (),
    **settings: Any,
) -> Certificate:
    """Hold one window's gradient against the plain reference, and name what breaks it. Nothing is changed.

    Args:
        model: an nn.Module, or any object that holds leaf tensors.
        objective: as `Step` takes it; for a loop, what its gradient ought to be the gradient of.
        optimizer: its parameters are those that count; None: all that require a gradient.
        data: a window, that is a list of micro-batches; or what `Trainer` takes as data (a tuple of tensors, a
            dataset, a DataLoader), of which the first window is taken.
        loop: in place of a step as it is configured: a callable that is given the model and the micro-batches and
            leaves `.grad`, or takes one step of plain SGD.
        lr: of the loop's SGD step; the gradient is then (parameters before - after) / lr.
        batch_size, accumulation_steps: how data is cut into a window.
        count_rows: rows of a micro-batch, where the first dimension of its first tensor is not that.
        gradcheck: custom autograd Functions that forward meets are held against difference quotients, and so are the
            modules named here; None: nothing is.
        meant: Functions whose backward is not the derivative of their forward on purpose, by name.
        settings: keywords of `Step`: `precision="bf16"`, `activation_checkpointing=4`, `reduction="sum"`, ….
    """
    objective = as_objective(objective, model)
    window = _window(data, batch_size, accumulation_steps)
    parameters = _parameters(model, optimizer)
    gradient = settings.get("gradient")
    toggles = {name: settings[name] for name in settings if name in GradientSettings.__dataclass_fields__}
    asked = step_settings(gradient, toggles)
    lab = Lab(
        model,
        objective,
        window,
        parameters,
        Asked(asked.reduction, asked.coefficients, count_rows),
        [] if loop is None else [("loop", loop)],
        settings.get("ranks"),
    )
    if loop is not None:
        if settings:
            raise ConfigError(f"certify got loop= and also {', '.join(settings)}: a loop has its own settings.")
        path: Path = LoopPath(model, loop, parameters, lr)
    else:
        path = StepPath(model, objective, parameters, {"count_rows": count_rows, **settings})
    certificate = _counted(examine(lab, path, settings.get("precision", "fp32")), path, len(window))
    if loop is None:
        _audit(certificate, lab, parameters if optimizer is None else named_for(model, as_optimizers(optimizer)))
    return _with_functions(certificate, lab, gradcheck, meant)


def certify_step(
    step: Step,
    window: Sequence[Any],
    keywords: Mapping[str, Any],
    gradcheck: Sequence[str] | None = None,
    meant: Sequence[str] = (),
) -> Certificate:
    """The certificate of a step as it was made.

    Args:
        keywords: those that it was made with, but for its schedule.
        gradcheck, meant: as in `certify`; by default nothing is checked.
    """
    parameters = {name: one for name, one in step.parameters.by_name.items() if one.requires_grad}
    asked = Asked(step.settings.reduction, step.settings.coefficients, keywords.get("count_rows"))
    lab = Lab(step.model, step.objective, window, parameters, asked, ranks=step.ranks)
    path = StepPath(step.model, step.objective, parameters, {**keywords, "ranks": step.ranks})
    certificate = _counted(examine(lab, path, keywords.get("precision", "fp32")), path, len(window))
    _audit(certificate, lab, step.parameters.by_name)
    return _with_functions(certificate, lab, gradcheck, meant)


def _with_functions(
    certificate: Certificate, lab: Lab, modules: Sequence[str] | None, meant: Sequence[str]
) -> Certificate:
    """With what is found of single backwards, which the reference takes as they are."""
    if modules is not None:
        checked = check_functions(lab, modules, meant)
        certificate.findings += checked.findings
        certificate.notes += checked.notes
    return certificate


def _counted(certificate: Certificate, path: Path, micro_batches: int) -> Certificate:
    """With a note on a gradient that was not written once for each micro-batch, which may be meant."""
    if isinstance(path, StepPath):
        try:
            check_writes(path.writes, micro_batches)
        except GradientError as uneven:
            certificate.notes.append(str(uneven))
    return certificate


def _audit(certificate: Certificate, lab: Lab, parameters: Mapping[str, Tensor]) -> None:
    """Add what the audit of a first step would say; what was changed unseen is named where it broke the gradient."""
    certificate.audit = audit(lab, parameters)
    unseen = [one for one in certificate.audit if UNSEEN in one]
    if unseen and any(one.kind == "changed" for one in certificate.findings):
        certificate.audit = [one for one in certificate.audit if one not in unseen]
        certificate.findings = [
            replace(one, reason=" ".join(unseen)) if one.kind == "changed" else one for one in certificate.findings
        ]


def _parameters(model: Any, optimizer: Any) -> dict[str, Tensor]:
    found = named_parameters(model) if optimizer is None else named_for(model, as_optimizers(optimizer))
    found = {name: parameter for name, parameter in found.items() if parameter.requires_grad}
    if not found:
        raise ConfigError("the model holds no parameter that requires a gradient: there is nothing to certify.")
    return found


def _window(data: Any, batch_size: int, accumulation_steps: int) -> Sequence[Any]:
    is_tensors = isinstance(data, tuple) and all(isinstance(one, Tensor) for one in data)
    if isinstance(data, list) or (isinstance(data, tuple) and not is_tensors):
        window: list[Any] = list(data)
    else:
        batches = source_of(data, DataSettings(batch_size=batch_size, shuffle=False)).micro_batches(0, 0, 0)
        window = [one for one, _ in zip(batches, range(accumulation_steps), strict=False)]
    if not window:
        raise ConfigError("the window holds no micro-batch: there is nothing to certify.")
    return window
