"""A path that sums its micro-batches with other weights than they count, as a textbook loop does."""

from typing import Any

from trainer.certificate import compare
from trainer.certificate.batches import joined
from trainer.certificate.certificate import Finding
from trainer.certificate.compare import Floors
from trainer.certificate.lab import Lab, Run
from trainer.certificate.paths import Path

SETTING = "accumulation_steps"


def weighed_otherwise(lab: Lab, path: Path, reference: Run, run: Run, floors: Floors, draws: Any) -> Finding:
    """What can be said of a gradient that no setting explains: how each micro-batch counts in it."""
    error = compare.error(run.gradient, reference.gradient)
    missing = [name for name in reference.gradient if name not in run.gradient]
    kept = lab.reference(lab.window, lab.dtype, draws or "equal", keep_parts=True).window
    if kept is not None and not missing:
        factors = _factors(kept.parts, reference, run, floors)
        if factors is not None:
            told = [sum(weights.values()) for weights in kept.weights]
            return Finding("weights", SETTING if len(told) > 1 else None, None, _sentence(factors, told), error)
    if missing and compare.worst({**reference.gradient, **run.gradient}, reference.gradient, floors) <= 1.0:
        names = ", ".join(f"'{name}'" for name in missing[:3])
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        reason = f"{names}{more} get no gradient, and get one in the reference."
        return Finding("missing", None, missing[0].rpartition(".")[0], reason, error)
    if len(lab.window) > 1 and lab.ranks.world_size == 1 and _mends_whole(lab, path, floors, draws):
        reason = (
            "with the whole batch as one micro-batch it is right, and the gradient of several is no weighted sum of "
            "theirs: something is carried over from one to the next, or is stepped on in between."
        )
        return Finding("cache", SETTING, None, reason, error)
    reason = "the gradient differs, and switching off every setting does not mend it."
    return Finding("unexplained", None, None, reason, error)


def _factors(parts: list[Any], reference: Run, run: Run, floors: Floors) -> list[float] | None:
    """By what each micro-batch's right share is multiplied in this run, where the run is such a sum."""
    found = compare.shares(parts, run.gradient)
    if found is None:
        return None
    made = {
        name: sum(factor * part[name] for factor, part in zip(found[0], parts, strict=True) if name in part)
        for name in reference.gradient
    }
    largest = max(1.0, *(abs(factor) for factor in found[0]))
    # Each factor is fitted to a rounded gradient; then what is left is rounding as well.
    return found[0] if compare.worst(run.gradient, made, {n: largest * f for n, f in floors.items()}) <= 1.0 else None


def _sentence(factors: list[float], told: list[float]) -> str:
    whole = sum(told)
    right = [weight / whole for weight in told]
    has = [factor * share for factor, share in zip(factors, right, strict=True)]
    if max(factors) - min(factors) < 1e-3 * max(map(abs, factors)):
        return f"the whole gradient is {factors[0]:.4g} times the one asked for: its divisor (or its scale) is another."
    listed = ", ".join(f"{share:.4g}" for share in has)
    asked = ", ".join(f"{share:.4g}" for share in right)
    if max(has) - min(has) < 1e-3 * max(map(abs, has)):
        return f"each micro-batch's mean counts {has[0]:.4g}; by their weights they count {asked}."
    return f"the micro-batches' means count {listed}; by their weights they count {asked}."


def _mends_whole(lab: Lab, path: Path, floors: Floors, draws: Any) -> bool:
    try:
        whole = [joined(lab.window, lab.asked.count_rows)]
        run = lab.by(path, whole, draws=draws)
    except Exception:  # whatever it is, it is no mending
        return False
    reference = lab.reference(whole, lab.dtype, draws or "equal")
    return compare.worst(run.gradient, reference.gradient, floors) <= 1.0
