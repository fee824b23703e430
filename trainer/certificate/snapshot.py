"""All that a run of a model can change, held and put back in place: every measurement starts from the same state.

What can be reached from the model, the objective and the loop (attributes, containers, closures, names that their
functions read) is held: tensors with their values and `.grad`, dicts, lists, sets, generators. The objects themselves
stay the same, so what somebody holds on to (tied weights, an objective that reads the model) still holds. For the
reference, floating-point tensors become float64 in place, and afterwards have their own storage again.
"""

import random
import sys
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainer.certificate.reach import Names, inside, is_installed, join

_COMPLEX = {torch.float64: torch.complex128, torch.float32: torch.complex64}
_PLAIN = (str, bytes, int, float, complex, bool, type(None), torch.dtype, torch.device, torch.Size)


@dataclass(slots=True)
class _Held:
    """One object: where it was found, its contents, and how they are put back."""

    path: str
    value: Any
    contents: Any


class Snapshot:
    """The state of everything that can be reached from the roots, as it is now.

    Args:
        roots: by name; the first name may be empty (the model).
    """

    def __init__(self, roots: Sequence[tuple[str, Any]]) -> None:
        self._held: dict[int, _Held] = {}
        todo = deque(reversed(roots))
        while todo:
            path, value = todo.pop()
            if isinstance(value, _PLAIN) or id(value) in self._held:
                continue
            contents, within = _look(value, path)
            if contents is None and not within:
                continue
            self._held[id(value)] = _Held(path, value, contents)
            todo.extend(reversed(within))

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor that was found, by the path to it."""
        for held in self._held.values():
            if isinstance(held.value, Tensor):
                yield held.path, held.value

    def restore(self, where: Callable[[str], bool] | None = None) -> None:
        """Put everything back (or what lies at paths that `where` accepts)."""
        for held in self._held.values():
            if held.contents is not None and (where is None or where(held.path)):
                _put_back(held.value, held.contents)

    def restore_but_gradients(self, where: Callable[[str], bool] | None = None) -> None:
        """The same, with `.grad` left alone: between two micro-batches of one window."""
        gradients = [(tensor, tensor.grad) for _, tensor in self.tensors() if tensor.is_leaf]
        self.restore(where)
        for tensor, gradient in gradients:
            tensor.grad = gradient

    def changed(self) -> dict[str, str]:
        """Where something is no longer as it was held, by the path that it is put back by; gradients do not count."""
        differing = [held for held in self._held.values() if held.contents is not None and _differs(held)]
        return {held.path: _which(held) for held in differing}

    def drew(self) -> bool:
        """Whether a generator of Python's or numpy's that was held has been drawn from."""
        numpy = sys.modules.get("numpy")
        kinds = (random.Random, *((numpy.random.Generator, numpy.random.RandomState) if numpy else ()))
        held = [one for one in self._held.values() if one.contents is not None and isinstance(one.value, kinds)]
        return any(repr(_look(one.value, "")[0]) != repr(one.contents) for one in held)

    @contextmanager
    def kept(self) -> Iterator["Snapshot"]:
        """Whatever happens inside, afterwards everything is as it was held."""
        try:
            yield self
        finally:
            self.restore()

    @contextmanager
    def wide(self, dtype: torch.dtype) -> Iterator[None]:
        """Inside, every floating-point tensor is of this type, and gradients are None; undone by `restore`."""
        for _, tensor in self.tensors():
            if not tensor.is_leaf or tensor.layout is not torch.strided:
                continue
            tensor.grad = None
            wanted = dtype if tensor.is_floating_point() else _COMPLEX[dtype] if tensor.is_complex() else None
            if wanted is not None and tensor.dtype is not wanted:
                tensor.data = tensor.data.to(wanted)
        yield


@dataclass(slots=True)
class _Values:
    """A tensor's storage, what was in it, and its gradient."""

    data: Tensor
    copy: Tensor
    gradient: Tensor | None
    gradient_copy: Tensor | None
    requires_grad: bool


