"""What a certificate says: the verdict, what breaks the gradient, and the figures behind it."""

from dataclasses import dataclass, field
from typing import Any

from trainer.certificate.compare import Line


@dataclass(frozen=True)
class Finding:
    """One thing that makes the gradient another one.

    - `kind`: one word of KINDS.
    - `setting`: which setting breaks it, by its name in the config; None where no setting does.
    - `module`: the module's name in the model ("" is the model itself); None where it is no module.
    - `reason`: a sentence.
    - `error`: the relative error of the whole gradient (or of the buffer) that it causes.
    """

    kind: str
    setting: str | None
    module: str | None
    reason: str
    error: float = 0.0

    def __str__(self) -> str:
        known = {None: "", "": " in the model itself", "objective": " in the objective"}
        where = known.get(self.module, f" in module '{self.module}'")
        what = "a backward" if self.kind == "function" else "none of the settings"
        return f"{self.setting or what}{where}: {self.reason}"


KINDS = {
    "stochastic": "the same forward, from the same state and the same draws, comes out otherwise",
    "batch_statistics": "a module's output for a row depends on the other rows",
    "cache": "a module or the objective carries something over from one micro-batch to the next",
    "objective": "the objective depends on which rows are together in a micro-batch",
    "weights": "the micro-batches are summed with other weights than they count",
    "backward": "a module's backward depends on which rows are together in a micro-batch",
    "function": "the backward of a custom autograd Function, or of a module that was asked for, is not the derivative",
    "draws": "the recompute of a checkpointed part draws other numbers than its forward did",
    "recompute": "the recompute of a checkpointed part comes out otherwise than its forward did",
    "changed": "something was changed in place between forward and its use in backward",
    "buffers": "the buffers after the window are not those that one forward a micro-batch leaves",
    "underflow": "elements of the gradient became zero, being too small for the type",
    "overflow": "elements of the gradient are infinite or NaN, and those of the reference are not",
    "precision": "the gradient is farther off than the precision explains",
    "compile": "what was compiled computes something else",
    "ranks": "the ranks together do not give the gradient of all their rows",
    "error": "the configured path raises where the reference runs",
    "missing": "parameters get no gradient that they get in the reference",
    "unexplained": "the gradient differs, and switching off every setting does not mend it",
    "nonfinite": "the reference gradient itself is infinite or NaN",
}


@dataclass
class Certificate:
    """The verdict on one window.

    - `findings`: what breaks the gradient, empty where it passed.
    - `audit`: what else is wrong or looks so (parameters without a gradient, losses given what does not go together),
      a sentence each; the gradient may still be the one asked for.
    - `notes`: what the verdict leaves open or assumes, a sentence each.
    - `path`: the configured path against the reference, micro-batch by micro-batch with equal draws, per parameter.
    - `cut`: the reference of the micro-batches against that of the whole batch, per parameter; empty with one of them.
    - `reference`: the type that the reference was computed in: float64, or float32 where that is all that runs.
    - `draws`: the operations that drew random numbers in forward.
    """

    findings: list[Finding] = field(default_factory=list)
    audit: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    path: list[Line] = field(default_factory=list)
    cut: list[Line] = field(default_factory=list)
    error: float = 0.0
    floor: float = 0.0
    cut_error: float = 0.0
    micro_batches: int = 1
    precision: str = "float32"
    reference: str = "float64"
    draws: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return not self.findings

    def verdict(self) -> str:
        """One sentence."""
        if self.findings:
            more = f" (and {len(self.findings) - 1} more)" if len(self.findings) > 1 else ""
            return f"WRONG GRADIENT: {self.findings[0]}{more}"
        held = f"the {self.reference} reference"
        return (
            f"the gradient is the one asked for: {self.error:.1e} from {held}, where rounding in {self.precision} "
            f"explains {self.floor:.1e}."
        )

    def table(self, most: int = 6) -> str:
        """The worst parameters, at most so many of each comparison."""
        head = ("parameter", "relative error", "cosine", "signs", "rounding", "")
        rows = [head]
        for what, lines in (("path", self.path), ("cut", self.cut)):
            for line in lines[:most]:
                beyond = "beyond rounding" if line.excess > 1.0 else ""
                cells = (f"{line.error:.1e}", f"{line.cosine:.6f}", f"{line.signs:.1%}", f"{line.floor:.1e}")
                rows.append((f"{line.name} ({what})", *cells, beyond))
        widths = [max(len(row[index]) for row in rows) for index in range(len(head))]
        made = []
        for row in rows:
            first, *figures, last = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
            made.append("  ".join((first.strip().ljust(widths[0]), *figures, last.strip())).rstrip())
        return "\n".join(made)

    def as_dict(self) -> dict[str, Any]:
        """All of it as plain values, for JSON: infinities and NaN are null."""
        return {
            "passed": self.passed,
            "verdict": self.verdict(),
            "findings": [_plain(one) for one in self.findings],
            "audit": list(self.audit),
            "notes": list(self.notes),
            "micro_batches": self.micro_batches,
            "precision": self.precision,
            "reference": self.reference,
            "draws": list(self.draws),
            "error": _number(self.error),
            "floor": _number(self.floor),
            "cut_error": _number(self.cut_error),
            "path": [_plain(line) for line in self.path],
            "cut": [_plain(line) for line in self.cut],
        }

    def __str__(self) -> str:
        notes = [*self.notes, *self.audit]
        said = [self.table(), *(f"  {note}" for note in notes), *(f"  {one}" for one in self.findings[1:])]
        return "\n".join([*said, self.verdict()])


def _plain(one: Any) -> dict[str, Any]:
    return {name: _number(getattr(one, name)) for name in one.__dataclass_fields__}


def _number(value: Any) -> Any:
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value
