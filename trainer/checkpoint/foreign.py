"""What lies in a folder and is somebody's checkpoint, but none that this version can go on from. No torch here."""

import json
import os
from pathlib import Path

from trainer.errors import CheckpointError

MODEL = "model.safetensors"
_HEADER = 1 << 24  # bytes of a safetensors header that are looked at
_PICKLED = (".ckpt", ".pt", ".pth", ".bin")


def beside(run: Path, must_be: bool) -> str | None:
    """What to say of a run's folder that holds no checkpoint, before the run begins anew in it.

    Raises CheckpointError for a checkpoint of an earlier version, and where there has to be one (`must_be`).
    """
    inside = [path for folder in (run, run / "checkpoints") for path in _inside(folder)]
    for path in inside:
        if is_earlier(path):
            raise of_earlier_version(path)
    found = ((path, kind(path)) for path in inside if path.name != MODEL)
    other = next((f"{path} is {what}" for path, what in found if what is not None), None)
    if must_be:
        raise CheckpointError(
            f"{run} holds no checkpoint to go on from{f' ({other})' if other else ''}: name the run (run=NAME) or a "
            "checkpoint (resume=PATH), or begin anew (resume=auto)."
        )
    if other is None and (run / MODEL).is_file():
        other = f"{run / MODEL} is there"
    return None if other is None else f"{other}, but there is no checkpoint to go on from: the run begins anew."


def refuse(path: Path) -> None:
    """Raises CheckpointError that says what a path is, where it is a checkpoint of an earlier version or of another
    program."""
    for one in [path, *_inside(path)]:
        if is_earlier(one):
            raise of_earlier_version(one)
    if (what := kind(path)) is not None:
        raise CheckpointError(f"{path} cannot be gone on from: it is {what}.")


def is_earlier(path: Path) -> bool:
    """Whether it is a checkpoint of an earlier version of this package: one file, marked in its header."""
    if path.suffix != ".safetensors":
        return False
    try:
        with path.open("rb") as file:
            header = file.read(min(int.from_bytes(file.read(8), "little"), _HEADER))
        return "trainer" in json.loads(header).get("__metadata__", {})
    except (OSError, ValueError, AttributeError, TypeError):
        return False


def of_earlier_version(path: Path) -> CheckpointError:
    """The sentence for it."""
    return CheckpointError(
        f"{path} is a checkpoint of an earlier version, which was one file: this version reads folders, so go on with "
        "the version that wrote it, or move the file away and train again."
    )


def kind(path: Path) -> str | None:
    """What another program's checkpoint is, in words, and what of it can be used here."""
    if path.is_dir():
        if (path / "trainer_state.json").is_file():
            return f"a checkpoint of Hugging Face's Trainer (its parameters: init={path / MODEL})"
        if (path / "config.json").is_file() and any(name.endswith(".safetensors") for name in os.listdir(path)):
            return f"a Hugging Face model, no run of this program (its parameters: recipe=finetune model.path={path})"
        if (path / ".metadata").is_file() and any(name.endswith(".distcp") for name in os.listdir(path)):
            return "a checkpoint of torch.distributed.checkpoint"
    elif path.is_file() and path.suffix in _PICKLED:
        return "a pickled file of another program (save its state_dict with safetensors for init=FILE)"
    elif path.is_file() and path.suffix == ".safetensors":
        return f"a file of parameters, which holds no state of a run (init={path} takes them)"
    return None


def _inside(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []
