"""What breaks a gradient: settings are switched off one by one, then in pairs, and measured again."""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.checkpoint import set_checkpoint_early_stop

from trainer.certificate import compare
from trainer.certificate.certificate import Finding
from trainer.certificate.checkpoints import Checkpoints
from trainer.certificate.compare import Floors
from trainer.certificate.lab import Lab, Run, Watcher
from trainer.certificate.paths import Path
from trainer.certificate.probe import Probe, first_not_finite, first_to_recompute_otherwise

SETTINGS = {
    "checkpoint": "activation_checkpointing",
    "hooks": "saved_tensors_hooks",
    "autocast": "precision",
    "half": "precision",
    "compile": "compile",
    "ranks": "distributed",
    "saved": None,
}
"""The setting's name for what is switched off; what is not here is a setting by that name."""


@dataclass
class Goal:
    """What a path is held against: gradient and buffers of the reference, and what rounding explains of each."""

    reference: Run
    floors: Floors
    buffer_floors: Floors

    def excess(self, run: Run) -> float:
        """By how much the gradient is beyond rounding; 1 or less is agreement."""
        return compare.worst(run.gradient, self.reference.gradient, self.floors)

    def buffer_excess(self, run: Run) -> float:
        return compare.worst(run.buffers, self.reference.buffers, self.buffer_floors) if run.buffers else 0.0

    def reached(self, run: Run) -> bool:
        return self.excess(run) <= 1.0 and self.buffer_excess(run) <= 1.0


