"""The checkpoints of a run: their names, which one is last or best, which are kept. No torch here.

They lie in `checkpoints/` of the run's folder as `step-000123`, and `step-000123-2` where a second one was saved at the
same step. Which is the newest their manifests say, and no link or pointer that could be stale or that Windows lacks.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.checkpoint import disk, foreign, manifest
from trainer.checkpoint.manifest import Manifest
from trainer.errors import CheckpointError

CHECKPOINTS = "checkpoints"
CAPTURED = "captured"
"""Windows that were captured (`trainer.diagnose.capture`), each stored as a checkpoint is."""
_NAME = re.compile(r"step-(\d{6,})(-\d+)?")
# What a save or a removal that was cut off leaves: the process that made it is in the name.
_LEFT = re.compile(r"\..+\.\d+\.(part|gone)")


@dataclass(frozen=True)
class Listed:
    """A checkpoint that was found: its manifest, or why that cannot be read."""

    path: Path
    manifest: Manifest | None
    error: CheckpointError | None = None


def listed(run: Path) -> list[Listed]:
    """The checkpoints of a run's folder, the oldest first; before them those whose manifest cannot be read."""
    found = []
    for path in inside(run / CHECKPOINTS):
        if _NAME.fullmatch(path.name) and path.is_dir():
            try:
                found.append(Listed(path, manifest.read(path)))
            except CheckpointError as error:
                found.append(Listed(path, None, error))
    return sorted(found, key=lambda one: (one.manifest.number if one.manifest else -1, one.path.name))


def inside(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def newest_first(run: Path) -> list[Listed]:
    """What to try when a run goes on: the newest first; those whose manifest cannot be read come before all."""
    found = listed(run)
    broken = [one for one in found if one.manifest is None]
    return [*reversed(broken), *reversed(found[len(broken) :])]


def best(run: Path) -> Path | None:
    """The best checkpoint: the newest of those that were the best so far when they were saved."""
    found = [one.path for one in listed(run) if one.manifest is not None and one.manifest.best is not None]
    return found[-1] if found else None


def last(run: Path) -> Path | None:
    """The newest checkpoint whose manifest can be read; its other files are checked when they are read."""
    found = [one.path for one in listed(run) if one.manifest is not None]
    return found[-1] if found else None


def is_checkpoint(path: Path) -> bool:
    """Whether a folder is one checkpoint, whole or not, rather than a run's folder."""
    return os.path.lexists(path / manifest.NAME) or (path.is_dir() and os.path.lexists(path / manifest.STATE))


def found(path: Path) -> Path:
    """The checkpoint that a path means: itself; a run's last; RUN/last or RUN/best. Raises CheckpointError."""
    if is_checkpoint(path):
        return path
    run = path.parent if path.name in ("last", "best") and not path.exists() else path
    run = run.parent if run.name == CHECKPOINTS else run
    which = best(run) if path.name == "best" else last(run)
    if which is not None:
        return which
    broken = [one.error for one in listed(run) if one.error is not None]
    if broken:
        raise broken[-1]
    if not path.exists() and run == path:
        raise CheckpointError(f"{path} is not there: name a checkpoint or a run's folder.")
    foreign.refuse(path)
    raise CheckpointError(
        f"{run} holds no {'best ' if path.name == 'best' else ''}checkpoint: name one, or a run's folder."
    )


def unused(run: Path, steps: int) -> Path:
    """A path for the next checkpoint at this step."""
    return unused_in(run / CHECKPOINTS, f"step-{steps:06d}")


def unused_in(folder: Path, name: str) -> Path:
    """A path in the folder: the name, or with -2, -3, … behind it where it is taken."""
    path = folder / name
    count = 1
    while os.path.lexists(path):
        count += 1
        path = folder / f"{name}-{count}"
    return path


def put_aside(run: Path) -> bool:
    """Rename `checkpoints/` to `checkpoints.previous`, or -2, -3, … behind it, and `captured/` in the same way.

    Returns whether there was a checkpoint.
    """
    _put_aside(run, CAPTURED)
    return _put_aside(run, CHECKPOINTS)


def _put_aside(run: Path, name: str) -> bool:
    if not inside(run / name):
        return False
    (run / name).rename(unused_in(run, f"{name}.previous"))
    disk.sync_folder(run)
    return True


def check_way(run: Path) -> None:
    """Raises CheckpointError where a file has the checkpoints' name, or a folder the finished model's."""
    for path, is_folder in ((run / CHECKPOINTS, True), (run / foreign.MODEL, False)):
        if os.path.lexists(path) and path.is_dir() != is_folder:
            wanted = "a folder for the checkpoints" if is_folder else "a file for the finished model"
            raise CheckpointError(
                f"{path} is in the way, as {wanted} of that name is to be written: move it away, or give the run "
                "another folder (run=NAME)."
            )


def pending(path: Path) -> Path:
    """Where a file or folder is written before it has its name."""
    return path.with_name(f".{path.name}.{os.getpid()}.part")


def kept(found: Sequence[Listed], last: int | None, best: int, every: int | None, clock: str) -> set[Path]:
    """Which checkpoints stay.

    Args:
        found: all of them, the oldest first. One whose manifest cannot be read is not judged, and stays.
        last: how many of the newest stay (None: all), each at another place in the data.
        best: how many stay of those that were the best when they were saved.
        every: of each so many ticks of the clock, the first checkpoint at or after it stays.
        clock: its name.
    """
    readable = [(one.path, one.manifest) for one in found if one.manifest is not None]
    stay = {one.path for one in found if one.manifest is None}
    # Of several at one place in the data (saved, then evaluated, then saved again) the newest counts.
    of_place = {its.clocks.get("micro_batches", its.number): (path, its) for path, its in readable}
    places = sorted(of_place.values(), key=lambda pair: pair[1].number)
    stay |= {path for path, _ in (readable if last is None else places[-last:])}
    if best:
        stay |= {path for path, its in [pair for pair in readable if pair[1].best is not None][-best:]}
    if every is not None:
        reached = 0
        for path, its in places:
            multiple = its.clocks.get(clock, 0) // every
            if multiple > reached:
                stay.add(path)
            reached = max(reached, multiple)
    return stay


def prune(run: Path, stay: set[Path]) -> None:
    """Remove the checkpoints that need not stay."""
    for one in listed(run):
        if one.path not in stay:
            disk.remove(one.path, one.path.with_name(f".{one.path.name}.{os.getpid()}.gone"))


def sweep(run: Path) -> list[Path]:
    """Remove what saves that were cut off have left. Only for the one that holds the run's lock.

    Returns what was removed. It is ours for sure, or it stays: the name is one that only a save gives, and nothing but
    a checkpoint's files is inside.
    """
    removed = []
    for path in [*inside(run), *inside(run / CHECKPOINTS), *inside(run / CAPTURED)]:
        if not _LEFT.fullmatch(path.name) or path.is_symlink():
            continue
        try:
            if path.parent == run:
                if path.name.startswith(".model.safetensors.") and path.is_file():
                    disk.discard(path)
                    removed.append(path)
            elif path.is_dir() and all(_is_ours(inside) for inside in path.iterdir()):
                disk.remove(path, path)
                removed.append(path)
        except OSError:
            continue  # a leftover does no harm but take room
    return removed


def _is_ours(path: Path) -> bool:
    named = path.name == manifest.NAME or manifest.FILES.fullmatch(path.name) is not None
    return named and path.is_file() and not path.is_symlink()
