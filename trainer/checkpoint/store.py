"""How a checkpoint is stored: one safetensors file of numbers, written beside and renamed.

The tensors are in the file's body by path ("model/0.weight"); numbers, texts and the structure around them are JSON in
its header. Nothing is ever unpickled.
"""

import json
import math
import os
import shutil
import stat
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from trainer.errors import CheckpointError

FORMAT = 1
_TENSOR, _COMPLEX = "tensor", "complex"


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a nested state of tensors, numbers, texts, None, lists and string-keyed mappings.

    Either the whole new file is there afterwards or what was there before. Raises CheckpointError.
    """
    tensors: dict[str, Tensor] = {}
    structure = _taken_apart(state, "", tensors)
    header = {"trainer": json.dumps({"format": FORMAT, "state": structure})}
    replace(path, lambda file: save_file(tensors, file, metadata=header), _bytes_of(tensors))


def load(path: Path) -> dict[str, Any]:
    """Read what `save` wrote. Raises CheckpointError naming the file where it is damaged or something else."""
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if "trainer" not in header:
                raise CheckpointError(
                    f"{path} is no checkpoint of this trainer: it holds tensors without a run's state."
                )
            # Copies: what is read is a view of the mapped file, which Windows could not replace while it is in use.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a mapping)
        document = json.loads(header["trainer"])
        if document["format"] != FORMAT:
            raise CheckpointError(f"{path} has format {document['format']}; this version reads format {FORMAT}.")
        state: dict[str, Any] = dict(_put_together(document["state"], tensors, path))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is not there: name a checkpoint that exists.") from None
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} cannot be read as a checkpoint ({error}): it is damaged or no checkpoint."
        ) from None
    return state


def replace(path: Path, write: Any, size: int) -> None:
    """Let `write(temporary name)` make a file, and put it in place of `path` only when it is whole and on the disk."""
    temporary = str(path.parent / f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        mode = _usual_mode(temporary)
        write(temporary)
        os.chmod(temporary, mode)  # safetensors makes a file that only its owner can read
        _sync(temporary)
        os.replace(temporary, path)
        _sync(str(path.parent))
    except (OSError, SafetensorError, ValueError, KeyError) as error:  # the latter two: a tensor that it cannot hold
        raise CheckpointError(
            f"{path} could not be written ({error}): it needs {size} bytes, {_free(path.parent)} are free there. What "
            "was saved before is untouched."
        ) from None
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def _usual_mode(path: str) -> int:
    """The permissions that a new file gets here."""
    handle = os.open(path, os.O_CREAT | os.O_WRONLY, 0o666)
    try:
        return stat.S_IMODE(os.fstat(handle).st_mode)
    finally:
        os.close(handle)


def _sync(path: str) -> None:
    try:
        handle = os.open(path, os.O_RDONLY if os.path.isdir(path) else os.O_RDWR)  # Windows syncs what is open to write
    except OSError:
        if os.path.isdir(path):
            return  # Windows opens no directory, and needs no sync of it
        raise
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _free(folder: Path) -> str:
    try:
        return str(shutil.disk_usage(folder).free)
    except OSError:
        return "an unknown number"


def _bytes_of(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _taken_apart(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        if value.layout is not torch.strided:
            raise CheckpointError(
                f"the state at '{path}' is a tensor of layout {str(value.layout).removeprefix('torch.')}: a checkpoint "
                "holds dense ones only, so keep it as its indices and values, or to_dense()."
            )
        while path in tensors:  # a key may itself hold a slash
            path += "'"
        # A copy of its own: a file holds no views, and two names may stand for one tensor.
        copy = value.detach().to("cpu", copy=True).resolve_conj().resolve_neg().contiguous()
        if copy.is_complex():  # safetensors knows complex64 only
            tensors[path] = torch.view_as_real(copy)
            return {_COMPLEX: path}
        tensors[path] = copy
        return {_TENSOR: path}
    if isinstance(value, dict):
        if not all(isinstance(key, str | int) and not isinstance(key, bool) for key in value):
            raise CheckpointError(
                f"the state at '{path}' has keys that are neither texts nor numbers: it cannot be saved."
            )
        items = [
            [key, _taken_apart(item, f"{path}/{key}" if path else str(key), tensors)] for key, item in value.items()
        ]
        return {"mapping": items}
    if isinstance(value, list | tuple):
        items = [
            _taken_apart(item, f"{path}/{index}" if path else str(index), tensors) for index, item in enumerate(value)
        ]
        return {"tuple" if isinstance(value, tuple) else "list": items}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise CheckpointError(
        f"the state at '{path}' is {type(value).__name__}: a checkpoint holds tensors, numbers and texts only."
    )


def _put_together(value: Any, tensors: dict[str, Tensor], path: Path) -> Any:
    if not isinstance(value, dict):
        return value
    if len(value) != 1:
        raise CheckpointError(f"{path} is damaged: its header holds something unknown.")
    kind, content = next(iter(value.items()))
    if kind not in (_TENSOR, _COMPLEX, "mapping", "list", "tuple", "float"):
        raise CheckpointError(f"{path} is damaged: its header holds something unknown ('{kind}').")
    if kind in (_TENSOR, _COMPLEX):
        if content not in tensors:
            raise CheckpointError(f"{path} is damaged: the tensor '{content}' is missing.")
        return tensors[content] if kind == _TENSOR else torch.view_as_complex(tensors[content])
    if kind == "float":
        return float(content)
    if kind == "mapping":
        return {key: _put_together(item, tensors, path) for key, item in content}
    items = [_put_together(item, tensors, path) for item in content]
    return tuple(items) if kind == "tuple" else items


def is_checkpoint(path: Path) -> bool:
    """Whether a safetensors file is a run's state, rather than a bare model."""
    try:
        with safe_open(path, framework="pt") as file:
            return "trainer" in (file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}).") from None