class Search:
    """The search for what makes a path differ from the reference of the same micro-batches.

    Args:
        names: what can be switched off.
        draws: how the path draws in every measurement of it.
    """

    def __init__(self, lab: Lab, path: Path, goal: Goal, names: Iterable[str], draws: Any) -> None:
        self._lab, self._path, self._goal, self._draws = lab, path, goal, draws
        self._names = sorted(names)

    def findings(self, run: Run | Exception) -> list[Finding]:
        """What breaks this run of the path."""
        found: list[Finding] = []
        for off in self._smallest_mends():
            error = self._error(run)
            found += [self._explained(name, error, run) for name in off]
        if found:
            return found
        if isinstance(run, Run) and not math.isfinite(compare.norm(run.gradient)):
            probe = Probe()
            self.measure(frozenset(), probe)
            reason = "it makes numbers that are infinite or NaN of such that are not, and the reference does not."
            return [Finding("overflow", None, first_not_finite(probe), reason, math.inf)]
        if isinstance(run, Exception):
            return [Finding("error", None, None, f"it raises {type(run).__name__}: {_sentence(run)}", math.inf)]
        return [_unexplained(run, self._goal, self._lab)]

    def _smallest_mends(self) -> list[tuple[str, ...]]:
        for size in (1, 2, len(self._names)):
            mends = [off for off in itertools.combinations(self._names, size) if self._mends(frozenset(off))]
            if mends:
                return mends
            if size >= len(self._names):
                break
        return []

    def _mends(self, off: frozenset[str]) -> bool:
        run = self.measure(off)
        return isinstance(run, Run) and self._goal.reached(run)

    def measure(self, off: frozenset[str], probe: Watcher | None = None) -> Run | Exception:
        try:
            return self._lab.by(self._path, self._lab.window, off, self._draws, probe)
        except Exception as error:
            return error

    def _error(self, run: Run | Exception) -> float:
        if isinstance(run, Exception):
            return math.inf
        own = compare.error(run.gradient, self._goal.reference.gradient)
        return own if self._goal.excess(run) > 1.0 else compare.error(run.buffers, self._goal.reference.buffers)

    def _explained(self, name: str, error: float, run: Run | Exception) -> Finding:
        setting = SETTINGS.get(name, name)
        if name in ("checkpoint", "activation_checkpointing"):
            return self._recompute(setting, error, run)
        if name == "saved":
            return self._saved(error)
        if name == "compile":
            module = self._module_of(name, lambda: list(self._compiled()))
            return Finding(
                "compile", setting, module, "compiled, it computes something else than as it is written.", error
            )
        if name in ("precision", "autocast", "half"):
            return self._precision(setting, error, run)
        if name == "ranks":
            return Finding(
                "ranks", setting, None, "the ranks together do not give the gradient of all their rows.", error
            )
        return Finding("unexplained", setting, None, "with it off, the gradient is right.", error)

    def _recompute(self, setting: str | None, error: float, run: Run | Exception) -> Finding:
        """Why a recompute is not what its forward was."""
        if isinstance(run, Exception):
            return Finding("changed", setting, None, _sentence(run), error)
        worst = compare.lines(run.buffers, self._goal.reference.buffers, self._goal.buffer_floors)
        if self._goal.excess(run) <= 1.0 and worst:
            owner, _, buffer = worst[0].name.rpartition(".")
            reason = f"its buffer '{buffer}' is changed once more when its part is computed again in backward."
            return Finding("buffers", setting, owner, reason, error)
        probe = Probe(states=True)
        with set_checkpoint_early_stop(False):  # else the recompute of the last module ends before its result is seen
            self.measure(frozenset(), probe)
        seen = first_to_recompute_otherwise(probe)
        module, changed = seen if seen is not None else (self._checkpointing_module(), [])
        if changed:
            names = ", ".join(f"'{name}'" for name in changed)
            reason = f"{names} was changed in place between its forward and the recompute in backward."
            return Finding("changed", setting, module, reason, error)
        plain, off = self._lab.by(self._path, self._lab.window, draws="neutral"), frozenset(self._names)
        other = self._lab.by(self._path, self._lab.window, off, "neutral")
        if compare.worst(plain.gradient, other.gradient, self._goal.floors) <= 1.0:
            reason = (
                "the recompute in backward draws other random numbers than the forward did (the RNG is not preserved)."
            )
            return Finding("draws", setting, module, reason, error)
        reason = "computed again in backward, from the same inputs, it comes out otherwise than in forward."
        return Finding("recompute", setting, module, reason, error)

    def _checkpointing_module(self) -> str | None:
        """The one module without whose own calls of checkpoint the gradient is right."""
        seen = Checkpoints()
        self.measure(frozenset(), seen)
        for name in seen.users:
            run = self.measure(frozenset(), Checkpoints(off=name))
            if isinstance(run, Run) and self._goal.reached(run):
                return name
        return seen.users[0] if len(seen.users) == 1 else None

    def _saved(self, error: float) -> Finding:
        changed = [name for name in self._goal.reference.changed if name in self._lab.parameters]
        module = changed[0].rpartition(".")[0] if changed else None
        what = f"'{changed[0]}'" if changed else "a tensor"
        reason = (
            f"{what} is changed in place after forward used it and before backward does, unseen by torch's own check."
        )
        return Finding("changed", None, module, reason, error)

    def _precision(self, setting: str | None, error: float, run: Run | Exception) -> Finding:
        if isinstance(run, Exception):
            return Finding("error", setting, None, _sentence(run), error)
        lines = compare.lines(run.gradient, self._goal.reference.gradient, self._goal.floors)
        bad = [line for line in lines if line.excess > 1.0]
        if any(math.isinf(line.error) for line in bad):
            owner = next(line.name for line in bad if math.isinf(line.error)).rpartition(".")[0]
            return Finding("overflow", setting, owner, "elements of the gradient are infinite or NaN.", error)
        worst = max(bad, key=lambda line: line.zeros, default=None)
        if worst is not None and worst.zeros > 0.05:
            reason = (
                f"{worst.zeros:.0%} of the elements of '{worst.name}' became zero: too small for the type (underflow)."
            )
            return Finding("underflow", setting, worst.name.rpartition(".")[0], reason, error)
        module = bad[0].name.rpartition(".")[0] if bad else None
        return Finding("precision", setting, module, "the gradient is farther off than the precision explains.", error)

    def _module_of(self, name: str, candidates: Callable[[], Sequence[str]]) -> str | None:
        found = candidates()
        return found[0] if len(found) == 1 else None

    def _compiled(self) -> list[str]:
        return [
            name
            for name, module in self._lab.modules.items()
            if getattr(module, "_compiled_call_impl", None) is not None or hasattr(module, "_orig_mod")
        ]


def _unexplained(run: Run, goal: Goal, lab: Lab) -> Finding:
    error = compare.error(run.gradient, goal.reference.gradient)
    return Finding(
        "unexplained", None, None, "the gradient differs, and switching off every setting does not mend it.", error
    )


def _sentence(error: Exception) -> str:
    return " ".join(str(error).split())
