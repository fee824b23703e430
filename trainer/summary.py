"""What a run says of itself before it starts: the window as an equation, and what was assumed."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.modules.batchnorm import _NormBase

from trainer.data.dealt import Dealt
from trainer.data.sources import Source
from trainer.gradient.clocks import counted
from trainer.gradient.model_loss import ModelLoss
from trainer.gradient.narrow import NARROW
from trainer.gradient.objective import Supervised
from trainer.gradient.parameters import named_modules
from trainer.gradient.precision import slow_here
from trainer.gradient.report import FREE_READS
from trainer.loggers.events import Start
from trainer.optim.update import could_be_fused
from trainer.settings import Settings
from trainer.step import Step

SMALL = 200_000
"""A model of fewer parameters seldom has activations that fill a memory (docs/toggles/activation_checkpointing.md)."""


def start(
    step: Step,
    source: Source | Dealt,
    settings: Settings,
    also: Sequence[str],
    resumed: Path | None,
    evaluated_at: int,
    **who: Any,
) -> Start:
    """How the run begins. `also` are notes that come first; `who` is its recipe, folder, config and device."""
    return Start(
        model=type(step.model).__name__,
        parameters=parameter_count(step),
        precision=settings.precision,
        window=window(settings, source, step),
        notes=[*also, *notes(step, source, settings)],
        total_windows=total_windows(settings, source),
        clocks=step.clocks.as_dict(),
        resumed_from=resumed,
        evaluated_at=evaluated_at,
        step_clock=settings.loggers.axis,
        **who,
    )


def parameter_count(step: Step) -> int:
    """Numbers that the optimizers move."""
    return sum(
        parameter.numel()
        for optimizer in step.optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.requires_grad
    )


def window(settings: Settings, source: Source | Dealt, step: Step) -> str:
    """`window 4 × 64 rows = 256 rows, divided by rows`."""
    count = settings.gradient.accumulation_steps
    reduction = settings.gradient.reduction
    what = step.objective.counter.what if isinstance(step.objective, Supervised) else "rows"
    if isinstance(step.objective, ModelLoss):
        what = step.objective.what
    elif step.weigher.declares and not isinstance(step.objective, Supervised):
        what = "what the objective's weight counts"
    divided = {
        "mean": f"divided by {what}",
        "sum": "not divided",
        "micro_batches": f"each micro-batch divided by {what}, their sum by {count * step.ranks.world_size}",
    }[reduction]
    ranks = step.ranks.world_size
    many = "" if ranks == 1 else f"{ranks} ranks × "
    if not source.cuts_rows:
        return f"window {many}{counted(count, 'micro-batch', 'micro-batches')}, {divided}"
    rows = settings.data.batch_size
    whole = counted(ranks * count * rows, "row")
    factors = f"{many}{'' if count == 1 else f'{count} × '}{counted(rows, 'row')}"
    return f"window {whole}, {divided}" if ranks * count == 1 else f"window {factors} = {whole}, {divided}"


def total_windows(settings: Settings, source: Source | Dealt) -> int | None:
    """How many windows the run will draw, where its limits tell."""
    length = source.rounds() if isinstance(source, Dealt) else source.length()
    by_epochs = None
    if settings.limits.epochs is not None and length is not None:
        by_epochs = settings.limits.epochs * -(-length // settings.gradient.accumulation_steps)
    known = [total for total in (by_epochs, settings.limits.steps) if total is not None]
    return min(known) if known else None


def notes(step: Step, source: Source | Dealt, settings: Settings) -> Sequence[str]:
    """What was assumed, and what the user may want to know; a sentence each."""
    said = []
    if not isinstance(step.objective, Supervised) and not step.weigher.declares:
        said.append(
            "a plain scalar of the objective counts as a mean over rows, the first dimension of the first tensor; "
            "Sum(total, weight) tells a weight of its own."
        )
    if not source.owns_order:
        said.append(
            "the data's order is its own: a run that goes on inside an epoch walks it again up to its place, and "
            "is exact only where that gives the same micro-batches."
        )
    for optimizer in step.optimizers:
        if could_be_fused(optimizer):
            said.append(f"{type(optimizer).__name__} was made without fused=True: its step would cost less with it.")
    rounded = [p.dtype for p in step.parameters.by_name.values() if p.dtype in NARROW]
    if rounded and not step.settings.master_parameters:
        name, least = ("bfloat16", 256) if torch.bfloat16 in rounded else ("float16", 2048)
        said.append(
            f"parameters are {name}, so that a step below about 1/{2 * least} of a parameter is lost: "
            "gradient.master_parameters=true keeps it."
        )
    slow = slow_here(settings.precision, step.device.type)
    if slow is not None:
        said.append(slow)
    if settings.activation_checkpointing.mode == "segments" and parameter_count(step) < SMALL:
        said.append(
            "activation checkpointing is on, and the model is small: computing activations again costs more time than "
            "is gained, unless a micro-batch is very large."
        )
    if not step.rates.defers:
        said.append("the schedule is a torch LRScheduler: on a device it costs one read a step.")
    said += _changed(step)
    if isinstance(source, Dealt):
        said += [*source.notes(), *_of_ranks(step)]
    length = source.rounds() if isinstance(source, Dealt) else source.length()
    ragged = length is not None and length % settings.gradient.accumulation_steps
    if ragged:
        said.append(f"the last window of an epoch holds {ragged} micro-batches; it is divided by its own weight.")
    return said


def _of_ranks(step: Step) -> list[str]:
    """What does not go over ranks."""
    if not any(
        isinstance(module, _NormBase) and module.track_running_stats for module in named_modules(step.model).values()
    ):
        return []
    return [
        "BatchNorm: each rank normalises by its own micro-batches and has its own running statistics; the first rank's "
        "are saved and evaluated with. On CUDA torch.nn.SyncBatchNorm normalises over all of them."
    ]


def _changed(step: Step) -> list[str]:
    """What stands between the true gradient and the optimizer besides a clip."""
    what = [f"the gradient goes through {', '.join(step.transforms.names)}"] if step.transforms else []
    what += ["skip_if may leave a step out"] if step.skip_if is not None else []
    waits = step.device.type not in FREE_READS
    return [f"{' and '.join(what)}{': the host waits for the verdict once a step' if waits else ''}."] if what else []
