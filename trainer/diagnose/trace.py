"""One forward, written down: which tensor was made by what, where, out of which, and what was changed in place.

A function mode sees every call of torch's that the user's code makes, also those that leave no trace in the graph:
detach(), item(), argmax(), what runs under no_grad(). It makes a forward several times slower and keeps every tensor of
it alive, so it looks at one forward, after something went wrong or when it is asked.
"""

import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode, resolve_name

from trainer.diagnose.places import Place, here

# These take a tensor's value out of torch.
_EXITS = {"item", "tolist", "numpy", "__float__", "__int__", "__bool__", "__array__", "__index__", "__complex__"}
# These tell about a tensor, or switch something on it: no value passes.
_SILENT = {
    "shape", "dtype", "device", "requires_grad", "is_leaf", "grad_fn", "grad", "layout", "ndim", "names", "_version",
    "is_sparse", "is_cuda", "is_cpu", "is_mps", "is_meta", "is_quantized", "is_nested", "output_nr", "_base",
    "itemsize", "nbytes", "size", "dim", "numel", "nelement", "stride", "element_size", "storage_offset",
    "is_contiguous", "is_floating_point", "is_complex", "is_inference", "is_same_size", "data_ptr",
    "untyped_storage", "_is_view", "get_device", "register_hook", "retain_grad", "requires_grad_", "is_pinned",
    "is_signed", "type", "__len__", "__hash__", "register_post_accumulate_grad_hook", "is_grad_enabled",
    "is_inference_mode_enabled", "__repr__", "__format__",
}  # fmt: skip


@dataclass(slots=True)
class Call:
    """One call of a function of torch's.

    - `order`: its number in the forward.
    - `inputs`, `outputs`: the tensors that went in and came out.
    - `changed`: what it changed in place, with the version that this left.
    - `nodes`: the graph's nodes that it made, as they were then: a change in place gives a tensor another one.
    - `exits`: whether the value left torch as a number.
    - `modules`: the module calls that it lies in, outermost first: (name, how often it was called before).
    """

    order: int
    name: str
    place: Place | None
    inputs: list[Tensor]
    outputs: list[Tensor]
    changed: list[tuple[Tensor, int]]
    exits: bool
    gradients_on: bool
    modules: tuple[tuple[str, int], ...] = ()
    nodes: list[Any] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.name}() in {self.place}" if self.place else f"{self.name}()"


