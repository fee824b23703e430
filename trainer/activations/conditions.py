"""What a recompute would have to find as its forward found it, in words: inputs, attributes, variables, generators."""

import itertools
import random
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trainer.bits import checksum
from trainer.diagnose.trace import tensors_in

_PLAIN = (int, float, complex, str, bool, types.NoneType, itertools.count, itertools.cycle)
_SHOWN = 60


class Bits(int):
    """A checksum among values that can be shown."""


def state_of(modules: Mapping[str, nn.Module], inputs: Any) -> Iterator[tuple[str, Any]]:
    """What a recompute would have to find as forward found it, in words: attributes, parameters, globals, inputs."""
    functions: dict[types.CodeType, types.FunctionType] = {}
    for name, module in modules.items():
        for key, value in {**vars(module), **module._parameters}.items():
            if isinstance(value, _PLAIN):
                yield f"'{name}.{key}'" if name else f"'{key}'", _shown(value)
            elif type(value) in (list, dict, set):
                yield f"the length of '{name}.{key}'" if name else f"the length of '{key}'", len(value)
            elif isinstance(value, Tensor):
                yield f"'{name}.{key}'" if name else f"'{key}'", _bits(value)
        _functions_of(getattr(type(module), "forward", None), functions)
        _functions_of(module.__dict__.get("forward"), functions)
    for function in functions.values():
        for key, value in _read_by(function):
            if (isinstance(value, _PLAIN) and not key.startswith("__")) or type(value) in (list, dict, set):
                yield f"the variable '{key}'", _shown(value)
            elif isinstance(value, Tensor):
                yield f"the variable '{key}'", _bits(value)
    for index, tensor in enumerate(tensors_in(inputs)):
        yield f"its input {index}", _bits(tensor)


def _functions_of(function: Any, found: dict[types.CodeType, types.FunctionType], depth: int = 3) -> None:
    """A function and those of the same module that it calls by name."""
    if not isinstance(function, types.FunctionType) or function.__module__.partition(".")[0] in ("torch", "trainer"):
        return
    if function.__code__ in found or not depth:
        return
    found[function.__code__] = function
    for _, value in _read_by(function):
        _functions_of(value, found, depth - 1)


def _read_by(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    for name in function.__code__.co_names:
        if name in function.__globals__:
            yield name, function.__globals__[name]
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:
            continue


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _bits(tensor: Tensor) -> Bits | str:
    found = checksum(tensor)
    return Bits(int(found)) if not isinstance(found, tuple) else str(found)


def generators_of(modules: Mapping[str, nn.Module]) -> dict[str, tuple[Callable[[], Any], Any]]:
    """The generators that a recompute does not put back: how the state of each is read, and what it is."""
    readers: dict[str, Callable[[], Any]] = {"Python's random": random.getstate}
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        readers["numpy.random"] = lambda: _of_numpy(numpy.random)
    for name, module in modules.items():
        for key, value in vars(module).items():
            read = _reader(value, numpy)
            if read is not None:
                readers[f"the generator '{name}.{key}'" if name else f"the generator '{key}'"] = read
    return {name: (read, read()) for name, read in readers.items()}


def _reader(value: Any, numpy: Any) -> Callable[[], Any] | None:
    if isinstance(value, torch.Generator):
        return lambda: value.get_state().tolist()
    if isinstance(value, random.Random):
        return value.getstate
    if numpy is not None and isinstance(value, numpy.random.Generator):
        return lambda: str(value.bit_generator.state)
    if numpy is not None and isinstance(value, numpy.random.RandomState):
        return lambda: _of_numpy(value)
    return None


def _of_numpy(generator: Any) -> tuple[bytes, int]:
    _, words, position, *_ = generator.get_state()
    return words.tobytes(), position
