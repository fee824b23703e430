"""The 1,797 handwritten digits of scikit-learn, 8 x 8 pixels each. trainer train recipe=digits"""

from typing import Any

import torch
from torch import Tensor, nn

from trainer.data import Split
from trainer.errors import ConfigError, DataError, did_you_mean
from trainer.gradient.objective import Sum


def images(held_out: int = 360, seed: int = 0) -> Split:
    """Images of shape (rows, 64) with pixels in [0, 1] and classes of shape (rows,), `held_out` rows for evaluation.

    Which rows are held out depends on `seed` alone, not on the seed of the run. Raises DataError without scikit-learn.
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        if not str(error.name).startswith("sklearn"):
            raise
        raise DataError("the digits come with scikit-learn, which is not here: pip install scikit-learn.") from None
    data = load_digits()
    inputs = torch.tensor(data.data, dtype=torch.float32) / 16
    classes = torch.tensor(data.target, dtype=torch.int64)
    if not 0 < held_out < len(inputs):
        raise DataError(f"held_out={held_out} is not possible: there are {len(inputs)} rows to divide.")
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(seed))
    test, train = order[:held_out], order[held_out:]
    return Split(train=(inputs[train], classes[train]), evaluation=(inputs[test], classes[test]))


ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid, "gelu": nn.GELU}


def mlp(width: int = 128, depth: int = 2, activation: str = "relu") -> nn.Sequential:
    """64 pixels, `depth` hidden layers, ten logits. A Sequential, so that activation checkpointing can cut it.

    Raises ConfigError for an activation that is not one of ACTIVATIONS.
    """
    if activation not in ACTIVATIONS:
        raise ConfigError(f"model.activation={activation} is none of these: {did_you_mean(activation, ACTIVATIONS)}")
    layers: list[nn.Module] = []
    size = 64
    for _ in range(depth):
        layers += [nn.Linear(size, width), ACTIVATIONS[activation]()]
        size = width
    return nn.Sequential(*layers, nn.Linear(size, 10))


def accuracy(model: Any, micro_batch: tuple[Tensor, Tensor]) -> dict[str, Sum]:
    """How many rows get the right class."""
    inputs, classes = micro_batch
    return {"accuracy": Sum((model(inputs).argmax(dim=1) == classes).sum(), len(classes))}
