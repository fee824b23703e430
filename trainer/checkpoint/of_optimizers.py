"""The optimizers' part of a checkpoint: their states, checked for shape and for numbers that are none."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from trainer import kernels
from trainer.errors import CheckpointError, DivergedError

# States of torch's optimizers that have their parameter's shape; others (a counter, a factored average) have their own.
_SHAPED = {
    "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg", "grad_avg", "acc_delta", "sum", "prev",
    "step_size", "exp_inf", "ax",
}  # fmt: skip


def check_optimizers(optimizers: list[Any], states: list[Any], where: Path | str) -> None:
    """Raises CheckpointError where the number of optimizers, a group or the shape of a state does not fit."""
    if len(optimizers) != len(states):
        raise CheckpointError(f"{where} holds {len(states)} optimizers, the run has {len(optimizers)}.")
    for index, (optimizer, state) in enumerate(zip(optimizers, states, strict=True)):
        kind = state.get("kind")
        if kind is not None and kind != type(optimizer).__name__:
            raise CheckpointError(
                f"{where} holds the state of {kind}, and the run's optimizer is {type(optimizer).__name__}: go on with "
                "the optimizer that it was saved with, or take only the parameters from it (init=)."
            )
        own = [len(group["params"]) for group in optimizer.param_groups]
        saved = [len(group["params"]) for group in state["param_groups"]]
        if own != saved:
            raise CheckpointError(
                f"{where}: the groups of optimizer {index} hold {saved} parameters there and {own} in the run."
            )
        _check_shapes(optimizer, state, index, where)


def load_optimizers(optimizers: list[Any], states: list[Any], where: Path | str) -> None:
    """Each optimizer's state. Raises CheckpointError, having changed none, where one does not fit."""
    check_optimizers(optimizers, states, where)
    with kernels.without_compiler():
        for optimizer, state in zip(optimizers, states, strict=True):
            optimizer.load_state_dict({"state": state["state"], "param_groups": state["param_groups"]})


def _check_shapes(optimizer: Any, state: Mapping[str, Any], index: int, where: Path | str) -> None:
    parameters = _parameters(optimizer)
    known = not is_third_party(optimizer)
    for place, values in state["state"].items():
        if not isinstance(place, int) or not 0 <= place < len(parameters):
            raise CheckpointError(
                f"{where}: optimizer {index} has a state for parameter {place}, which it does not hold."
            )
        for name, value in values.items():
            shape = parameters[place].shape
            if known and name in _SHAPED and isinstance(value, Tensor) and value.shape != shape:
                raise CheckpointError(
                    f"{where}: '{name}' of parameter {place} of optimizer {index} has shape {tuple(value.shape)} "
                    f"there, its parameter {tuple(shape)}."
                )


def check_finite(states: list[Any], names: list[list[str]], third_party: list[bool], where: Path | str) -> None:
    """Raises CheckpointError for the first optimizer state that is not finite, naming its parameter."""
    for index, state in enumerate(states):
        for place, values in state["state"].items():
            for name, value in values.items():
                if _is_bad(value, third_party[index]):
                    raise CheckpointError(
                        f"{where}: '{name}' of the optimizer's state for '{names[index][place]}' is not finite: the "
                        "run had diverged when it was saved; go on from an older checkpoint."
                    )


def check_finite_copy(tensors: Mapping[str, Tensor], names: list[list[str]], third_party: list[bool]) -> None:
    """The same for what is about to be saved, by its names in the file ("0/state/3/exp_avg").

    Raises DivergedError: what was saved before stays the last checkpoint.
    """
    for path, value in tensors.items():
        index, _, rest = path.partition("/")
        place, _, name = rest.removeprefix("state/").partition("/")
        if rest.startswith("state/") and _is_bad(value, third_party[int(index)]):
            raise DivergedError(
                f"'{name}' of the optimizer's state for '{names[int(index)][int(place)]}' is not finite, so this state "
                "is not saved: the run has diverged, and the last checkpoint is kept."
            )


def is_third_party(optimizer: Any) -> bool:
    """Whether an infinite number in its state may be meant: of torch's own optimizers' none is."""
    return not type(optimizer).__module__.startswith("torch.")


def _is_bad(value: Any, may_be_infinite: bool) -> bool:
    if not isinstance(value, Tensor) or not (value.is_floating_point() or value.is_complex()):
        return False
    if may_be_infinite:
        return bool(value.isnan().any())
    return not bool(value.isfinite().all())


def parameter_names(optimizers: list[Any], by_name: Mapping[str, Tensor]) -> list[list[str]]:
    """Of each optimizer the names of its parameters, in the order in which its state numbers them."""
    names = {id(parameter): name for name, parameter in by_name.items()}
    return [
        [names.get(id(parameter), f"parameter {index}") for index, parameter in enumerate(_parameters(optimizer))]
        for optimizer in optimizers
    ]


def _parameters(optimizer: Any) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def optimizer_state(optimizer: Any) -> dict[str, Any]:
    """An optimizer's state_dict, plain enough for a file."""
    if not callable(getattr(optimizer, "state_dict", None)):
        raise CheckpointError(f"{type(optimizer).__name__} has no state_dict(): its state cannot be saved.")
    with kernels.without_compiler():
        state = optimizer.state_dict()
    return {"kind": type(optimizer).__name__, "state": state["state"], "param_groups": state["param_groups"]}
