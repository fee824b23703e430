"""The examination of one window: what is measured, in which order, and what follows from it."""

import contextlib
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from trainer.certificate import compare
from trainer.certificate.batches import NotJoinableError, halves, joined
from trainer.certificate.certificate import Certificate, Finding
from trainer.certificate.compare import UNIT, Floors
from trainer.certificate.cut import explain_cut, explain_stochastic
from trainer.certificate.draws import Kind
from trainer.certificate.lab import Lab, Run
from trainer.certificate.over_ranks import agreed, every, replicas
from trainer.certificate.paths import LoopPath, Path
from trainer.certificate.search import Goal, Search
from trainer.errors import TrainerError

_PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


def examine(lab: Lab, path: Path, precision: str) -> Certificate:
    """Hold a path against the reference. Raises what the user's own code raises in both."""
    certificate = _Examination(lab, path, precision).certificate()
    certificate.findings = agreed(lab.ranks, certificate.findings)
    return certificate


class _Examination:
    def __init__(self, lab: Lab, path: Path, precision: str) -> None:
        self._lab, self._path, self._precision = lab, path, precision
        self._said = Certificate(micro_batches=len(lab.window))

    def certificate(self) -> Certificate:
        said, lab = self._said, self._lab
        odd = replicas(lab.ranks, lab.parameters)
        if odd is not None:
            said.findings.append(odd)
            return said
        run = self._try(lambda: lab.by(self._path, lab.window))
        while isinstance(run, Run) and not _finite(run) and self._path.back_off():
            run = self._try(lambda: lab.by(self._path, lab.window))
        reference = self._reference(run)
        said.reference = _name(self._lab.dtype)
        said.draws = sorted(reference.drawn)
        if not every(lab.ranks, _finite(reference)):
            said.findings.append(
                Finding("nonfinite", None, None, "the reference gradient itself is not finite.", math.inf)
            )
            return said
        again = lab.reference(lab.window, self._lab.dtype)
        # Of what no state explains a whole window may come round to where it was: then single micro-batches show it.
        pairs = [
            (reference, again),
            *itertools.pairwise(lab.reference(lab.window[:1], self._lab.dtype) for _ in range(3)),
        ]
        for one, other in pairs:
            if not every(lab.ranks, self._alike(one, other)):
                said.findings.append(explain_stochastic(lab, self._lab.dtype, one, other))
                return said
        neutral = reference
        if reference.drew_elsewhere:
            said.draws.append("python or numpy")
        if said.draws:
            said.notes.append(
                f"forward draws ({', '.join(said.draws)}): held equal where the micro-batches are, and at their mean "
                "where they are cut otherwise."
            )
            neutral = lab.reference(lab.window, self._lab.dtype, "neutral")
        unit = self._unit(reference, run)
        self._hold_path(run, reference, neutral, unit)
        self._hold_cut(neutral, min(unit, UNIT[torch.float32]), reference.drew_elsewhere)
        return said

    def _reference(self, run: Run | Exception) -> Run:
        lab = self._lab
        try:
            return lab.reference(lab.window, torch.float64)
        except Exception as error:  # an assertion on a type, say
            if lab.clones and "saved tensor hooks" in str(error):
                lab.clones = False
                return self._reference(run)
            self._lab.dtype = torch.float32
            try:
                found = lab.reference(lab.window, torch.float32)
            except Exception:
                raise (run if isinstance(run, Exception) else error) from None
            self._said.notes.append(
                f"the reference is in float32, as float64 does not run here ({_first_line(error)})."
            )
            return found

    def _unit(self, reference: Run, run: Run | Exception) -> float:
        """The unit roundoff of the narrowest type that the path computes in, as far as was seen."""
        types = {_PRECISIONS[self._precision], *(p.dtype for p in self._lab.parameters.values()), *reference.narrowed}
        used = reference.used | (run.used if isinstance(run, Run) else set())
        types |= {getattr(torch, name.split()[1]) for name in used if name.startswith("autocast")}
        units = {UNIT[one]: one for one in types if one in UNIT}
        if self._precision == "fp64" and len(units) == 1:
            units = {UNIT[torch.float64]: torch.float64}
        elif set(units.values()) != {torch.float64}:
            units.pop(UNIT[torch.float64], None)
        unit = max(units)
        self._said.precision = _name(units[unit])
        return unit

    def _floors(
        self, reference: Run, draws: Any, unit: float, window: Sequence[Any], times: int, share: float
    ) -> tuple[Floors, Floors]:
        """What rounding explains of the gradient and of the buffers."""
        lab = self._lab
        narrow = reference
        if self._lab.dtype is torch.float64:
            # Where types are mixed, all of it in float32 need not run; then what the shakes move is the floor.
            with contextlib.suppress(RuntimeError):
                narrow = lab.reference(window, torch.float32, draws)
        shaken = [lab.reference(window, self._lab.dtype, draws, shake=(share, seed)) for seed in range(times)]
        made = []
        for which in ("gradient", "buffers"):
            own = getattr(reference, which)
            others = [getattr(one, which) for one in shaken]
            made.append(compare.floors(own, getattr(narrow, which), others, unit))
        return made[0], made[1]

    def _hold_path(self, run: Run | Exception, reference: Run, neutral: Run, unit: float) -> None:
        said, lab = self._said, self._lab
        draws: Kind | None = None
        if reference.drawn and not (self._path.takes_draws and lab.ranks.world_size == 1):
            draws, reference = "neutral", neutral
            run = self._try(lambda: lab.by(self._path, lab.window, draws=draws))
        how: Kind = draws or "equal"
        goal = Goal(reference, *self._floors(reference, how, unit, lab.window, 2, unit), lab.ranks)
        self._add_rounding(goal)
        if isinstance(run, Run) and not goal.reached(run):
            # A second look before an alarm: the drawn noise of a run may be larger than that of two others.
            wider = self._floors(
                reference, how, unit, lab.window, 16, max(unit, compare.norm_floor(goal.floors, reference.gradient))
            )
            larger = _larger(goal.floors, wider[0]), _larger(goal.buffer_floors, wider[1])
            goal = Goal(reference, *larger, lab.ranks)
            self._add_rounding(goal)
        if isinstance(run, Run) and not goal.reached(run) and reference.drawn and draws is None:
            equal = self._try(lambda: lab.by(self._path, lab.window, draws="equal"))
            if isinstance(equal, Run) and goal.reached(equal):
                run = equal
        if isinstance(run, Run):
            said.path = compare.lines(run.gradient, reference.gradient, goal.floors)
            said.error = compare.error(run.gradient, reference.gradient)
        said.floor = compare.norm_floor(goal.floors, reference.gradient)
        if isinstance(run, Exception) or not goal.reached(run):
            names = {*self._path.settings, *self._switched_on(reference, run)}
            said.findings += Search(lab, self._path, goal, names, draws).findings(run)

    def _switched_on(self, reference: Run, run: Run | Exception) -> set[str]:
        """What the model, or somebody else's loop, was seen to switch on itself; of a loop not everything is seen."""
        found = {name.split()[0] for name in reference.used}
        if isinstance(self._path, LoopPath):
            found |= {"checkpoint", *(name.split()[0] for name in (run.used if isinstance(run, Run) else ()))}
        if reference.narrowed:
            found.add("half")
        return {*found, "compile", "saved"}

    def _add_rounding(self, goal: Goal) -> None:
        for name, more in self._path.rounding(goal.reference.gradient).items():
            goal.floors[name] = goal.floors.get(name, 0.0) + more

    def _hold_cut(self, neutral: Run, unit: float, elsewhere: bool) -> None:
        said, lab = self._said, self._lab
        if lab.asked.reduction == "micro_batches":
            said.notes.append(
                "reduction=micro_batches depends on the cut by itself: the reference is cut in the same way."
            )
            return
        whole: Sequence[Any] | None = None
        cut: Sequence[Any] = lab.window
        if len(lab.window) < 2:
            return
        try:
            whole = [joined(lab.window, lab.asked.count_rows)]
        except NotJoinableError as error:
            whole, cut = lab.window, halves(lab.window, lab.asked.count_rows) or ()
            how = "each was held against its halves in place of" if cut else "nothing could be held against"
            said.notes.append(f"the micro-batches cannot be put together ({error}): {how} the whole batch.")
            if not cut:
                return
        parts = neutral if cut is lab.window else lab.reference(cut, self._lab.dtype, "neutral")
        try:
            one = neutral if whole is lab.window else lab.reference(whole, self._lab.dtype, "neutral")
        except Exception as error:
            said.notes.append(
                f"put together, the micro-batches do not run ({_first_line(error)}): the cut is left open."
            )
            return
        floors, _ = self._floors(one, "neutral", unit, whole, 1, unit)
        said.cut = compare.lines(parts.gradient, one.gradient, floors)
        said.cut_error = compare.error(parts.gradient, one.gradient)
        if said.cut and said.cut[0].excess > 1.0 and elsewhere:
            said.notes.append(
                "what forward draws from Python's or numpy's generators differs between the micro-batches and the "
                f"whole batch, so the cut is left open (the gradients are {said.cut_error:.1e} apart)."
            )
            return
        if said.cut and said.cut[0].excess > 1.0:
            said.findings += explain_cut(lab, self._lab.dtype, cut, whole, parts, one, floors)

    def _alike(self, one: Run, other: Run) -> bool:
        return compare.error(one.gradient, other.gradient) <= math.sqrt(UNIT[self._lab.dtype]) / 100

    def _try(self, measure: Callable[[], Run]) -> Run | Exception:
        try:
            return measure()
        except TrainerError as error:
            if type(error).__name__ in ("ConfigError", "ObjectiveError"):
                raise
            return error
        except Exception as error:
            return error


def _larger(one: Floors, other: Floors) -> Floors:
    return {name: max(one.get(name, 0.0), other.get(name, 0.0)) for name in one.keys() | other.keys()}


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__


def _finite(run: Run) -> bool:
    dense = (one if one.layout is torch.strided else one.to_dense() for one in run.gradient.values())
    return all(bool(one.isfinite().all()) for one in dense)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
