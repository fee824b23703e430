"""A window as it was before its step, kept in a folder so that it can be run again: `trainer replay PATH`.

It is stored as a checkpoint is (`trainer.checkpoint.store`): numbers and texts only, each file checked against a
manifest before it is read, and there whole or not at all.

Nothing has to be kept for it while all is well. A step that was skipped has left the parameters bit for bit as they
were and put the buffers back; the micro-batches are still there; only the generators before the window's first forward
have to be known, and `trainer.feed` holds those anyway, as far as windows draw from them.
"""

import dataclasses
from collections import namedtuple
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from trainer.checkpoint import changes, folder, numbers, store
from trainer.checkpoint.of_model import model_state
from trainer.checkpoint.store import Label
from trainer.diagnose.trace import tensors_in
from trainer.errors import CheckpointError
from trainer.gradient.parameters import named_modules, named_parameters
from trainer.step import Step

_HOLDS = "captured window"
_MIB = 1 << 20


@dataclass(frozen=True)
class Captured:
    """One window and all that its forward and backward depend on.

    - `model`: parameters and buffers, as a checkpoint has them; `buffers`: those that it leaves out.
    - `window`: the micro-batches, of tensors, numbers and texts in lists, tuples and mappings.
    - `fields`: of each micro-batch that was a named tuple, the names; None for the others.
    - `why`: the reason of the skip, or that it was asked for.
    - `loss_scale`, `expected`: what the seeds of backward follow from beside the window's own weights.
    - `in_eval`, `frozen`, `trained`: modules in eval mode, parameters that require no gradient, those of the optimizer.
    - `generators`: before the first forward (`rng.capture`); None where nobody has kept them. `unknown`: those that
      could not be told.
    - `rows`: the data's row numbers of each micro-batch, where they are known.
    - `config`: what the run was made from, and every setting of its gradient.
    """

    model: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor]
    window: Sequence[Any]
    fields: Sequence[Sequence[str] | None]
    why: str
    precision: str
    loss_scale: float
    expected: Mapping[str, float]
    clocks: Mapping[str, int]
    in_eval: Sequence[str]
    frozen: Sequence[str]
    trained: Sequence[str]
    generators: Mapping[str, Any] | None
    unknown: Sequence[str]
    rows: Sequence[Tensor] | None
    config: Mapping[str, Any]
    gradient: Mapping[str, Any]
    machine: Mapping[str, Any]
    rank: int = 0
    world_size: int = 1
    path: Path | None = field(default=None, compare=False)

    def micro_batches(self) -> list[Any]:
        """The window as the objective gets it."""
        return [_named(one, names) for one, names in zip(self.window, self.fields, strict=True)]

    @property
    def size(self) -> int:
        """Bytes of its tensors."""
        return sum(numbers.size_of(one) for one in tensors_in([self.model, self.buffers, self.window, self.generators]))

    def save(self, path: Path) -> None:
        """Write it as the folder `path`. Raises CheckpointError for what cannot be held, and for a full disk."""
        state = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "path"}
        store.save(path, {"holds": _HOLDS, **state}, Label(clocks=dict(self.clocks), world=self.world_size))


def capture(
    step: Step,
    window: Sequence[Any],
    path: str | Path | None = None,
    *,
    why: str = "it was asked for",
    generators: Mapping[str, Any] | None = None,
    unknown: Sequence[str] = (),
    loss_scale: float | None = None,
    rows: Sequence[Tensor] | None = None,
    config: Mapping[str, Any] | None = None,
) -> Captured:
    """Catch a window before its step, or after one that was skipped, and write it to the folder `path`.

    Args:
        generators: the random generators before the window's first forward (`trainer.rng.capture()`).
        loss_scale: what backward's seeds were multiplied with; by default what the step has now.

    Raises CheckpointError, having written nothing, for what a file of numbers cannot hold.
    """
    model = step.model
    parameters = named_parameters(model)
    saved = model_state(model)
    made = Captured(
        model=saved,
        buffers={name: buffer for name, buffer in buffers_of(model).items() if name not in saved},
        window=list(window),
        fields=[list(one._fields) if hasattr(one, "_fields") else None for one in window],
        why=why,
        precision=step.precision,
        loss_scale=float(step._scale.value) if loss_scale is None else loss_scale,
        expected={name: float(weight) for name, weight in step._expected.items()},
        clocks=step.clocks.as_dict(),
        in_eval=[name for name, module in named_modules(model).items() if not module.training],
        frozen=[name for name, parameter in parameters.items() if not parameter.requires_grad],
        trained=list(step.parameters.by_name),
        generators=generators,
        unknown=list(unknown),
        rows=None if rows is None else list(rows),
        config=dict(config or {}),
        gradient=dataclasses.asdict(step.settings),
        machine=changes.machine(step.device),
        rank=step.ranks.rank,
        world_size=step.ranks.world_size,
    )
    if path is None:
        return made
    made.save(Path(path))
    return dataclasses.replace(made, path=Path(path))


def _named(value: Any, names: Sequence[str] | None) -> Any:
    if names is None:
        return value
    try:
        return namedtuple("MicroBatch", names)(*value)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"a micro-batch of the captured window cannot be put together ({error}).") from None


def buffers_of(model: Any) -> dict[str, Tensor]:
    """Every buffer by name, also those that a checkpoint leaves out."""
    if isinstance(model, nn.Module):
        return dict(model.named_buffers())
    return {
        f"{prefix}.{name}": buffer
        for prefix, module in named_modules(model).items()
        for name, buffer in module.named_buffers(recurse=False)
    }


def in_mib(size: int) -> str:
    return f"{size / _MIB:,.1f} MiB"


def captured(run: Path) -> list[Path]:
    """The captured windows of a run's folder, the first one first."""
    return [path for path in folder.inside(run / folder.CAPTURED) if path.name.startswith("window-") and path.is_dir()]


def load(path: str | Path) -> Captured:
    """Read a captured window; of a run's folder its first one, as later ones often follow from it.

    Raises CheckpointError that names the file where it is damaged, or says what else is there.
    """
    path = Path(path)
    if not folder.is_checkpoint(path):
        inside = captured(path.parent if path.name == folder.CAPTURED else path)
        if not inside:
            what = "holds no captured window" if path.is_dir() else "is not there"
            raise CheckpointError(
                f"{path} {what}: name a folder that is in {folder.CAPTURED}/ of a run's folder, where windows whose "
                "loss or gradient is not finite are kept (diagnose.capture)."
            )
        path = inside[0]
    state = store.load(path)
    if state.pop("holds", None) != _HOLDS:
        raise CheckpointError(
            f"{path} is a checkpoint and no captured window: those are in {folder.CAPTURED}/ of a run's folder."
        )
    for name in sorted({*_KINDS, *state}):
        if name not in state or not isinstance(state[name], _KINDS.get(name, ())):
            raise CheckpointError(f"{path} holds no captured window that this version writes (look at '{name}').")
    return Captured(**state, path=path)


_MAPPINGS = ("model", "buffers", "expected", "clocks", "config", "gradient", "machine")
_LISTS = ("window", "fields", "in_eval", "frozen", "trained", "unknown")
_KINDS: dict[str, Any] = {
    **dict.fromkeys(_MAPPINGS, dict),
    **dict.fromkeys(_LISTS, list),
    **dict.fromkeys(("why", "precision"), str),
    **dict.fromkeys(("rank", "world_size"), int),
    "loss_scale": float,
    "generators": (dict, type(None)),
    "rows": (list, type(None)),
}
"""What each part is once it is read."""
