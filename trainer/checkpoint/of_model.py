"""The model's part of a checkpoint: parameters and buffers by name. What does not fit is named."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainer.errors import CheckpointError, did_you_mean
from trainer.gradient.parameters import named_modules, named_parameters


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


def check_model(model: Any, state: Mapping[str, Tensor], where: Path | str, converts: bool = False) -> None:
    """Raises CheckpointError naming the first tensor that does not fit the model.

    Where `converts`, floating-point numbers of any width fit any other.
    """
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
        if converts and tensor.is_floating_point() and state[name].is_floating_point():
            continue
        if tensor.dtype != state[name].dtype:
            raise CheckpointError(
                f"{where}: '{name}' is {_dtype(state[name])} there and {_dtype(tensor)} in the model: set precision as "
                "it was."
            )


def load_model(model: Any, state: Mapping[str, Tensor], where: Path | str, converts: bool = False) -> None:
    """Put numbers into the model's own tensors. Raises CheckpointError, having changed none, where one does not fit."""
    check_model(model, state, where, converts)
    with torch.no_grad():
        if isinstance(model, nn.Module):
            model.load_state_dict(dict(state))
        else:
            for name, tensor in _of_plain_object(model).items():
                tensor.copy_(state[name])


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