class Trace(TorchFunctionMode):
    """Enter it around a forward; `calls` is what happened, in order.

    Args:
        modules: by name, to be told in which module's call each call lies; without them that is left out.
    """

    def __init__(self, modules: Mapping[str, nn.Module] | None = None) -> None:
        super().__init__()
        self._names = {id(module): name for name, module in (modules or {}).items()}
        self._inside: list[tuple[str, int]] = []
        self._times: dict[str, int] = {}
        self._hooks: list[Any] = []
        self.calls: list[Call] = []
        self.failed: Call | None = None
        """The call that raised, if one did; its `outputs` are empty."""
        self._makers: dict[int, Call] = {}
        self._entered_by: FrameType | None = None
        self._eager: Any = None
        self._warnings = warnings.catch_warnings()
        self._thread = threading.get_ident()
        self.elsewhere = False
        """Whether a module ran in another thread, whose calls are not seen."""

    def __enter__(self) -> "Trace":
        if "torch._dynamo" in sys.modules:  # what is compiled runs as it is written, or its inside is not seen
            self._eager = torch.compiler.set_stance("force_eager")
        super().__enter__()  # type: ignore[no-untyped-call]
        self._entered_by = sys._getframe(1)
        self._warnings.__enter__()
        warnings.filterwarnings("ignore", "Using `torch.compile.module.` when there are global hooks")
        self._hooks = [register_module_forward_pre_hook(self._entered)]
        if self._names:
            self._hooks.append(register_module_forward_hook(self._left, always_call=True))
        return self

    def __exit__(self, *error: Any) -> None:
        self._entered_by = None
        for hook in self._hooks:
            hook.remove()
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._warnings.__exit__(None, None, None)
        if self._eager is not None:
            self._eager.__exit__(None, None, None)

    def _entered(self, module: nn.Module, _: Any) -> None:
        if threading.get_ident() != self._thread:
            self.elsewhere = True
            return
        name = self._names.get(id(module))
        if name is not None:
            self._inside.append((name, self._times.get(name, 0)))
            self._times[name] = self._times.get(name, 0) + 1

    def _left(self, module: nn.Module, _: Any, __: Any) -> None:
        if id(module) in self._names and self._inside:
            self._inside.pop()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if tells_only(func):
            return func(*args, **kwargs)
        name = name_of(func)
        inputs = [*tensors_in(args), *tensors_in(kwargs)]
        gradients_on, inside = torch.is_grad_enabled(), tuple(self._inside)
        call = Call(len(self.calls), name, here(self._entered_by), inputs, [], [], name in _EXITS, gradients_on, inside)
        before = [tensor._version if not tensor.is_inference() else -1 for tensor in inputs]
        try:
            result = func(*args, **kwargs)
        except BaseException:
            self.failed = call
            raise
        call.outputs = list(tensors_in(result))
        call.changed = [
            (tensor, tensor._version)
            for tensor, version in zip(inputs, before, strict=True)
            if version >= 0 and tensor._version != version
        ]
        call.nodes = [tensor.grad_fn for tensor in call.outputs if tensor.grad_fn is not None]
        self.calls.append(call)
        for tensor in call.outputs:
            self._makers.setdefault(id(tensor), call)
        return result

    def maker(self, tensor: Tensor) -> Call | None:
        """The call that made a tensor of this forward."""
        return self._makers.get(id(tensor))

    def makers(self, nodes: Sequence[Any]) -> dict[Any, Call]:
        """The call that made each node of a graph, of nodes that are given nearest to the roots first.

        One call makes several (linear: a transpose and an addmm); those that no result shows belong to the call of the
        node that leads to them.
        """
        made: dict[Any, Call] = {}
        for call in self.calls:
            for node in call.nodes:
                made.setdefault(node, call)
        for call in self.calls:  # the result of a Function of the user's gets its node when that is over
            for tensor in call.outputs:
                if tensor.grad_fn is not None:
                    made.setdefault(tensor.grad_fn, call)
        for node in nodes:
            for following, _ in node.next_functions if node in made else ():
                if following is not None:
                    made.setdefault(following, made[node])
        return made

    def sharing(self, storage: int) -> list[Tensor]:
        """The tensors of this forward that lie in a storage (its `_cdata`), in the order in which they appeared."""
        found: dict[int, Tensor] = {}
        for call in self.calls:
            for tensor in (*call.inputs, *call.outputs):
                if id(tensor) not in found and storage_of(tensor) == storage:
                    found[id(tensor)] = tensor
        return list(found.values())

    def changes(self, storage: int) -> list[Call]:
        """The calls that changed a storage in place, in order."""
        return [call for call in self.calls if any(storage_of(tensor) == storage for tensor, _ in call.changed)]


def tells_only(func: Callable[..., Any]) -> bool:
    """Whether it tells something about a tensor, and passes no value on."""
    return name_of(func) in _SILENT and func is not torch.autograd.grad


def name_of(func: Callable[..., Any]) -> str:
    """A function's short name: `relu`, `detach`, `data`."""
    full = resolve_name(func) or getattr(func, "__qualname__", None) or getattr(func, "__name__", str(func))
    parts = [part for part in str(full).split(".") if part not in ("__get__", "__set__", "__wrapped__")]
    return parts[-1]


def storage_of(tensor: Tensor) -> int | None:
    """What two tensors share where one is a view of the other."""
    if tensor.layout is not torch.strided:
        return None
    try:
        return int(tensor.untyped_storage()._cdata)
    except (RuntimeError, NotImplementedError):
        return None


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in an argument or a result, lists and mappings included."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple | set):
        yield from _each(value)
    elif isinstance(value, Mapping):
        yield from _each(value.values())


def _each(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        yield from tensors_in(value)
