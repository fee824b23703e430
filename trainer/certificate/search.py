"""What breaks a gradient: settings are switched off one by one, then in pairs, and measured again."""

import itertools
import math
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch.utils.checkpoint import set_checkpoint_early_stop

from trainer.activations.sentinel import RecomputeError
from trainer.certificate import compare
from trainer.certificate.certificate import Finding
from trainer.certificate.compare import Floors
from trainer.certificate.lab import Lab, Run
from trainer.certificate.over_ranks import every, told_otherwise
from trainer.certificate.paths import Path
from trainer.certificate.probe import Probe, first_not_finite, first_to_recompute_otherwise
from trainer.certificate.weighed import weighed_otherwise
from trainer.certificate.wide import as_written, without_checkpointing
from trainer.distributed.ranks import Ranks

_RECOMPUTES = {"checkpoint", "activation_checkpointing"}
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
    ranks: Ranks

    def excess(self, run: Run) -> float:
        """By how much the gradient is beyond rounding; 1 or less is agreement."""
        return compare.worst(run.gradient, self.reference.gradient, self.floors)

    def buffer_excess(self, run: Run) -> float:
        return compare.worst(run.buffers, self.reference.buffers, self.buffer_floors) if run.buffers else 0.0

    def reached(self, run: Run) -> bool:
        return every(self.ranks, self.excess(run) <= 1.0 and self.buffer_excess(run) <= 1.0)


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
        error = self._error(run)
        weighed = self._goal.reference.window
        if weighed is not None and (odd := told_otherwise(self._lab.ranks, weighed.weights, error)) is not None:
            return [odd]
        for off in self._smallest_mends():
            # Something changed in place is wrong with and without a recompute: the two are one finding.
            names = [name for name in off if name != "saved" or not set(off) & _RECOMPUTES]
            found += [self._explained(name, error, run, "saved" in off) for name in names]
        if found:
            return list(dict.fromkeys(found))
        if isinstance(run, Run) and not math.isfinite(compare.norm(run.gradient)):
            probe = Probe()
            self.measure(frozenset(), probe)
            reason = "it makes numbers that are infinite or NaN of such that are not, and the reference does not."
            return [Finding("overflow", None, first_not_finite(probe), reason, math.inf)]
        if isinstance(run, Exception):
            return [Finding("error", None, None, f"it raises {type(run).__name__}: {_sentence(run)}", math.inf)]
        return [weighed_otherwise(self._lab, self._path, self._goal.reference, run, self._goal.floors, self._draws)]

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

    def measure(self, off: frozenset[str], probe: Probe | None = None) -> Run | Exception:
        try:
            return self._lab.by(self._path, self._lab.window, off, self._draws, probe)
        except Exception as error:
            return error

    def _error(self, run: Run | Exception) -> float:
        if isinstance(run, Exception):
            return math.inf
        own = compare.error(run.gradient, self._goal.reference.gradient)
        return own if self._goal.excess(run) > 1.0 else compare.error(run.buffers, self._goal.reference.buffers)

    def _explained(self, name: str, error: float, run: Run | Exception, in_place: bool) -> Finding:
        setting = SETTINGS.get(name, name)
        if name in _RECOMPUTES:
            return self._recompute(setting, error, run, in_place)
        if name == "saved":
            return self._changed(None, error, "before backward does, unseen by torch's own check")
        if name == "compile":
            return self._compiled(setting, error)
        if name in ("precision", "autocast", "half"):
            return self._precision(setting, error, run)
        if name == "ranks":
            reason = "the ranks together do not give the gradient of all their rows."
            return Finding("ranks", setting, None, reason, error)
        return Finding("unexplained", setting, None, "with it off, the gradient is right.", error)

    def _recompute(self, setting: str | None, error: float, run: Run | Exception, in_place: bool) -> Finding:
        """Why a recompute is not what its forward was."""
        if isinstance(run, RecomputeError):
            return Finding("recompute", setting, run.module, _sentence(run), error)
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
        module, changed = seen if seen is not None else (self._caller(), [])
        if changed:
            names = ", ".join(f"'{name}'" for name in changed)
            reason = f"{names} was changed in place between its forward and the recompute in backward."
            return Finding("changed", setting, module, reason, error)
        if in_place:
            return self._changed(setting, error, "before the recompute in backward does")
        with_it = self._lab.by(self._path, self._lab.window, draws="neutral")
        without = self._lab.by(self._path, self._lab.window, frozenset(self._names), "neutral")
        if compare.worst(with_it.gradient, without.gradient, self._goal.floors) <= 1.0:
            reason = (
                "the recompute in backward draws other random numbers than the forward did (the RNG is not preserved)."
            )
            return Finding("draws", setting, module, reason, error)
        reason = "computed again in backward, from the same inputs, it comes out otherwise than in forward."
        return Finding("recompute", setting, module, reason, error)

    def _caller(self) -> str | None:
        """The module in whose forward a recompute is asked for that alone, with all others off, is wrong."""
        probe, callers = Probe(), dict[str, None]()

        def note() -> bool:
            callers[probe.inside[-1] if probe.inside else ""] = None
            return False

        with without_checkpointing(None, note):
            self.measure(frozenset(), probe)
        for caller in callers:
            alone = self._only(caller)
            if isinstance(alone, Exception) or not self._goal.reached(alone):
                return caller
        return next(iter(callers), None)

    def _only(self, caller: str) -> Run | Exception:
        """The path with the recomputes of one module alone."""
        probe = Probe()
        with without_checkpointing(None, lambda: probe.inside[-1:] != [caller]):
            return self.measure(frozenset(), probe)

    def _changed(self, setting: str | None, error: float, when: str) -> Finding:
        names = [name for path, name in self._goal.reference.changed.items() if self._is_tensor(path)]
        parameters = [name for name in names if name in self._lab.parameters] or names
        module = parameters[0].rpartition(".")[0] if parameters else None
        what = f"'{parameters[0]}'" if parameters else "a tensor"
        return Finding(
            "changed", setting, module, f"{what} is changed in place after forward used it and {when}.", error
        )

    def _is_tensor(self, path: str) -> bool:
        return any(path == name for name, _ in self._lab.state.tensors())

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

    def _compiled(self, setting: str | None, error: float) -> Finding:
        """Which compiled module, compiled alone, computes something else."""
        modules = [
            (name, module)
            for name, module in self._lab.modules.items()
            if getattr(module, "_compiled_call_impl", None) is not None or hasattr(module, "_orig_mod")
        ]
        guilty = None
        for name, _ in modules:
            with ExitStack() as stack:
                for other, module in modules:
                    if other != name:
                        stack.enter_context(as_written(module))
                alone = self.measure(frozenset())
            if isinstance(alone, Exception) or not self._goal.reached(alone):
                guilty = name
                break
        return Finding("compile", setting, guilty, "compiled, it computes something else than as it is written.", error)


def _sentence(error: Exception) -> str:
    return " ".join(str(error).split())
