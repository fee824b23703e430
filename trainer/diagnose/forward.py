"""One forward that went wrong, to be run again under a trace."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from trainer import rng
from trainer.diagnose.trace import Trace, storage_of, tensors_in
from trainer.gradient.objective import Objective, terms_of
from trainer.gradient.parameters import named_modules, named_parameters


@dataclass(frozen=True)
class Forward:
    """One forward that went wrong, and how to run it again."""

    model: Any
    objective: Objective
    micro_batch: Any
    parameters: Mapping[str, Tensor]
    """Those under training, by name."""

    def again(self) -> tuple[Trace, list[Tensor]]:
        """The forward under a trace, and what it would differentiate: nothing where it raised."""
        trace, roots = Trace(), []
        with rng.preserved():
            try:
                with trace:
                    answer = self.objective(self.model, self.micro_batch)
                roots = [term.value for term in terms_of(answer, self.objective)]
            except Exception:  # the first run's error is what is explained
                roots = []
        return trace, roots

    def names(self) -> dict[int, str]:
        """What the model holds, by storage."""
        found: dict[int, str] = {}
        for kind, tensors in (("parameter", named_parameters(self.model)), ("buffer", _buffers(self.model))):
            for name, tensor in tensors.items():
                storage = storage_of(tensor)
                if storage is not None:
                    found.setdefault(storage, f"the {kind} '{name}'")
        for index, tensor in enumerate(tensors_in(self.micro_batch)):
            storage = storage_of(tensor)
            if storage is not None:
                found.setdefault(storage, f"tensor {index} of the micro-batch")
        return found


def _buffers(model: Any) -> dict[str, Tensor]:
    return {
        f"{prefix}.{name}" if prefix else name: buffer
        for prefix, module in named_modules(model).items()
        for name, buffer in module.named_buffers(recurse=False)
    }
