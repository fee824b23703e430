"""How a checkpoint is stored: a folder of numbers, written beside and given its name when it is whole and on the disk.

    step-000123/manifest.json            the files with their SHA-256, and where the run stood
                state.json               numbers and texts, and the structure around the tensors
                model.safetensors        parameters and buffers under the model's own names
                optimizers.safetensors   the optimizers' states
                rest.safetensors         the other tensors: generators, the open window's gradients
                rank-00001.safetensors   of several ranks: what that one has of its own

The structure comes from the code that loads, only numbers from the files; nothing is ever unpickled.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import Tensor

from trainer import __version__
from trainer.checkpoint import disk, folder, manifest, nested, numbers, strict
from trainer.checkpoint.manifest import Entry, Manifest
from trainer.errors import CheckpointError


@dataclass(frozen=True)
class Label:
    """What the manifest says beside the files."""

    number: int = 0
    clocks: Mapping[str, int] = field(default_factory=dict)
    best: tuple[str, float] | None = None
    world: int = 1


def save(path: Path, state: Mapping[str, Any], label: Label | None = None) -> None:
    """Write a state as the checkpoint `path`, which must not be there yet. Raises CheckpointError."""
    write(path, nested.snapshot(state), label or Label())


def write(path: Path, taken: nested.Snapshot, label: Label) -> None:
    """Write a snapshot as the checkpoint `path`: the whole of it is there afterwards, or nothing.

    Raises CheckpointError with the bytes that it needs and those that are free.
    """
    pending = folder.pending(path)
    try:
        disk.make_folder(path.parent)
        if os.path.lexists(path):
            raise FileExistsError(f"{path.name} is there already")
        disk.begin(pending)
        files = {name: Entry(*disk.write(pending / name, made())) for name, made in taken.files().items()}
        written = Manifest(
            number=label.number,
            clocks=label.clocks,
            best=label.best,
            files=files,
            world=label.world,
            version=__version__,
            time=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        disk.write(pending / manifest.NAME, [written.encoded()])
        disk.sync_folder(pending)
        disk.move(pending, path)
    except OSError as error:
        raise failed(path, error, taken.size) from None
    finally:
        _clear(pending)


def failed(path: Path, error: Exception, size: int) -> CheckpointError:
    """What a save that did not come to its end says."""
    return CheckpointError(
        f"{path} could not be written ({error}): it needs {size} bytes, {disk.free(path.parent)} are free there. What "
        "was saved before is untouched."
    )


def _clear(pending: Path) -> None:
    try:
        if os.path.lexists(pending):
            disk.remove(pending, pending)
    except OSError:
        return  # the next run sweeps it up


def is_same(taken: nested.Snapshot, written: Manifest) -> bool:
    """Whether a checkpoint holds this very snapshot, byte for byte."""
    made = taken.files()
    return list(made) == list(written.files) and all(
        disk.digest(pieces()) == (written.files[name].bytes, written.files[name].sha256)
        for name, pieces in made.items()
    )


def load(path: Path, rank: int | None = None) -> dict[str, Any]:
    """Read what `save` wrote. Raises CheckpointError naming the file that is damaged, or what else it is.

    With a `rank`, what other ranks have of their own is left unread.
    """
    written = _manifest_of(path)
    structure = strict.parsed(
        manifest.content(path, written, manifest.STATE), path / manifest.STATE, manifest.LARGEST_STATE
    )
    tensors = {
        name.removesuffix(".safetensors"): _tensors(path, written, name)
        for name in written.files
        if name != manifest.STATE and not (rank is not None and _is_of_other_rank(name, rank))
    }
    return nested.together(structure, tensors, path / manifest.STATE, rank)


def _is_of_other_rank(name: str, rank: int) -> bool:
    return name.startswith("rank-") and name != f"{nested.stem_of(rank)}.safetensors"


def newest(run: Path) -> tuple[Path | None, dict[str, Any], list[CheckpointError]]:
    """The newest checkpoint of a run's folder that is whole, its state, and what is wrong with those passed over."""
    damaged: list[CheckpointError] = []
    for one in folder.newest_first(run):
        try:
            return one.path, load(one.path), damaged
        except CheckpointError as error:
            damaged.append(error)
    return None, {}, damaged


def _manifest_of(path: Path) -> Manifest:
    if path.is_file():
        raise CheckpointError(
            f"{path} is a file: a checkpoint is a folder with a {manifest.NAME} (trainer state PATH)."
        )
    if not path.is_dir():
        raise CheckpointError(f"{path} is not there: name a checkpoint that exists.")
    if not os.path.lexists(path / manifest.NAME):
        raise CheckpointError(f"{path} is no checkpoint: it has no {manifest.NAME}.")
    return manifest.read(path)


def _tensors(path: Path, written: Manifest, name: str) -> dict[str, Tensor]:
    content = manifest.content(path, written, name)
    try:
        return load_safetensors(content)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError, AssertionError) as error:
        raise CheckpointError(f"{path / name} cannot be read ({error}).") from None


def load_model(path: Path) -> dict[str, Tensor]:
    """Only the parameters and buffers of a checkpoint."""
    state = load(path)
    if not isinstance(state.get("model"), dict):
        raise CheckpointError(f"{path} holds no model: it was not written whole, or by another version.")
    return dict(state["model"])


def replace(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors as a safetensors file in place of another, which stays until the new one is whole."""
    pending = folder.pending(path)
    try:
        disk.make_folder(path.parent)
        disk.write(pending, numbers.pieces(tensors))
        disk.move(pending, path)
    except OSError as error:
        raise failed(path, error, sum(numbers.size_of(tensor) for tensor in tensors.values())) from None
    finally:
        if os.path.lexists(pending):
            disk.discard(pending)
