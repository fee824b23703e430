"""`model.safetensors`, the finished model for everybody; and `init=`, a start from whatever holds parameters."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from trainer import modes
from trainer.checkpoint import folder, foreign, nested, store
from trainer.checkpoint.of_model import load_model, model_state
from trainer.errors import CheckpointError

MODEL = "model.safetensors"


def save_finished_model(path: Path, model: Any, optimizers: Sequence[Any] = ()) -> None:
    """`model.safetensors` under the model's own names, tied parameters once, for use without this package.

    Optimizers that have modes (schedule-free ones) are in eval mode meanwhile: the file holds what they average.
    """
    with modes.averaged(optimizers):
        tensors: dict[str, Tensor] = {}
        seen = set()
        for name, tensor in model_state(model).items():
            place = _place(tensor)
            if place not in seen:
                tensors[name] = _copy(tensor, f"the model's '{name}'")
            if tensor.numel():
                seen.add(place)
    store.replace(path, tensors)


def _copy(tensor: Tensor, where: str) -> Tensor:
    if tensor.is_complex():
        raise CheckpointError(
            f"{where} is complex: a model.safetensors holds real numbers, so keep it as view_as_real."
        )
    return nested.plain(tensor, lambda: where)


def load_start(path: Path, model: Any) -> None:
    """Put the parameters of a checkpoint, of a `model.safetensors` or of a run's folder into the model (`init=PATH`).

    A run's folder means its `model.safetensors`, and where there is none yet its best checkpoint, or its last.
    Numbers of another floating-point dtype become the model's own.
    """
    if path.is_dir() and not folder.is_checkpoint(path):
        path = path / MODEL if (path / MODEL).exists() else folder.best(path) or folder.found(path)
    elif not path.exists():
        path = folder.found(path)
    if path.is_dir():
        load_model(model, store.load_model(path), path, converts=True)
        return
    try:
        with safe_open(path, framework="pt") as file:
            if "trainer" in (file.metadata() or {}):
                raise foreign.of_earlier_version(path)
        state = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}).") from None
    load_model(model, {**_tied(model, state), **state}, path, converts=True)


def _tied(model: Any, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names that stand for a tensor which the file holds under another name."""
    own = model_state(model)
    by_place = {_place(tensor): name for name, tensor in own.items() if name in state and tensor.numel()}
    return {
        name: state[by_place[_place(tensor)]]
        for name, tensor in own.items()
        if name not in state and _place(tensor) in by_place
    }


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Equal for two names of one tensor."""
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
