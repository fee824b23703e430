"""metrics.jsonl: what happened, one JSON object a line, for reading with anything.

Lines are of four kinds, told apart by "event"; each has all clocks under their own names ("steps": 12, …):

- "step": loss, terms, weight, grad_norm, grad_norm_after, clip_factor, loss_scale (fp16), lr, skipped, reason, seconds
  (since the start), and "window": what it held (micro_batches, rows, tokens), its divisor, the calls of backward and
  the reductions over ranks; "groups" where parameter groups are clipped each by itself
- "skip": the same without seconds
- "found": text, a sentence about the gradient that is said once
- "evaluation": metrics (with the loss as "loss"), evaluated_rows, grad_mode, best, seconds (that it took)

What is not a finite number is null, as JSON has no word for it, and "nonfinite" says which and what it was:
{"loss": null, "nonfinite": {"loss": "nan", "terms.energy": "-inf"}}. All numbers read back exactly.
"""

import json
import math
import os
from pathlib import Path
from typing import Any

from trainer.errors import CheckpointError, ConfigError, TrainerError
from trainer.gradient.report import Report
from trainer.loggers.events import Evaluated, Found, Start, Stop
from trainer.loggers.files import RecordFile, make_folder

NAME = "metrics.jsonl"
PREVIOUS = "metrics.previous.jsonl"

# Made once: json.dumps makes a new encoder for every call with options.
_encode = json.JSONEncoder(allow_nan=False, separators=(",", ":"), default=float).encode


class Metrics:
    """Writes metrics.jsonl into the folder.

    A run that goes on from a checkpoint cuts the file to what happened up to it; one that starts anew puts a file
    that is there aside as metrics.previous.jsonl. Raises CheckpointError where the file cannot be opened, cut or
    written; with `goes_on` what cannot be written is a warning.
    """

    def __init__(self, folder: str | Path, goes_on: bool = False) -> None:
        self.path = Path(folder) / NAME
        self._goes_on = goes_on
        self._file: RecordFile | None = None

    def start(self, event: Start) -> None:
        self._close()
        make_folder(self.path.parent)
        try:
            if any(event.clocks.values()):
                cut(self.path, event.clocks.get("windows", 0), event.evaluated_at)
            elif self.path.exists():
                self.path.replace(self.path.with_name(PREVIOUS))
        except OSError as error:
            raise CheckpointError(
                f"{self.path} cannot be made ready ({error.strerror}): free some space, or choose another folder."
            ) from error
        self._file = RecordFile(self.path, goes_on=self._goes_on)

    def step(self, report: Report, seconds: float) -> None:
        self._write(_facts("step", report) | {"seconds": round(seconds, 6)})

    def evaluate(self, event: Evaluated, model: Any = None) -> None:
        self._write(
            {"event": "evaluation", **event.clocks, "metrics": event.metrics, "evaluated_rows": event.rows}
            | {"grad_mode": event.grad_mode, "best": event.best, "seconds": round(event.seconds, 6)}
        )
        self.flush()

    def skip(self, report: Report) -> None:
        self._write(_facts("skip", report))

    def found(self, event: Found) -> None:
        self._write({"event": "found", **event.clocks, "text": event.text})

    def stop(self, event: Stop) -> None:
        self._close()

    def flush(self) -> None:
        """Write what waits: called before a checkpoint is saved, so that a run that goes on from it misses no line."""
        if self._file is not None:
            self._file.flush()

    def _close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def _write(self, facts: dict[str, Any]) -> None:
        if self._file is None:
            raise TrainerError(f"{self.path} is not open: call start(...) first.")
        try:
            line = _encode(facts)
        except ValueError:  # NaN or infinity
            line = _encode(_finite(facts))
        self._file.write(line.encode() + b"\n")


def cut(path: Path, windows: int, evaluated_at: int | None = None) -> None:
    """Drop the lines after so many windows, and a last line that was torn by a kill: the old file or the new one.

    An evaluation after just so many windows stays where it was the last one (`evaluated_at`): another came after the
    checkpoint was saved, and comes again.

    Raises ConfigError where another line than the last is not JSON, OSError where the disk refuses.
    """
    if not path.exists():
        return
    lines = path.read_bytes().split(b"\n")
    kept = [
        line for number, line in enumerate(lines, 1) if _belongs(line, number, len(lines), path, windows, evaluated_at)
    ]
    text = b"".join(line + b"\n" for line in kept)
    if text == b"\n".join(lines):
        return
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _belongs(line: bytes, number: int, last: int, path: Path, windows: int, evaluated_at: int | None) -> bool:
    if not line:
        return False
    try:
        facts = json.loads(line)
        at = facts.get("windows", 0)
        comes_again = facts.get("event") == "evaluation" and evaluated_at is not None and evaluated_at < at
        return bool(at <= windows and not comes_again)
    except (ValueError, AttributeError, TypeError):
        if number == last:
            return False
        raise ConfigError(
            f"{path}, line {number} is not one of this program's lines: repair it, or move the file away and go on."
        ) from None


def _facts(event: str, report: Report) -> dict[str, Any]:
    return {
        "event": event,
        **report.clocks,
        "loss": report.loss,
        "terms": report.terms,
        "weight": report.weight,
        "grad_norm": report.grad_norm,
        "grad_norm_after": report.grad_norm_after,
        "clip_factor": report.clip_factor,
        "loss_scale": report.loss_scale,
        "lr": report.lr,
        "skipped": report.skipped,
        "reason": report.reason,
        "window": {
            "micro_batches": report.micro_batches,
            "rows": report.rows,
            "tokens": report.tokens,
            "divisor": report.divisor,
            "backward_calls": report.backward_calls,
            "reductions": report.reductions,
        },
        **_groups(report),
        **({"measured": report.measured} if report.measured else {}),
    }


def _groups(report: Report) -> dict[str, Any]:
    """Norm and clip factor of each parameter group that is clipped by itself."""
    factors = report.group_clip_factors
    found = {name: {"grad_norm": n, "clip_factor": factors[name]} for name, n in report.group_norms.items()}
    return {"groups": found} if found else {}


def _finite(facts: dict[str, Any]) -> dict[str, Any]:
    words: dict[str, str] = {}

    def clean(values: dict[str, Any], above: str) -> dict[str, Any]:
        cleaned: dict[str, Any] = {}
        for name, value in values.items():
            if isinstance(value, dict):
                cleaned[name] = clean(value, f"{above}{name}.")
            elif isinstance(value, int | str | None):
                cleaned[name] = value
            elif math.isfinite(value):
                cleaned[name] = float(value)
            else:
                cleaned[name] = None
                words[above + name] = str(float(value))
        return cleaned

    return clean(facts, "") | {"nonfinite": words}
