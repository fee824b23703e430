"""What a checkpoint holds, one list; and how each part goes back. A checkpoint loads by shape: the structure comes from
the code, only numbers from the file, and what does not fit is named."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file, save_model
from torch import Tensor, nn

from trainer.checkpoint import store
from trainer.errors import CheckpointError, did_you_mean
from trainer.gradient.parameters import named_parameters


def model_state(model: Any) -> dict[str, Tensor]:
    """Parameters and buffers by the model's own names."""
    if not isinstance(model, nn.Module):
        return {name: parameter.detach() for name, parameter in named_parameters(model).items()}
    state = dict(model.state_dict())
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(
                f"the model's state '{name}' is {type(value).__name__}: a checkpoint holds tensors and numbers only, so "
                "return a tensor from get_extra_state."
            )
    return state


def load_model(model: Any, state: Mapping[str, Tensor], where: Path | str) -> None:
    """Put numbers into the model's own tensors. Raises CheckpointError naming the first that does not fit."""
    own = model_state(model)
    missing = [name for name in own if name not in state]
    left_over = [name for name in state if name not in own]
    if missing:
        raise CheckpointError(f"{where} has no '{missing[0]}' ({len(missing)} missing): {did_you_mean(missing[0], state)}")
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
    with torch.no_grad():
        if isinstance(model, nn.Module):
            model.load_state_dict(dict(state))
        else:
            for name, parameter in named_parameters(model).items():
                parameter.copy_(state[name])


def load_optimizers(optimizers: list[Any], states: list[Any], where: Path | str) -> None:
    """Each optimizer's state. Raises CheckpointError where their number or a group does not fit."""
    if len(optimizers) != len(states):
        raise CheckpointError(f"{where} holds {len(states)} optimizers, the run has {len(optimizers)}.")
    for index, (optimizer, state) in enumerate(zip(optimizers, states, strict=True)):
        own = [len(group["params"]) for group in optimizer.param_groups]
        saved = [len(group["params"]) for group in state["param_groups"]]
        if own != saved:
            raise CheckpointError(
                f"{where}: the groups of optimizer {index} hold {saved} parameters there and {own} in the run."
            )
        _check_shapes(optimizer, state, index, where)
        optimizer.load_state_dict(state)


def _check_shapes(optimizer: Any, state: Mapping[str, Any], index: int, where: Path | str) -> None:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for place, values in state["state"].items():
        for name, value in values.items():
            shape = parameters[int(place)].shape
            if isinstance(value, Tensor) and value.dim() and name != "step" and value.shape != shape:
                raise CheckpointError(
                    f"{where}: '{name}' of parameter {place} of optimizer {index} has shape {tuple(value.shape)} there, "
                    f"its parameter {tuple(shape)}."
                )
            if isinstance(value, Tensor) and value.is_floating_point() and not bool(value.isfinite().all()):
                raise CheckpointError(f"{where}: '{name}' of parameter {place} of optimizer {index} is not finite.")


def optimizer_state(optimizer: Any) -> dict[str, Any]:
    """An optimizer's state_dict, plain enough for a file."""
    if not callable(getattr(optimizer, "state_dict", None)):
        raise CheckpointError(f"{type(optimizer).__name__} has no state_dict(): its state cannot be saved.")
    state = optimizer.state_dict()
    groups = [{name: _plain(value) for name, value in group.items()} for group in state["param_groups"]]
    return {"state": state["state"], "param_groups": groups}


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) and value.dim() == 0 and value.device.type == "cpu" else value


def save_finished_model(path: Path, model: Any) -> None:
    """`model.safetensors` under the model's own names, tied parameters once, for use without this package."""
    state = model_state(model)
    size = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    if isinstance(model, nn.Module):
        store.replace(path, lambda file: save_model(model, file), size)
    else:
        tensors = {name: tensor.cpu().contiguous() for name, tensor in state.items()}
        store.replace(path, lambda file: save_file(tensors, file), size)


def load_start(path: Path, model: Any) -> None:
    """Put the parameters of a checkpoint or of a `model.safetensors` into the model (`init=PATH`)."""
    if path.is_dir():
        candidates = [path / name for name in ("model.safetensors", "best.safetensors", "last.safetensors")]
        path = next((one for one in candidates if one.exists()), candidates[0])
    if not path.exists():
        raise CheckpointError(f"{path} is not there: name a checkpoint, a model.safetensors or a run's folder.")
    if store.is_checkpoint(path):
        load_model(model, store.load(path)["model"], path)
        return
    try:
        state = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}).") from None
    load_model(model, {**_tied(model, state), **state}, path)


def _tied(model: Any, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names that stand for a tensor which the file holds under another name."""
    own = model_state(model)
    by_storage = {tensor.data_ptr(): name for name, tensor in own.items() if name in state and tensor.numel()}
    return {
        name: state[by_storage[tensor.data_ptr()]]
        for name, tensor in own.items()
        if name not in state and tensor.data_ptr() in by_storage
    }


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
