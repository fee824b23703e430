"""What a checkpoint holds, one list; and how each part goes back. A checkpoint loads by shape: the structure comes from
the code, only numbers from the file, and what does not fit is named."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from trainer import kernels, modes
from trainer.checkpoint import store
from trainer.errors import CheckpointError, did_you_mean
from trainer.gradient.parameters import named_modules, named_parameters

# States of torch's optimizers that have their parameter's shape; others (a counter, a factored average) have their own.
_SHAPED = {
    "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg", "grad_avg", "acc_delta", "sum", "prev",
    "step_size", "exp_inf", "ax",
}  # fmt: skip


def model_state(model: Any) -> dict[str, Tensor]:
    """Parameters and buffers by the model's own names; of a plain object also the buffers of modules that it holds."""
    if not isinstance(model, nn.Module):
        return {name: tensor.detach() for name, tensor in _of_plain_object(model).items()}
    state = dict(model.state_dict())
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(
                f"the model's state '{name}' is {type(value).__name__}: a checkpoint holds tensors and numbers, so "
                "return a tensor from get_extra_state."
            )
    return state


def _of_plain_object(model: Any) -> dict[str, Tensor]:
    found = named_parameters(model)
    for prefix, module in named_modules(model).items():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                found[f"{prefix}.{name}"] = buffer
    return found


def check_model(model: Any, state: Mapping[str, Tensor], where: Path | str) -> None:
    """Raises CheckpointError naming the first tensor that does not fit the model."""
    own = model_state(model)
    missing = [name for name in own if name not in state]
    left_over = [name for name in state if name not in own]
    if missing:
        raise CheckpointError(
            f"{where} has no '{missing[0]}' ({len(missing)} missing): {did_you_mean(missing[0], state)}"
        )
    if left_over:
        raise CheckpointError(
            f"{where} holds '{left_over[0]}' ({len(left_over)} left over), which the model has not: "
            f"{did_you_mean(left_over[0], own)}"
        )
    for name, tensor in own.items():
        if tensor.shape != state[name].shape:
            raise CheckpointError(
                f"{where}: '{name}' has shape {tuple(state[name].shape)} there and {tuple(tensor.shape)} in the model."
            )
        if tensor.dtype != state[name].dtype:
            raise CheckpointError(
                f"{where}: '{name}' is {_dtype(state[name])} there and {_dtype(tensor)} in the model: set precision as "
                "it was."
            )


def load_model(model: Any, state: Mapping[str, Tensor], where: Path | str) -> None:
    """Put numbers into the model's own tensors. Raises CheckpointError, having changed none, where one does not fit."""
    check_model(model, state, where)
    with torch.no_grad():
        if isinstance(model, nn.Module):
            model.load_state_dict(dict(state))
        else:
            for name, tensor in _of_plain_object(model).items():
                tensor.copy_(state[name])


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
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    known = type(optimizer).__module__.startswith("torch.")
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
            if isinstance(value, Tensor) and value.is_floating_point() and not bool(value.isfinite().all()):
                raise CheckpointError(f"{where}: '{name}' of parameter {place} of optimizer {index} is not finite.")


def optimizer_state(optimizer: Any) -> dict[str, Any]:
    """An optimizer's state_dict, plain enough for a file."""
    if not callable(getattr(optimizer, "state_dict", None)):
        raise CheckpointError(f"{type(optimizer).__name__} has no state_dict(): its state cannot be saved.")
    with kernels.without_compiler():
        state = optimizer.state_dict()
    return {"kind": type(optimizer).__name__, "state": state["state"], "param_groups": state["param_groups"]}


def save_finished_model(path: Path, model: Any, optimizers: Sequence[Any] = ()) -> None:
    """`model.safetensors` under the model's own names, tied parameters once, for use without this package.

    Optimizers that have modes (schedule-free ones) are in eval mode meanwhile: the file holds what they average.
    """
    with modes.averaged(optimizers):
        tensors: dict[str, Tensor] = {}
        seen = set()
        for name, tensor in model_state(model).items():
            place = _place(tensor)
            if place not in seen:
                tensors[name] = tensor.detach().to("cpu", copy=True).contiguous()
            if tensor.numel():
                seen.add(place)
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    store.replace(path, lambda file: save_file(tensors, file, metadata={"format": "pt"}), size)


def load_start(path: Path, model: Any) -> None:
    """Put the parameters of a checkpoint or of a `model.safetensors` into the model (`init=PATH`)."""
    if path.is_dir():
        candidates = [path / name for name in ("model.safetensors", "best.safetensors", "last.safetensors")]
        path = next((one for one in candidates if one.exists()), candidates[0])
    if not path.exists():
        raise CheckpointError(f"{path} is not there: name a checkpoint, a model.safetensors or a run's folder.")
    if store.is_checkpoint(path):
        state = store.load(path)
        if not isinstance(state.get("model"), dict):
            raise CheckpointError(f"{path} holds no model: it was not written whole, or by another version.")
        load_model(model, state["model"], path)
        return
    try:
        state = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}).") from None
    load_model(model, {**_tied(model, state), **state}, path)


def _tied(model: Any, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names that stand for a tensor which the file holds under another name."""
    own = model_state(model)
    by_place = {_place(tensor): name for name, tensor in own.items() if name in state and tensor.numel()}
    return {
        name: state[by_place[_place(tensor)]]
        for name, tensor in own.items()
        if name not in state and _place(tensor) in by_place
    }


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Equal for two names of one tensor."""
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
