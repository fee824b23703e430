"""The rows with the largest gradients: what is labelled wrongly, or is like no other row, tends to be among them."""

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from trainer import modes, rng
from trainer.data.rows import rows_at
from trainer.data.sources import source_of
from trainer.diagnose.row_gradients import RowGradients
from trainer.errors import ConfigError
from trainer.gradient.objective import Supervised, as_objective
from trainer.gradient.parameters import named_modules, named_parameters
from trainer.gradient.skips import KeptBuffers
from trainer.gradient.weigher import Weigher
from trainer.settings import DataSettings


@dataclass(frozen=True)
class Row:
    """One row: its number in the data, the norm of its gradient, its loss.

    `target` and `answer`: of a classifier, the row's class and the one that the model takes it for.
    """

    number: int
    norm: float
    loss: float
    target: int | None = None
    answer: int | None = None


@dataclass(frozen=True)
class PerSample:
    """The norm of each row's gradient and each row's loss, in the data's order, and the rows with the largest norms."""

    norms: Tensor
    losses: Tensor
    largest: list[Row]
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """As plain values, for JSON: what is not finite is null."""
        rows = [{name: _finite(value) for name, value in asdict(row).items()} for row in self.largest]
        return {"rows": len(self.norms), "median": _finite(self._median()), "largest": rows, "notes": self.notes}

    def __str__(self) -> str:
        has_classes = any(row.target is not None for row in self.largest)
        lines = [("row", "gradient", "loss", *(("class", "taken for") if has_classes else ()))]
        for row in self.largest:
            cells = (f"{row.number:,}", f"{row.norm:.4g}", f"{row.loss:.4g}")
            lines.append((*cells, str(row.target), str(row.answer)) if has_classes else cells)
        widths = [max(len(line[index]) for line in lines) for index in range(len(lines[0]))]
        table = [
            "  " + "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines
        ]
        last = f"of {len(self.norms):,} rows, whose median gradient is {self._median():.4g}"
        return "\n".join([*table, last, *self.notes])

    def _median(self) -> float:
        return float(self.norms.nanmedian()) if len(self.norms) else math.nan


def per_sample(
    model: Any,
    objective: Callable[[Any, Any], Any],
    data: Any,
    *,
    most: int = 20,
    batch_size: int = 32,
    parameters: Mapping[str, Tensor] | None = None,
    coefficients: Mapping[str, float] | None = None,
    count_rows: Callable[[Any], int] | None = None,
) -> PerSample:
    """The norm of every row's gradient, with the model in eval mode (so without dropout). Nothing is changed.

    Args:
        data: what `Trainer` takes as data, in its own order, or a list of micro-batches.
        most: so many rows are listed.
        batch_size: rows of a micro-batch, where the data is not cut already.
        parameters: those whose gradient counts, by name; None: all that require one.
        coefficients: factors of named terms.
        count_rows: rows of a micro-batch, where the first dimension of its first tensor is not that.

    Raises ConfigError for a model with BatchNorm in train mode, where no row has a gradient of its own.
    """
    for name, module in named_modules(model).items():
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            raise ConfigError(
                f"a row has no gradient of its own here, as '{name}' ({type(module).__name__}) makes each row's output "
                "of the others too: use GroupNorm or LayerNorm, or put that module in eval mode for good (frozen)."
            )
    if most < 1:
        raise ConfigError(f"most={most} rows are none: ask for one or more.")
    objective = as_objective(objective, model)
    weigher = Weigher(objective, count_rows)
    source = (
        data if hasattr(data, "micro_batches") else source_of(data, DataSettings(batch_size=batch_size, shuffle=False))
    )
    own = named_parameters(model) if parameters is None else parameters
    gradients = RowGradients(model, objective, own, coefficients or {}, weigher)
    norms, losses, largest = [torch.zeros(0)], [torch.zeros(0)], list[Row]()
    number = 0
    buffers = KeptBuffers(model)
    buffers.keep()
    with rng.preserved(), modes.in_eval(model), torch.enable_grad(), ExitStack() as stack:
        stack.callback(buffers.put_back)
        for micro_batch in source.micro_batches(0, 0, 0):
            found, values = gradients(micro_batch)
            weightless = _without_weight(objective, micro_batch, found + values, weigher)
            found[weightless], values[weightless] = 0.0, 0.0
            norms.append(found)
            losses.append(values)
            least = _order(largest[-1].norm) if len(largest) == most else -1.0
            first = found.nan_to_num(nan=math.inf).topk(min(most, len(found))).indices
            top = [int(i) for i in first if _order(float(found[i])) > least]
            classes = _classes(model, objective, micro_batch, top, weigher) if top else []
            new = [
                Row(number + i, float(found[i]), float(values[i]), *pair) for i, pair in zip(top, classes, strict=True)
            ]
            largest = sorted([*largest, *new], key=lambda row: -_order(row.norm))[:most]
            number += len(found)
    notes = list(gradients.notes)
    if not source.owns_order:
        notes.append("rows are numbered as they came this time: their order is the data's own")
    return PerSample(torch.cat(norms), torch.cat(losses), largest, notes)


def _order(norm: float) -> float:
    """What is no number comes first: it is what one wants to see."""
    return math.inf if math.isnan(norm) else norm


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _without_weight(objective: Any, micro_batch: Any, found: Tensor, weigher: Weigher) -> list[int]:
    """Rows of which nothing counts (their targets are ignored): a mean over nothing is 0 / 0."""
    if not isinstance(objective, Supervised):
        return []
    rows = found.isnan().nonzero().flatten().tolist()
    count = len(found)
    return [row for row in rows if not float(weigher.mean_weight("", rows_at(micro_batch, [row], count)))]


def _classes(
    model: Any, objective: Any, micro_batch: Any, rows: list[int], weigher: Weigher
) -> list[tuple[int, int] | tuple[()]]:
    """Of a classifier: (the row's class, the class that the model takes it for)."""
    nothing: list[tuple[int, int] | tuple[()]] = [() for _ in rows]
    if not isinstance(objective, Supervised) or not isinstance(micro_batch, list | tuple):
        return nothing
    inputs, targets = rows_at(micro_batch, rows, weigher.rows(micro_batch))
    if not isinstance(targets, Tensor) or targets.dim() != 1 or targets.is_floating_point():
        return nothing
    with torch.no_grad():
        outputs = model(inputs) if callable(model) else model.forward(inputs)
    if not isinstance(outputs, Tensor) or outputs.dim() != 2 or outputs.shape[1] < 2:
        return nothing
    return list(zip(targets.tolist(), outputs.argmax(dim=1).tolist(), strict=True))
