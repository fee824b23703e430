"""Changes that torch's own check does not see: of what forward saved for backward, through .data or through numpy.

Each saved tensor has a checksum when it is saved and when backward reads it; in a run that would cost too much, so
`trainer check` does it for one micro-batch.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase

from trainer.bits import checksum
from trainer.diagnose.forward import Forward
from trainer.diagnose.trace import Call, Trace, storage_of
from trainer.gradient.objective import terms_of
from trainer.gradient.parameters import named_modules

UNSEEN = "which torch does not see"
"""In every sentence about a saved tensor."""
_SHARED = ("numpy", "__array__")


@dataclass(slots=True)
class _Saved:
    tensor: Tensor
    version: int
    sum: Any
    order: int


class _Keeping(Trace):
    """A trace that keeps what is saved, with a checksum taken when the call that saved it is over."""

    def __init__(self) -> None:
        super().__init__()
        self.saved: list[_Saved] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        before = len(self.saved)
        result = super().__torch_function__(func, types, args, kwargs)
        for one in self.saved[before:]:  # a kernel may count in what it is given (BatchNorm's running mean)
            one.sum = checksum(one.tensor)
        return result

    def pack(self, tensor: Tensor) -> int:
        self.saved.append(_Saved(tensor, tensor._version, checksum(tensor), len(self.calls)))
        return len(self.saved) - 1


def unseen(forward: Forward) -> list[str]:
    """What was changed in ways that torch does not see while this forward and its backward ran, a sentence each."""
    trace = _Keeping()
    names = forward.names()
    parameters = {name: one for name, one in forward.parameters.items() if one.requires_grad}
    before = {name: checksum(one) for name, one in parameters.items()}
    changed: list[_Saved] = []

    def unpack(index: int) -> Tensor:
        one = trace.saved[index]
        if one.tensor._version == one.version and checksum(one.tensor) != one.sum:
            changed.append(one)
        return one.tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(trace.pack, unpack)
    with hooks, trace:
        answer = forward.objective(forward.model, forward.micro_batch)
    moved = [name for name, one in parameters.items() if checksum(one) != before[name]]
    roots = [term.value for term in terms_of(answer, forward.objective) if term.value.requires_grad]
    seeds = [torch.ones_like(root) for root in roots]
    torch.autograd.grad(roots, list(parameters.values()), seeds, allow_unused=True)
    counted = {storage_of(buffer) for module in named_modules(forward.model).values() if isinstance(module, _NormBase)
               for buffer in module.buffers()}  # fmt: skip
    said = [_moved(name, parameters[name], trace) for name in moved]
    said += [_changed(one, names, trace) for one in changed if storage_of(one.tensor) not in counted]
    return list(dict.fromkeys(said))


def _moved(name: str, parameter: Tensor, trace: Trace) -> str:
    by = _by(storage_of(parameter), -1, trace)
    return (
        f"the parameter '{name}' is changed while the forward runs{by}: every micro-batch and every evaluation changes "
        "it then, and a skipped step does not put it back; change it after the step."
    )


def _changed(one: _Saved, names: Mapping[int, str], trace: Trace) -> str:
    storage = storage_of(one.tensor)
    saver = trace.calls[one.order] if one.order < len(trace.calls) else None
    what = names.get(storage or 0)
    if what is None:
        maker = next((call for call in trace.calls if any(storage_of(t) == storage for t in call.outputs)), None)
        what = "a tensor" if maker is None else "its own result" if maker is saver else f"the result of {maker}"
    needs = f"backward of {saver} needs {what} as it was" if saver is not None else f"backward needs {what} as it was"
    return (
        f"{needs}, but it was changed since{_by(storage, one.order, trace)}, {UNSEEN}: write into a new "
        "tensor, or into a clone()."
    )


def _by(storage: int | None, after: int, trace: Trace) -> str:
    """Who changed a storage, where that was seen."""
    if storage is None:
        return ""
    changes: list[Call] = [call for call in trace.changes(storage) if call.order > after]
    if changes:
        return f", by {changes[0]}"
    shared = [
        call for call in trace.calls if call.name in _SHARED and any(storage_of(t) == storage for t in call.inputs)
    ]
    return f", through the array that {shared[0]} gave" if len(shared) == 1 else ""
