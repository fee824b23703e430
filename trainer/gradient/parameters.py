"""The parameters of a model by name, whatever the model is: an nn.Module or a plain object that holds leaf tensors."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from trainer.errors import ConfigError
from trainer.gradient.narrow import Narrow, of_model


def named_parameters(model: Any) -> dict[str, Tensor]:
    """Parameters by the names that the model gives them, each once.

    Of a plain object: the tensors that it holds (in attributes, lists, mappings, modules) which are leaves and
    require a gradient.
    """
    if isinstance(model, nn.Module):
        return dict(model.named_parameters())
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in _held(model, ""):
        if isinstance(value, nn.Module):
            inside: list[tuple[str, Tensor]] = [(f"{name}.{inner}", p) for inner, p in value.named_parameters()]
        else:
            inside = [(name, value)] if value.requires_grad and value.is_leaf else []
        for inner, tensor in inside:
            if id(tensor) not in seen:
                seen.add(id(tensor))
                found[inner] = tensor
    return found


def named_modules(model: Any) -> dict[str, nn.Module]:
    """Every module by name, each once: an nn.Module's own, or those that a plain object holds."""
    if isinstance(model, nn.Module):
        return dict(model.named_modules())
    found: dict[str, nn.Module] = {}
    seen: set[int] = set()
    for name, value in _held(model, ""):
        if isinstance(value, nn.Module):
            for inner, module in value.named_modules():
                if id(module) not in seen:
                    seen.add(id(module))
                    found[f"{name}.{inner}" if inner else name] = module
    return found


def _held(value: Any, name: str) -> Iterator[tuple[str, Tensor | nn.Module]]:
    """The tensors and the outermost modules in a plain object, by name."""
    if isinstance(value, nn.Module | Tensor):
        yield name, value
        return
    if isinstance(value, Mapping):
        items = [(str(key), item) for key, item in value.items()]
    elif isinstance(value, list | tuple):
        items = [(str(index), item) for index, item in enumerate(value)]
    elif not name and hasattr(value, "__dict__"):
        items = list(vars(value).items())
    else:
        return
    for key, item in items:
        yield from _held(item, f"{name}.{key}" if name else key)


def named_for(model: Any, optimizers: Sequence[Optimizer]) -> dict[str, Tensor]:
    """The optimizers' parameters by name; one that the model does not hold is named by its place in its group.

    Raises ConfigError where two optimizers hold the same parameter: it would be moved twice.
    """
    names = {id(parameter): name for name, parameter in named_parameters(model).items()}
    found: dict[str, Tensor] = {}
    owner: dict[int, int] = {}
    for index, optimizer in enumerate(optimizers):
        for number, group in enumerate(optimizer.param_groups):
            for place, parameter in enumerate(map(of_model, group["params"])):
                name = names.get(id(parameter), f"optimizer{index}.group{number}.{place}")
                if owner.setdefault(id(parameter), index) != index:
                    raise ConfigError(
                        f"the parameter '{name}' is in optimizer {owner[id(parameter)]} and in optimizer {index}: "
                        "give each parameter to one optimizer."
                    )
                found[name] = parameter
    if not found:
        raise ConfigError("the optimizer holds no parameters: build it from those of the model.")
    return found


class Trained:
    """The parameters under training: those of the optimizers, by name, and their gradients."""

    def __init__(self, model: Any, optimizers: Sequence[Optimizer], narrow: Narrow | None = None) -> None:
        self._model = model
        self._narrow = narrow
        self._optimizers = optimizers
        self._size = -1
        self._limited = False
        self.by_name: dict[str, Tensor] = {}
        self.inputs: tuple[Tensor, ...] = ()
        """What backward is limited to; empty where it may reach everything."""
        self.refresh()

    def refresh(self) -> None:
        """Look again where a group was added. Costs nothing else, so it comes with every window."""
        size = 0
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                size += len(group["params"])
        if size != self._size:
            self._size = size
            if self._narrow is not None:
                self._narrow.take(self._optimizers)
            self.by_name = named_for(self._model, self._optimizers)
            own = {id(parameter) for parameter in self.by_name.values()}
            others = named_parameters(self._model).values()
            self._limited = any(id(parameter) not in own for parameter in others if parameter.requires_grad)
            self.inputs = ()
        if self._limited:
            self.inputs = tuple(parameter for parameter in self.by_name.values() if parameter.requires_grad)

    def gradients(self) -> dict[str, Tensor]:
        """The gradients that there are, by name; sparse ones coalesced, as their values are changed in place."""
        found = {}
        for name, parameter in self.by_name.items():
            gradient = parameter.grad
            if gradient is None:
                continue
            if gradient.layout is not torch.strided and not gradient.is_coalesced():
                gradient = parameter.grad = gradient.coalesce()
            found[name] = gradient
        return found
