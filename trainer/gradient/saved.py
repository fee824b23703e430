"""The gradients in a step's saved state, by name: copies going out, checked and copied coming in."""

from collections.abc import Mapping

import torch
from torch import Tensor

from trainer.errors import CheckpointError, did_you_mean
from trainer.gradient.narrow import gradient_dtype
from trainer.gradient.zeroing import Aside

Saved = dict[str, Tensor | None]


def save(gradients: Mapping[str, Tensor], zero_grad: str, is_open: bool) -> Saved:
    """What must be kept of `.grad`: all of it in an open window and under `never`.

    Between windows under `zeros` it matters only which parameters have one (None stands for zeros), and under
    `set_to_none` nothing does.
    """
    if is_open or zero_grad == "never":
        return {name: gradient.clone() for name, gradient in gradients.items()}
    return dict.fromkeys(gradients) if zero_grad == "zeros" else {}


def save_aside(aside: Aside, parameters: Mapping[str, Tensor]) -> Saved:
    """What was set aside, for the parameters that had a gradient."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    return {names[id(parameter)]: gradient.clone() for parameter, gradient in aside if gradient is not None}


def check_fit(saved: Mapping[str, Tensor | None], parameters: Mapping[str, Tensor]) -> None:
    """Raises CheckpointError for a gradient of a parameter that is not there or has another shape."""
    for name, gradient in saved.items():
        if name not in parameters:
            raise CheckpointError(
                f"the saved gradient of '{name}' has no parameter here: {did_you_mean(name, parameters)}"
            )
        if gradient is not None and gradient.shape != parameters[name].shape:
            raise CheckpointError(
                f"the saved gradient of '{name}' has shape {tuple(gradient.shape)}, the parameter here "
                f"{tuple(parameters[name].shape)}: load it into the model that it was saved from."
            )


def load(saved: Mapping[str, Tensor | None], parameters: Mapping[str, Tensor]) -> Aside:
    """Each parameter with its saved gradient: zeros where only the name was saved, None where it had none."""
    loaded: Aside = []
    for name, parameter in parameters.items():
        gradient = saved.get(name)
        if gradient is not None:
            gradient = gradient.to(parameter.device, gradient_dtype(parameter), copy=True)
        elif name in saved:
            gradient = torch.zeros_like(parameter, dtype=gradient_dtype(parameter))
        loaded.append((parameter, gradient))
    return loaded