def _look(value: Any, path: str) -> tuple[Any, list[tuple[str, Any]]]:
    """What to hold of an object (None: nothing), and what lies inside it."""
    if isinstance(value, Tensor):
        within = [(path, hook) for hook in (getattr(value, "_backward_hooks", None) or {}).values()]
        extra = vars(value)
        return _values_of(value), [*within, *([(path, extra)] if extra else [])]
    if isinstance(value, dict):
        contents = dict(_plain(value).items(value))
        return contents, [(join(path, key), item) for key, item in contents.items()]
    if isinstance(value, list | deque):
        return list(value), [(join(path, index), item) for index, item in enumerate(value)]
    if isinstance(value, tuple | frozenset):
        return None, [(join(path, index), item) for index, item in enumerate(value)]
    if isinstance(value, set | bytearray):
        return value.copy(), []
    if isinstance(value, torch.Generator):
        return value.get_state(), []
    if isinstance(value, random.Random):
        return (None if isinstance(value, random.SystemRandom) else value.getstate()), []
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        if isinstance(value, numpy.ndarray):
            return value.copy(), []
        if isinstance(value, numpy.random.Generator):
            return value.bit_generator.state, []
        if isinstance(value, numpy.random.RandomState):
            return value.get_state(), []
    if isinstance(value, types.ModuleType | types.BuiltinFunctionType | types.CodeType | types.FrameType):
        return None, []
    if isinstance(value, Names):
        return value.now(), [(join(path, name), item) for name, item in value.now().items()]
    if isinstance(value, types.CellType):
        try:
            return (value.cell_contents,), [(path, value.cell_contents)]
        except ValueError:  # not filled yet
            return None, []
    if isinstance(value, type) and not is_installed(value.__module__):
        return {key: item for key, item in vars(value).items() if not key.startswith("__")}, inside(value, path)
    return None, inside(value, path)


def _plain(value: dict[Any, Any]) -> type[dict[Any, Any]]:
    """The class whose methods read and write a dict as it is, whatever its own class makes of them."""
    return OrderedDict if isinstance(value, OrderedDict) else dict


def _values_of(tensor: Tensor) -> _Values | None:
    if tensor.layout is not torch.strided or not tensor.is_leaf:
        return None
    try:
        data = tensor.data
        gradient = tensor.grad
        copy = None if gradient is None else gradient.detach().clone()
        return _Values(data, data.clone(), gradient, copy, tensor.requires_grad)
    except (RuntimeError, NotImplementedError, ValueError):  # a tensor without storage: meta, fake, lazy
        return None


def _put_back(value: Any, contents: Any) -> None:
    if isinstance(contents, _Values):
        value.grad = None
        value.data = contents.data
        value.requires_grad_(contents.requires_grad)
        contents.data.copy_(contents.copy)
        if contents.gradient is not None and contents.gradient_copy is not None:
            contents.gradient.data.copy_(contents.gradient_copy)
        value.grad = contents.gradient
    elif isinstance(value, dict):
        if _differs_from(value, contents):
            plain = _plain(value)
            plain.clear(value)
            for key, item in contents.items():
                plain.__setitem__(value, key, item)
    elif isinstance(value, list):
        value[:] = contents
    elif isinstance(value, deque):
        value.clear()
        value.extend(contents)
    elif isinstance(value, set):
        value.clear()
        value.update(contents)
    elif isinstance(value, bytearray):
        value[:] = contents
    elif isinstance(value, Names):
        value.put_back(contents)
    elif isinstance(value, types.CellType):
        value.cell_contents = contents[0]
    elif isinstance(value, type):
        for key in [key for key in vars(value) if not key.startswith("__")]:
            if key not in contents:
                delattr(value, key)
        for key, item in contents.items():
            if vars(value).get(key) is not item:
                setattr(value, key, item)
    elif isinstance(value, torch.Generator):
        value.set_state(contents)
    elif isinstance(value, random.Random):
        value.setstate(contents)
    elif hasattr(value, "bit_generator"):
        value.bit_generator.state = contents
    elif hasattr(value, "set_state"):
        value.set_state(contents)
    else:
        value[...] = contents


def _differs(held: _Held) -> bool:
    value, contents = held.value, held.contents
    if isinstance(contents, _Values):
        return bool(value.dtype == contents.copy.dtype and not torch.equal(value.data, contents.copy))
    if isinstance(value, dict):
        return _differs_from(value, contents)
    if isinstance(value, list | deque):
        return len(value) != len(contents) or any(a is not b for a, b in zip(value, contents, strict=True))
    if isinstance(value, set | bytearray):
        return bool(value != contents)
    if isinstance(value, Names):
        return any(value.now().get(name, held) is not item for name, item in contents.items())
    if isinstance(value, types.CellType):
        return value.cell_contents is not contents[0]
    if isinstance(value, type):
        return any(vars(value).get(key, held) is not item for key, item in contents.items())
    return False


def _differs_from(value: dict[Any, Any], contents: dict[Any, Any]) -> bool:
    now = _plain(value).get
    return len(value) != len(contents) or any(now(value, key, contents) is not item for key, item in contents.items())


def _which(held: _Held) -> str:
    """The path of what differs: in an object's attributes, the one that was changed."""
    if isinstance(held.value, type):
        now: Mapping[Any, Any] = vars(held.value)
    elif isinstance(held.value, dict):
        now = held.value
    else:
        return held.path
    keys = [key for key, item in held.contents.items() if now.get(key, held) is not item]
    return join(held.path, keys[0]) if keys else held.path
