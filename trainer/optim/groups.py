"""Parameter groups by name pattern: the usual case is no weight decay for norms and biases."""

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from trainer.errors import ConfigError, did_you_mean
from trainer.gradient.parameters import named_parameters
from trainer.settings import CLIPS

_NORMS: tuple[type[nn.Module], ...] = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase)


def parameter_groups(model: Any, groups: Sequence[Mapping[str, Any]] = ()) -> list[dict[str, Any]]:
    """The model's trainable parameters as groups for an optimizer.

    Args:
        model: a module or a plain object.
        groups: each `{"match": pattern or list of patterns, **options}`. A pattern is a parameter's name with
            wildcards (`encoder.*`), or one of the words `norms` (parameters of normalisation layers: torch's, and
            classes whose name ends in Norm) and `biases` (names that end in bias). A parameter belongs to the first
            group that matches it; those that none matches come first, with the optimizer's own options.

    Raises ConfigError for a pattern that matches nothing.
    """
    parameters = {name: p for name, p in named_parameters(model).items() if p.requires_grad}
    if not parameters:
        raise ConfigError(f"the model {type(model).__name__} has no parameter that requires a gradient.")
    rest = dict(parameters)
    made: list[dict[str, Any]] = []
    norms = _of_norms(model)
    if isinstance(groups, Mapping | str):
        raise ConfigError(f"optimizer.groups is a list of groups, not {groups!r}: write [{{match: norms, lr: …}}].")
    for group in groups:
        if not isinstance(group, Mapping):
            raise ConfigError(f"optimizer.groups: {group!r} is no group: write {{match: {group}, lr: …}}.")
        options = dict(group)
        patterns = options.pop("match", None)
        if not patterns:
            raise ConfigError("optimizer.groups: a group has no 'match': name patterns, or the words norms and biases.")
        patterns = list(patterns) if isinstance(patterns, list | tuple) else [patterns]
        chosen: dict[str, Tensor] = {}
        for pattern in patterns:
            found = [name for name, parameter in parameters.items() if _matches(name, parameter, pattern, norms)]
            if not found and pattern not in ("norms", "biases"):
                raise ConfigError(
                    f"optimizer.groups: no parameter that requires a gradient matches '{pattern}': "
                    f"{did_you_mean(str(pattern), parameters)}"
                )
            chosen.update({name: rest.pop(name) for name in found if name in rest})
        if chosen:
            made.append({"params": list(chosen.values()), **options})
    return ([{"params": list(rest.values())}] if rest else []) + made


def check_options(optimizer: Optimizer) -> None:
    """Raises ConfigError for an option of a group that the optimizer does not know: torch would pass over it."""
    known = {*optimizer.defaults, *CLIPS, "params", "param_names", "initial_lr"}
    for group in optimizer.param_groups:
        for option in group:
            if option not in known:
                raise ConfigError(
                    f"optimizer.groups: {type(optimizer).__name__} has no option '{option}': "
                    f"{did_you_mean(option, optimizer.defaults)}"
                )


def _matches(name: str, parameter: Tensor, pattern: str, norms: set[int]) -> bool:
    if pattern == "norms":
        return id(parameter) in norms
    if pattern == "biases":
        return name.rsplit(".", 1)[-1].endswith("bias")
    return fnmatch.fnmatchcase(name, str(pattern))


def _of_norms(model: Any) -> set[int]:
    found = set()
    for module in _modules(model):
        if isinstance(module, _NORMS) or type(module).__name__.endswith("Norm"):
            found |= {id(parameter) for parameter in module.parameters(recurse=False)}
    return found


def _modules(value: Any, nested: bool = False) -> Iterator[nn.Module]:
    """The modules in a model, also those that a plain object holds in attributes, lists and mappings."""
    if isinstance(value, nn.Module):
        yield from value.modules()
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _modules(item, nested=True)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _modules(item, nested=True)
    elif not nested and hasattr(value, "__dict__"):
        yield from _modules(vars(value), nested=True)
