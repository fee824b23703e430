"""Runs as the reference wants them: everything in float64, nothing recomputed, nothing autocast, nothing compiled.

A model may ask for these things itself, deep inside and under any name, so they are switched off where torch does them.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_REAL = (torch.float32, torch.float16, torch.bfloat16)
_COMPLEX = (torch.complex64, torch.complex32)
_CASTS = {Tensor.float, Tensor.half, Tensor.bfloat16}


class Wide(TorchFunctionMode):
    """Inside, whoever asks for a floating-point type gets `dtype` (float64, or float32 where that is all there is).

    A lower type that is asked for is noted in `narrowed`.
    """

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self._dtype = dtype
        self._complex = torch.complex128 if dtype is torch.float64 else torch.complex64
        self._turned = _REAL if dtype is torch.float64 else (torch.float16, torch.bfloat16)
        self.narrowed: set[torch.dtype] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _CASTS:
            self._note({Tensor.float: torch.float32, Tensor.half: torch.float16}.get(func, torch.bfloat16))
            return args[0].to(self._dtype)
        if any(isinstance(one, torch.dtype) for one in args):
            args = tuple(self._turn(one) for one in args)
        if kwargs and any(isinstance(one, torch.dtype) for one in kwargs.values()):
            kwargs = {name: self._turn(one) for name, one in kwargs.items()}
        return func(*args, **kwargs)

    def _note(self, dtype: torch.dtype) -> None:
        if dtype in (torch.float16, torch.bfloat16):
            self.narrowed.add(dtype)

    def _turn(self, one: Any) -> Any:
        if not isinstance(one, torch.dtype):
            return one
        if one in self._turned:
            self._note(one)
            return self._dtype
        return self._complex if one in _COMPLEX else one


@contextmanager
def replaced(holder: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(holder, name)
    setattr(holder, name, value)
    try:
        yield
    finally:
        setattr(holder, name, before)


class Used:
    """Which of torch's devices a run made use of, seen by the patches."""

    def __init__(self) -> None:
        self.names: set[str] = set()


@contextmanager
def without_checkpointing(used: Used | None = None, here: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """torch.utils.checkpoint calls the function and nothing else, in whatever module it was imported by.

    Args:
        here: asked at each call: whether this one is meant.
    """
    from torch.utils import checkpoint

    recomputing, reentrant = checkpoint._checkpoint_without_reentrant_generator, checkpoint.CheckpointFunction

    def is_meant() -> bool:
        if used is not None:
            used.names.add("checkpoint")
        return here()

    def at_once() -> Iterator[None]:
        yield

    def generator(*args: Any, **kwargs: Any) -> Any:
        return at_once() if is_meant() else recomputing(*args, **kwargs)

    class Reentrant:
        @staticmethod
        def apply(function: Any, preserve: Any, *inputs: Any) -> Any:
            return function(*inputs) if is_meant() else reentrant.apply(function, preserve, *inputs)

    with ExitStack() as stack:
        stack.enter_context(replaced(checkpoint, "_checkpoint_without_reentrant_generator", generator))
        stack.enter_context(replaced(checkpoint, "CheckpointFunction", Reentrant))
        yield


@contextmanager
def without_hooks(used: Used | None = None) -> Iterator[None]:
    """Saved-tensor hooks that somebody installs inside do nothing: what forward saves is what backward gets."""

    def enter(self: Any) -> None:
        if used is not None:
            used.names.add("hooks")

    def leave(self: Any, *_: object) -> None:
        return None

    with ExitStack() as stack:
        stack.enter_context(replaced(torch.autograd.graph.saved_tensors_hooks, "__enter__", enter))
        stack.enter_context(replaced(torch.autograd.graph.saved_tensors_hooks, "__exit__", leave))
        yield


@contextmanager
def without_autocast(used: Used | None = None) -> Iterator[None]:
    """Autocast that somebody enters inside does nothing."""

    def enter(self: Any) -> Any:
        if used is not None and self._enabled:
            used.names.add(f"autocast {str(self.fast_dtype).removeprefix('torch.')}")
        return self

    def leave(self: Any, *_: object) -> None:
        return None

    with ExitStack() as stack:
        stack.enter_context(replaced(torch.amp.autocast_mode.autocast, "__enter__", enter))
        stack.enter_context(replaced(torch.amp.autocast_mode.autocast, "__exit__", leave))
        yield


@contextmanager
def noting_autocast(used: Used) -> Iterator[None]:
    """Autocast does what it does, and the type that it casts to is noted."""
    enter = torch.amp.autocast_mode.autocast.__enter__

    def noted(self: Any) -> Any:
        if self._enabled:
            used.names.add(f"autocast {str(self.fast_dtype).removeprefix('torch.')}")
        return enter(self)  # type: ignore[no-untyped-call]

    with replaced(torch.amp.autocast_mode.autocast, "__enter__", noted):
        yield


def without_compiling() -> AbstractContextManager[Any]:
    """What is compiled runs as it was written. Where nothing was compiled so far, nothing is imported for it."""
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


@contextmanager
def as_written(module: Any) -> Iterator[None]:
    """One compiled module runs as it was written."""
    if hasattr(module, "_orig_mod"):
        with replaced(module, "forward", module._orig_mod.forward):
            yield
        return
    with replaced(module, "_compiled_call_impl", None):
        yield


@contextmanager
def cloned_for_backward() -> Iterator[None]:
    """Backward sees what forward saw, also where something is changed in between behind torch's back."""
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.detach().clone(), lambda tensor: tensor)
    with hooks:
        yield


@contextmanager
def plainly(dtype: torch.dtype, used: Used | None = None, clones: bool = True) -> Iterator[Wide]:
    """All of it together, in `dtype`."""
    default = torch.get_default_dtype()
    with ExitStack() as stack:
        stack.enter_context(without_compiling())
        if clones:
            stack.enter_context(cloned_for_backward())  # entered before such hooks are switched off
        stack.enter_context(without_hooks(used))
        stack.enter_context(without_checkpointing(used))
        stack.enter_context(without_autocast(used))
        stack.callback(torch.set_default_dtype, default)
        torch.set_default_dtype(dtype)
        yield stack.enter_context(Wide(dtype))
