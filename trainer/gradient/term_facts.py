"""What each rank knows of a window's terms, summed: how they were held, by what they were divided, what they weigh."""

import math
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from trainer.distributed.ranks import Ranks
from trainer.errors import ObjectiveError
from trainer.gradient import norms
from trainer.gradient.open_window import OpenWindow
from trainer.gradient.opening import Opening
from trainer.gradient.report import Number
from trainer.gradient.term_sum import TermSum
from trainer.gradient.weights import not_zero


class TermFacts(NamedTuple):
    """One term on one rank, or the sums over those that had it.

    - `seen`, `apart`, `exact`: 1 where it came up, was held apart, was seeded by its true divisor.
    - `divisor`, `squares`: the guess that it was divided by (0 where exact), and its square.
    - `weight`, `total`: its Σ weight and Σ total; they may lie on a device.
    """

    seen: float
    apart: float
    exact: float
    divisor: float
    squares: float
    weight: Number
    total: Number


FACTS = 5
"""How many of them are always on the host: the first."""
NOTHING = TermFacts(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)


def here(window: OpenWindow, opening: Opening, gradients: Mapping[str, Tensor]) -> dict[str, TermFacts]:
    """This rank's terms. What it divided by a guess of its own is brought to the guess that all ranks share."""
    found = {}
    guessed = [(name, sums) for name, sums in window.terms.items() if sums.apart is None and not sums.exact]
    if guessed:
        # Terms that are held together have one divisor.
        name, first = guessed[0]
        common = opening.common(name)
        if first.divisor != common:
            norms.scale(list(gradients.values()), first.divisor / common)
        for _, sums in guessed:
            sums.divisor = common
    for name, sums in window.terms.items():
        if sums.apart is not None and not sums.exact:
            common = opening.common(name)
            if sums.divisor != common:
                norms.scale(list(sums.apart.values()), sums.divisor / common)
            sums.divisor = common
        total = sum((value * factor for _, value, factor in sums.values), 0.0)
        guess = 0.0 if sums.exact else float(sums.divisor)
        apart, exact = float(sums.apart is not None), float(sums.exact)
        found[name] = TermFacts(1.0, apart, exact, guess, guess * guess, sums.weight, total)
    return found


def gathered(ranks: Ranks, local: Mapping[str, TermFacts]) -> dict[str, TermFacts]:
    """The sums by name, where a term came up that the ranks had not agreed on a place for."""
    plain = {name: tuple(float(number) for number in term) for name, term in local.items()}
    found: dict[str, TermFacts] = {}
    for theirs in ranks.gather(plain):
        for name, term in theirs.items():
            before = found.get(name, NOTHING)
            found[name] = TermFacts(*(left + right for left, right in zip(before, term, strict=True)))
    return found


def settle(window: OpenWindow, name: str, term: TermFacts, reduction: str) -> None:
    """Put one term's sums over all ranks into this rank's window.

    Raises ObjectiveError, on every rank, where they held it in ways that do not go together.
    """
    if term.exact not in (0.0, term.seen) or term.seen * term.squares != term.divisor**2:
        raise ObjectiveError(
            f"the ranks do not weigh the term '{name}' in the same way: let every rank's objective return the same "
            "kind of answer for it, and give each its micro-batches in the same way (whole windows, or one by one)."
        )
    sums = window.terms.get(name)
    if sums is None:
        sums = window.terms[name] = TermSum(1.0, bool(term.exact), name, apart={} if term.apart else None)
    sums.weight, sums.total = term.weight, term.total
    if not sums.exact:
        sums.divisor = term.divisor / term.seen
    elif not sums.values and reduction != "sum":
        sums.divisor = not_zero(term.weight if reduction == "mean" else float(window.size()[0]))


def leftover(window: OpenWindow, terms: Mapping[str, TermFacts]) -> Number:
    """What the gradient that is not held apart must still be divided by, on every rank.

    Raises ObjectiveError, on every rank, where terms that any rank held together have different ones.
    """
    together = [name for name, term in terms.items() if term.seen > term.apart]
    found = [window.leftover_of(window.terms[name]) for name in together]
    for name, other in zip(together, found, strict=True):
        if isinstance(found[0], float) and isinstance(other, float) and not math.isclose(found[0], other):
            raise ObjectiveError(
                f"the terms '{together[0]}' and '{name}' come in other micro-batches, not alike on all ranks, so their "
                "weights differ: name every term in every micro-batch (Sum(total, 0.0) where it counts nothing)."
            )
    return found[0] if found else 1.0
