"""Who holds a tensor: the attribute, the entry of a list, the variable of a closure or of a module."""

import gc
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

_DEEP = 6
_LONG = 10_000


def held_by(roots: Mapping[str, Any], parameters: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that these objects hold, with the words that reach it: `model.cache[3]`.

    Args:
        roots: what to look into, by the name it goes by. Functions are looked into by what they refer to.
        parameters: also the parameters of modules. They hold no graph, and there are many.
    """
    seen: set[int] = set()
    ahead = [(name, value, 0) for name, value in roots.items()]
    while ahead:
        name, value, depth = ahead.pop(0)
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            yield name, value
            continue
        if depth < _DEEP:
            ahead.extend((inner, item, depth + 1) for inner, item in _inside(name, value, parameters))


def named_holder(is_it: Callable[[Tensor], bool], roots: Mapping[str, Any]) -> tuple[str, Tensor] | None:
    """The first of those tensors that fits; where none does, a global variable of any module that holds one."""
    for name, tensor in held_by(roots):
        if is_it(tensor):
            return name, tensor
    for tensor in gc.get_objects():
        if type(tensor) is Tensor and is_it(tensor):
            variable = _global_name(tensor)
            if variable is not None:
                return variable, tensor
    return None


def _inside(name: str, value: Any, parameters: bool) -> Iterator[tuple[str, Any]]:
    if isinstance(value, str | bytes | int | float | type | types.ModuleType):
        return
    if isinstance(value, Mapping):
        for key, item in _first(value.items()):
            yield f"{name}[{key!r}]", item
    elif isinstance(value, list | tuple | set | frozenset):
        for index, item in enumerate(_first(value)):
            yield f"{name}[{index}]", item
    elif isinstance(value, types.FunctionType):
        yield from _of_function(value)
    elif isinstance(value, types.MethodType):
        yield name, value.__self__
        if isinstance(value.__func__, types.FunctionType):
            yield from _of_function(value.__func__)
    elif isinstance(value, nn.Module):
        for key, item in {**value._modules, **value._buffers, **(value._parameters if parameters else {})}.items():
            yield f"{name}.{key}", item
        for key, item in vars(value).items():
            if not key.startswith("_") or not hasattr(nn.Module(), key):
                yield f"{name}.{key}", item
    elif hasattr(value, "__dict__"):
        for key, item in vars(value).items():
            yield f"{name}.{key}", item


def _of_function(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """What a function refers to: the variables around it, the globals that it names, its defaults."""
    code = function.__code__
    for variable, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield variable, cell.cell_contents
        except ValueError:
            continue  # a variable that is not set yet
    for variable in code.co_names:
        if variable in function.__globals__:
            yield variable, function.__globals__[variable]
    for key, item in vars(function).items():
        yield f"{function.__name__}.{key}", item


def _global_name(tensor: Tensor) -> str | None:
    for referrer in gc.get_referrers(tensor):
        if isinstance(referrer, dict) and isinstance(referrer.get("__name__"), str) and "__builtins__" in referrer:
            for key, item in referrer.items():
                if item is tensor:
                    return f"{referrer['__name__']}.{key}"
    return None


def _first(items: Any) -> Iterator[Any]:
    for index, item in enumerate(items):
        if index >= _LONG:
            return
        yield item
