"""Why the gradient depends on how a window is cut: what is carried over, which module mixes rows, or the objective."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from trainer.certificate import compare
from trainer.certificate.certificate import Finding
from trainer.certificate.compare import UNIT, Floors
from trainer.certificate.lab import Lab, Run
from trainer.certificate.probe import Probe, first_to_differ, first_to_differ_backward, first_to_pair

SETTING = "accumulation_steps"


def explain_stochastic(lab: Lab, dtype: torch.dtype, one: Run, other: Run) -> Finding:
    """The same forward twice came out otherwise: the first module that did."""
    left, right = Probe(), Probe()
    lab.reference(lab.window, dtype, probe=left)
    lab.reference(lab.window[:1], dtype)  # an iterator that goes round may be where it was after a whole window
    lab.reference(lab.window, dtype, probe=right)
    for calls in right.calls.values():
        del calls[1:]
    for calls in left.calls.values():
        del calls[1:]
    module = first_to_differ(left, right, math.sqrt(UNIT[dtype]) / 100)
    where = "" if module is not None else " (no module of the model: the objective, or what it calls)"
    reason = (
        f"the same forward, twice from the same state and the same draws, comes out otherwise{where}: something in it "
        "depends on what is neither the model's nor a generator's, so its gradient is not one thing."
    )
    return Finding("stochastic", None, module, reason, compare.error(one.gradient, other.gradient))


def explain_cut(
    lab: Lab, dtype: torch.dtype, cut: Sequence[Any], whole: Sequence[Any], parts: Run, one: Run, floors: Floors
) -> list[Finding]:
    """Why the reference of the parts is not that of the whole."""
    error = compare.error(parts.gradient, one.gradient)
    fresh = lab.reference(cut, dtype, "neutral", fresh=_all)
    found: list[Finding] = []
    if compare.worst(fresh.gradient, parts.gradient, floors) > 1.0:
        found.append(_carried_over(lab, dtype, cut, parts, fresh, floors))
        if compare.worst(fresh.gradient, one.gradient, floors) <= 1.0:
            return found
    left, right = Probe(), Probe()
    lab.reference(cut, dtype, "neutral", fresh=_all, probe=left)
    lab.reference(whole, dtype, "neutral", fresh=_all, probe=right)
    tolerance = math.sqrt(UNIT[dtype])
    module = first_to_differ(left, right, tolerance) or first_to_pair(left, right, tolerance)
    if module is not None:
        reason = (
            "its output for a row depends on the other rows of the micro-batch (as batch statistics do), so "
            "micro-batches do not add up to the whole batch."
        )
        return [*found, Finding("batch_statistics", SETTING, module, reason, error)]
    alike, guilty = first_to_differ_backward(left, right, tolerance, lambda name: _own_differ(name, parts, one, floors))
    if alike and guilty is not None:
        reason = (
            "its forward treats every row alone, its backward does not: micro-batches do not add up to the whole batch."
        )
        return [*found, Finding("backward", SETTING, guilty, reason, error)]
    return [*found, _objective(lab, dtype, cut, one, error)]


def _all(path: str) -> bool:
    return True


def _carried_over(lab: Lab, dtype: torch.dtype, cut: Sequence[Any], parts: Run, fresh: Run, floors: Floors) -> Finding:
    """Which state is carried over: that which, put back before every micro-batch, makes them as fresh ones."""
    error = compare.error(parts.gradient, fresh.gradient)
    guilty = None
    for path in parts.changed:
        alone = lab.reference(cut, dtype, "neutral", fresh=path.__eq__)
        if compare.worst(alone.gradient, fresh.gradient, floors) <= 1.0:
            guilty = path
            break
    module = _owner(lab, guilty) if guilty is not None else None
    what = f"'{parts.changed[guilty]}'" if guilty else "something"
    reason = f"{what} is carried over from one micro-batch to the next, and the gradient with it."
    return Finding(
        "cache",
        SETTING,
        module if module is not None else "objective" if guilty and guilty.startswith("objective") else None,
        reason,
        error,
    )


def _owner(lab: Lab, path: str | None) -> str | None:
    """The innermost module that a path of the state lies in."""
    if path is None or path.startswith("objective"):
        return None
    inside = [name for name in lab.modules if name == "" or path == name or path.startswith(f"{name}.")]
    return max(inside, key=len, default=None)


def _own_differ(name: str, parts: Run, one: Run, floors: Floors) -> bool:
    own = {line.name for line in compare.lines(parts.gradient, one.gradient, floors) if line.excess > 1.0}
    prefix = f"{name}." if name else ""
    return any(other.startswith(prefix) and "." not in other[len(prefix) :] for other in own)


def _objective(lab: Lab, dtype: torch.dtype, cut: Sequence[Any], one: Run, error: float) -> Finding:
    kept = lab.reference(cut, dtype, "neutral", fresh=_all, keep_parts=True).window
    told = [sum(weights.values()) for weights in kept.weights] if kept is not None else []
    found = compare.shares(kept.parts, one.gradient) if kept is not None else None
    if found is not None and found[1] < math.sqrt(UNIT[dtype]) and _is_mean_or_total(found[0], told):
        right = [factor * weight for factor, weight in zip(found[0], told, strict=True)]
        scale = sum(told) / sum(right) if sum(right) else 1.0
        listed = ", ".join(f"{weight * scale:.4g}" for weight in right)
        counted = ", ".join(f"{weight:.4g}" for weight in told)
        reason = (
            f"its mean is not over what its micro-batches are weighed by: they count {counted}, and in the mean of the "
            f"whole batch they count {listed}. Return Sum(total, weight), or give the objective a method "
            "weight(micro_batch)."
        )
        return Finding("weights", SETTING, "objective", reason, error)
    reason = (
        "the model gives every row the same output in a micro-batch and in the whole batch, and the objective makes "
        "another gradient of it: its value depends on which rows are together (pairs within the batch, say)."
    )
    return Finding("objective", SETTING, "objective", reason, error)


def _is_mean_or_total(factors: Sequence[float], told: Sequence[float]) -> bool:
    """Whether the whole is a mean of the parts with other weights, or their sum. A root of a mean, say, is neither."""
    shares = [factor * weight / sum(told) for factor, weight in zip(factors, told, strict=True)]
    return abs(sum(shares) - 1.0) < 1e-6 or all(abs(share - 1.0) < 1e-6 for share in shares)
