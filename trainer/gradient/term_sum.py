"""The sums of one term over one window."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from trainer.gradient.report import Number


@dataclass(slots=True)
class TermSum:
    """One term's sums over the window.

    - `divisor`: what its seeds were divided by; `exact` where that is the whole window's denominator.
    - `kind`: terms of one kind have equal weights in every micro-batch, so one leftover serves them all.
    - `values`: (micro-batch, value, what the value counts) of each micro-batch that weighs something.
    - `apart`: gradients by parameter name, where this term's leftover differs from that of the others.
    - `total`: Σ value × what it counts, over all ranks, once they have summed it; None with one process.
    """

    divisor: Number
    exact: bool
    kind: str
    weight: Number = 0.0
    values: list[tuple[int, Number, Number]] = field(default_factory=list)
    apart: dict[str, Tensor] | None = None
    total: Number | None = None

    def state_dict(self) -> dict[str, Any]:
        return {
            "divisor": float(self.divisor),
            "exact": self.exact,
            "kind": self.kind,
            "weight": float(self.weight),
            "values": [[index, float(value), float(factor)] for index, value, factor in self.values],
            "apart": None if self.apart is None else {name: held.clone() for name, held in self.apart.items()},
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "TermSum":
        apart = state["apart"]
        return cls(
            state["divisor"],
            state["exact"],
            state["kind"],
            state["weight"],
            [(index, value, factor) for index, value, factor in state["values"]],
            None if apart is None else {name: held.clone() for name, held in apart.items()},
        )
