"""What a checkpoint holds: one list, how each part is taken, and how it goes back.

A checkpoint loads by shape: the structure comes from the code, only numbers from the file, and what does not fit is
named, before anything is changed.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer import rng
from trainer.checkpoint.of_model import check_model, load_model, model_state
from trainer.checkpoint.of_optimizers import (
    check_finite,
    check_optimizers,
    is_third_party,
    load_optimizers,
    optimizer_state,
    parameter_names,
)
from trainer.errors import CheckpointError
from trainer.step import Step

PARTS = {
    "model": "parameters and buffers, by the model's own names",
    "optimizers": "each optimizer's state and its groups' hyperparameters",
    "step": "clocks, skips in a row, schedule, loss scale, gradient transforms, float32 masters, and the open window: "
    "its gradients, sums, weights and buffers",
    "rng": "the generators of python, numpy, torch and each device",
    "run": "the place in the data, the last metrics, the best so far, an evaluation that is owed or half done, what "
    "the instruments have counted, and the machine",
    "ranks": "of several ranks what each but the first has of its own: generators, buffers, its open window, its place "
    "in an evaluation; each rank's tensors are in a file of their own",
    "config": "what the run was made from, as plain values",
}
"""Every part, with a line each. The first rank's own lies in the parts themselves; with one process `ranks` is a list
of one mapping that is empty."""


def take(
    model: Any, step: Step, run: Mapping[str, Any], config: Mapping[str, Any], ranks: Sequence[Any] = ({},)
) -> dict[str, Any]:
    """The whole state, in the parts of the list; its tensors are still those that are trained. `ranks` is what the
    others have of their own (`of_ranks.take`)."""
    return {
        "model": model_state(model),
        "optimizers": [optimizer_state(optimizer) for optimizer in step.optimizers],
        "step": step.state_dict(),
        "rng": rng.capture(),
        "run": dict(run),
        "ranks": list(ranks),
        "config": dict(config),
    }


def put_back(
    state: Mapping[str, Any], model: Any, step: Step, names: Sequence[str], where: Path, finite: bool = True
) -> dict[str, Any]:
    """Load a state. Returns the values of `run`, which must have these names.

    Raises CheckpointError that names what does not fit, having changed nothing where that is the model, an optimizer
    or a missing part. `finite` refuses an optimizer state that holds a NaN.
    """
    try:
        check_model(model, state["model"], where)
        check_optimizers(step.optimizers, state["optimizers"], where)
        if finite:
            check_finite(
                state["optimizers"],
                parameter_names(step.optimizers, step.parameters.by_name),
                [is_third_party(one) for one in step.optimizers],
                where,
            )
        run = {name: state["run"][name] for name in names}
        inside, generators, _ = state["step"], state["rng"], state["ranks"]
        load_model(model, state["model"], where)
        load_optimizers(step.optimizers, state["optimizers"], where)
        step.load_state_dict(inside)
        rng.restore(generators)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        what = f"has no {error}" if isinstance(error, KeyError) else f"does not hold what it should ({error})"
        raise CheckpointError(f"{where} {what}: it was not written whole, or by another version.") from None
    return run
