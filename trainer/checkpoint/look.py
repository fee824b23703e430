"""What a checkpoint or a run's folder holds, verified and in words. No torch here."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trainer.checkpoint import fields, folder, manifest
from trainer.checkpoint.fields import Numbers
from trainer.checkpoint.folder import Listed
from trainer.checkpoint.manifest import Manifest
from trainer.errors import CheckpointError


@dataclass(frozen=True)
class Look:
    """What was found: lines for people, plain values for machines, and what is damaged."""

    lines: list[str]
    values: dict[str, Any]
    errors: list[str]


def look(path: Path) -> Look:
    """Look into a checkpoint, or into all of a run's folder. Raises CheckpointError where there is none."""
    if not folder.is_checkpoint(path):
        if path.name == folder.CHECKPOINTS and path.is_dir():
            path = path.parent
        found = folder.listed(path)
        if found:
            return _run(path, found)
        path = folder.found(path)
    try:
        return _checkpoint(path, manifest.read(path))
    except CheckpointError as error:
        return Look([], {"path": path.as_posix(), "whole": False, "error": str(error)}, [str(error)])


def _checkpoint(path: Path, written: Manifest) -> Look:
    lines = [
        path.as_posix(),
        f"  saved      {written.time}, number {written.number}, by version {written.version}",
        f"  clocks     {_clocks(written)}",
    ]
    if written.best is not None:
        lines.append(f"  best       {written.best[0]} {written.best[1]:.6g}, the best so far when it was saved")
    if written.world != 1:
        lines.append(f"  processes  {written.world}")
    errors = []
    for name, entry in written.files.items():
        try:
            for _ in manifest.pieces(path, written, name):
                pass
            verdict = "whole"
        except CheckpointError as error:
            errors.append(str(error))
            verdict = "damaged"
        lines.append(f"  {name:<24} {entry.bytes:>14,} bytes  {verdict}")
    values = {"path": path.as_posix(), "whole": not errors, "manifest": asdict(written)}
    if errors:
        return Look(lines, {**values, "error": errors[0]}, errors)
    parts = _parts(path, written)
    lines += [f"  {name:<10} {tensors} tensors, {numbers:,} numbers" for name, (tensors, numbers) in parts.items()]
    lines.append(f"whole: {written.size:,} bytes in {len(written.files)} files, each as it was written (SHA-256)")
    sizes = {name: {"tensors": tensors, "numbers": numbers} for name, (tensors, numbers) in parts.items()}
    return Look(lines, {**values, "parts": sizes}, [])


def _parts(path: Path, written: Manifest) -> dict[str, tuple[int, int]]:
    """Tensors and numbers of each part."""
    found: dict[str, tuple[int, int]] = {}
    for name, value in fields.fields(path, written).items():
        if isinstance(value, Numbers):
            part = name.partition("/")[0]
            tensors, numbers = found.get(part, (0, 0))
            found[part] = (tensors + 1, numbers + math.prod(value.shape))
    return found


def _run(run: Path, found: list[Listed]) -> Look:
    last, best = folder.last(run), folder.best(run)
    width = max(len(one.path.name) for one in found)
    lines, errors, values = [run.as_posix()], [], []
    for one in found:
        try:
            if one.manifest is None:
                raise one.error or CheckpointError(f"{one.path} has no manifest.")
            manifest.check(one.path, one.manifest)
            marks = [word for word, path in (("last", last), ("best", best)) if path == one.path]
            verdict = ", ".join(["whole", *marks])
            error = None
        except CheckpointError as problem:
            errors.append(str(problem))
            verdict, error = "damaged", str(problem)
        its = one.manifest
        told = f"{its.time}  {its.size:>14,} bytes  epochs {its.clocks.get('epochs', 0)}" if its is not None else ""
        lines.append(f"  {one.path.name:<{width}}  {told}  {verdict}")
        known = {"manifest": asdict(its)} if its is not None else {}
        values.append({"path": one.path.as_posix(), "whole": error is None, **known, "error": error})
    names = {"last": last and last.as_posix(), "best": best and best.as_posix()}
    return Look(lines, {"path": run.as_posix(), **names, "checkpoints": values}, errors)


def _clocks(written: Manifest) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in written.clocks.items())
