"""Train and eval modes, of modules and of optimizers that have them too: eval for a while, then as they were."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from trainer.gradient.parameters import named_modules


@contextmanager
def in_eval(model: Any, optimizers: Sequence[Any] = ()) -> Iterator[None]:
    """Modules and optimizers in eval mode; afterwards each submodule's own mode, and every parameter bit for bit."""
    modules = list(named_modules(model).values())
    modes = [(module, module.training) for module in modules]
    inside = {id(child) for module in modules for child in module.children()}
    outermost = [(module, training) for module, training in modes if id(module) not in inside]
    with averaged(optimizers):
        try:
            for module, _ in outermost:
                module.eval()
            yield
        finally:
            for module, training in outermost:
                if training:
                    module.train()  # what a module of the user's does on train() and eval() it does in pairs
            for module, training in modes:
                module.training = training


@contextmanager
def averaged(optimizers: Sequence[Any]) -> Iterator[None]:
    """Optimizers with train() and eval() (schedule-free ones) in eval mode: the parameters are their averages then."""
    with ExitStack() as stack:
        for optimizer in optimizers:
            if has_modes(optimizer) and all(group.get("train_mode") is not False for group in optimizer.param_groups):
                stack.enter_context(_averaged(optimizer))
        yield


@contextmanager
def _averaged(optimizer: Any) -> Iterator[None]:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    # There and back is exact up to rounding only, and looking must not change the run.
    copies = [parameter.detach().clone() for parameter in parameters]
    optimizer.eval()
    try:
        yield
    finally:
        optimizer.train()
        with torch.no_grad():
            for parameter, copy in zip(parameters, copies, strict=True):
                parameter.copy_(copy)


def set_train(model: Any, optimizers: Sequence[Any]) -> list[str]:
    """Train mode for optimizers that have one, and a model that is wholly in eval; mixed modes are taken as meant.

    Returns what the user should know of it.
    """
    for optimizer in optimizers:
        if has_modes(optimizer):
            optimizer.train()
    modules = list(named_modules(model).values())
    if not modules or any(module.training for module in modules):
        return []
    for module in modules:
        module.train()
    return ["the model was wholly in eval mode: it was put in train mode."]


@contextmanager
def in_train(model: Any) -> Iterator[None]:
    """The modes that a run begins with, and afterwards each submodule's own."""
    modes = [(module, module.training) for module in named_modules(model).values()]
    try:
        set_train(model, ())
        yield
    finally:
        for module, training in modes:
            module.training = training


def has_modes(optimizer: Any) -> bool:
    return callable(getattr(optimizer, "eval", None)) and callable(getattr(optimizer, "train", None))
