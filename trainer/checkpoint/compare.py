"""Two checkpoints, or two runs, bit for bit: the first step and field that differ. No torch here.

The config and the machine are not compared: two runs of one computation may have different ones.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.checkpoint import folder, manifest
from trainer.checkpoint.fields import Field, Numbers, fields, shown
from trainer.errors import CheckpointError

_LINES = "metrics.jsonl"
# What a run takes in time is nobody's state.
_TIMES = ("seconds",)
_NOT_COMPARED = ("config/", "run/machine/")


@dataclass(frozen=True)
class Difference:
    """Where two states part.

    Attributes:
        steps: the step at which they do, None where two checkpoints at different steps were compared.
        field: `model/0.weight`, or `metrics.jsonl: loss` of two runs.
        left, right: what the two have there, in words.
        others: how many more fields differ at that step.
    """

    steps: int | None
    field: str
    left: str
    right: str
    others: int = 0

    def __str__(self) -> str:
        more = f" ({self.others} more differ)" if self.others else ""
        at = f"at step {self.steps}, " if self.steps is not None else ""
        return f"differ {at}in {self.field}: {self.left} and {self.right}{more}"


@dataclass(frozen=True)
class Compared:
    """What was compared, in words, and the first difference, if there is one."""

    what: str
    difference: Difference | None


def compare(left: Path, right: Path) -> Compared:
    """Compare two checkpoints, or two runs at all steps where both have one.

    Raises CheckpointError for what is damaged, and where two runs have no step in common.
    """
    if folder.is_checkpoint(left) or folder.is_checkpoint(right) or not (_saved(left) and _saved(right)):
        one, other = folder.found(left), folder.found(right)
        steps = [manifest.read(path).clocks.get("steps") for path in (one, other)]
        found = difference(one, other, steps[0] if steps[0] == steps[1] else None)
        return Compared(f"{one.as_posix()} and {other.as_posix()}", found)
    return _runs(left, right)


def _saved(run: Path) -> dict[tuple[int, int], Path]:
    """A run's checkpoints by their place (steps, micro-batches); of several at one place the newest."""
    return {
        (one.manifest.clocks.get("steps", 0), one.manifest.clocks.get("micro_batches", 0)): one.path
        for one in folder.listed(run)
        if one.manifest is not None
    }


def _runs(left: Path, right: Path) -> Compared:
    ours, theirs = _saved(left), _saved(right)
    common = sorted(set(ours) & set(theirs))
    logged = _first_line(left / _LINES, right / _LINES)
    if not common and logged is None:
        raise CheckpointError(
            f"{left} has checkpoints at steps {_steps(ours)}, {right} at {_steps(theirs)}: none in common to compare."
        )
    for place in common:
        if logged is not None and logged.steps is not None and logged.steps < place[0]:
            break
        found = difference(ours[place], theirs[place], place[0])
        if found is not None:
            return Compared(f"{left.as_posix()} and {right.as_posix()}", found)
    return Compared(f"{left.as_posix()} and {right.as_posix()} at steps {_steps(dict.fromkeys(common))}", logged)


def _steps(places: dict[tuple[int, int], Any]) -> str:
    return ", ".join(str(steps) for steps, _ in sorted(places)) or "none"


def difference(left: Path, right: Path, steps: int | None) -> Difference | None:
    """The first field in which two checkpoints differ. Raises CheckpointError naming a file that is damaged."""
    ours, theirs = (
        {name: value for name, value in fields(path, manifest.read(path)).items() if not name.startswith(_NOT_COMPARED)}
        for path in (left, right)
    )
    differing = [
        name
        for name in dict.fromkeys([*ours, *theirs])
        if name not in ours or name not in theirs or not _same(ours[name], theirs[name])
    ]
    if not differing:
        return None
    first, others = differing[0], len(differing) - 1
    if first not in ours or first not in theirs:
        left_has, right_has = (shown(side[first]) if first in side else "nothing" for side in (ours, theirs))
        return Difference(steps, first, left_has, right_has, others)
    name, left_has, right_has = _told(first, ours[first], theirs[first])
    return Difference(steps, name, left_has, right_has, others)


def _same(left: Field, right: Field) -> bool:
    if isinstance(left, Numbers) and isinstance(right, Numbers):
        alike = (left.dtype, left.shape) == (right.dtype, right.shape)
        return alike and left.first_difference(right) is None
    if isinstance(left, float) and isinstance(right, float):
        return left.hex() == right.hex()
    return type(left) is type(right) and left == right


def _told(name: str, left: Field, right: Field) -> tuple[str, str, str]:
    if isinstance(left, Numbers) and isinstance(right, Numbers) and str(left) == str(right):
        index = left.first_difference(right)
        if index is not None:
            return f"{name}[{_place(index, left.shape)}]", str(left.at(index)), str(right.at(index))
    return name, shown(left), shown(right)


def _place(index: int, shape: tuple[int, ...]) -> str:
    place: list[int] = []
    for size in reversed(shape):
        index, at = divmod(index, size)
        place.insert(0, at)
    return ", ".join(str(at) for at in place)


def _first_line(left: Path, right: Path) -> Difference | None:
    """The first line of metrics.jsonl that differs where both runs have one."""
    if not (left.is_file() and right.is_file()):
        return None
    with left.open(encoding="utf-8") as one, right.open(encoding="utf-8") as other:
        for number, pair in enumerate(zip(one, other, strict=False), start=1):
            if pair[0] == pair[1]:
                continue
            try:
                ours, theirs = (json.loads(line) for line in pair)
            except ValueError:
                return Difference(None, f"{_LINES} line {number}", pair[0].strip()[:60], pair[1].strip()[:60])
            for name in dict.fromkeys([*ours, *theirs]):
                if name not in _TIMES and ours.get(name) != theirs.get(name):
                    return Difference(
                        ours.get("steps"), f"{_LINES}: {name}", json.dumps(ours.get(name)), json.dumps(theirs.get(name))
                    )
    return None
