"""The operations below autograd, each with a checksum of what it made and the module that it is in."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.bits import checksum
from trainer.diagnose.trace import storage_of, tensors_in

_LIBRARIES = ("mkldnn", "cudnn", "miopen")
_WORDS = {"lift_fresh": "tensor", "_to_copy": "to", "_unsafe_view": "view"}


@dataclass(slots=True, eq=False)
class Operation:
    """One operation; two are equal where they are the same and made the same bits, in whatever module."""

    name: str
    sums: tuple[Any, ...]
    dtypes: tuple[torch.dtype, ...]
    module: str

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Operation) or self.name != other.name or self.dtypes != other.dtypes:
            return False
        return all(bool(one == its) for one, its in zip(self.sums, other.sums, strict=True))

    @property
    def word(self) -> str:
        """Its name as a user wrote it."""
        return _WORDS.get(self.name, self.name.strip("_"))

    @property
    def types(self) -> str:
        return ", ".join(str(one).removeprefix("torch.") for one in self.dtypes)


class Operations(TorchDispatchMode):
    """Tells `see` of every operation inside.

    Args:
        modules: by name in the model; the first is the outermost.
    """

    def __init__(self, modules: Mapping[str, nn.Module], see: Callable[[Operation], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._see = see
        self._names = {id(module): name for name, module in modules.items()}
        self._outermost = next(iter(modules), "")
        self._at: list[str] = []
        self._hooks: list[Any] = []
        self.is_paused = False
        self.opaque: set[int | None] = set()
        """The storages whose bits say nothing."""

    def __enter__(self) -> "Operations":
        self._hooks = [
            register_module_forward_pre_hook(self._entered),
            register_module_forward_hook(self._left, always_call=True),
        ]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for hook in self._hooks:
            hook.remove()

    def _entered(self, module: nn.Module, _: Any) -> None:
        if (name := self._names.get(id(module))) is not None:
            self._at.append(name)

    def _left(self, module: nn.Module, _: Any, __: Any) -> None:
        if id(module) in self._names and self._at:
            self._at.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        # What is in an empty tensor is chance; detach, by which torch keeps what is recomputed, changes nothing.
        if not self.is_paused and name != "detach" and not name.startswith(("empty", "new_empty")):
            made = []
            for one in tensors_in(result):
                # What a kernel leaves for its own backward has gaps between its parts, in which anything may stand.
                if one.dtype is torch.uint8 and any(library in name for library in _LIBRARIES):
                    self.opaque.add(storage_of(one))
                else:
                    made.append(one)
            sums = tuple(checksum(one) for one in made)
            module = self._at[-1] if self._at else self._outermost
            self._see(Operation(name, sums, tuple(one.dtype for one in made), module))
        return result
