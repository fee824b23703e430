"""The sums of one window while it is open: weights, divisors, the seeds of backward, and what the report will say.

One window's gradient is (Σ ∇total) / (Σ weight), each term with its own Σ weight. As the window is drawn whole, its
summed weight is known before the first backward wherever the data alone tells it; backward then starts from a seed that
makes every gradient the true one. Elsewhere the seed is a power of two near what is expected, and `leftover` is what
the gradient must still be divided by.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trainer.errors import ConfigError, ObjectiveError, did_you_mean
from trainer.gradient.objective import Term
from trainer.gradient.opening import Opening, Summed
from trainer.gradient.report import Number
from trainer.gradient.seeds import seed_of
from trainer.gradient.term_sum import TermSum
from trainer.gradient.weigher import Weigher
from trainer.gradient.weights import as_floats, not_zero, power_of_two
from trainer.settings import GradientSettings


class OpenWindow:
    """From the first micro-batch to `finish`.

    Args:
        drawn: the whole window; None where micro-batches come one by one.
        expected: the last window's denominators by term, the guess where nothing better is known.
        loss_scale: what every seed is multiplied with besides (1 unless in fp16).
        opening: with other ranks: what the window weighs over all of them, as far as the data tells.
    """

    def __init__(
        self,
        settings: GradientSettings,
        weigher: Weigher,
        drawn: Sequence[Any] | None,
        expected: Mapping[str, float],
        loss_scale: Number = 1.0,
        opening: Opening | None = None,
    ) -> None:
        self.loss_scale = loss_scale
        self.drawn = drawn
        self.entered = self.micro_batches = 0
        self.rows = self.tokens = 0
        self.terms: dict[str, TermSum] = {}
        self.losses_are_finite = True
        """Whether every value so far is finite, as far as the host knows."""
        self._settings = settings
        self._any_apart = False
        self._weighs_nothing = True
        self._weigher = weigher
        self._expected = expected
        self.opening = opening
        self._weights: dict[str, list[Number]] = {}
        self.summed: Summed | None = None  # what all ranks' windows came to

    def join(self, drawn: Sequence[Any] | None) -> None:
        """Go on with the window that was given before, or, after a restart, with the same window drawn again."""
        if drawn is None or drawn is self.drawn:
            return
        if self.drawn is not None or len(drawn) < self.micro_batches:
            raise ConfigError(
                f"a window of {len(drawn)} micro-batches was given while another is open with {self.micro_batches}: "
                "call finish() or cancel() first."
            )
        self.drawn = drawn

    def enter(self) -> None:
        """A micro-batch begins; `count` ends it."""
        if self.entered != self.micro_batches:
            self.check_whole()
        self.entered += 1

    def check_whole(self) -> None:
        """Raises ConfigError where a micro-batch began and never ended: part of its gradient may be in the sum."""
        if self.entered != self.micro_batches:
            raise ConfigError(
                f"micro-batch {self.entered} of this window raised, and its gradient is there in part or not at all: "
                "call cancel() before anything else."
            )

    def check_coefficients(self) -> None:
        """Raises ConfigError for a coefficient of a term that is not there: it would count for nothing."""
        for name in self._settings.coefficients:
            if name not in self.terms:
                raise ConfigError(
                    f"gradient.coefficients names '{name}', which the objective does not return: "
                    f"{did_you_mean(name, self.terms)}"
                )

    def close(self) -> None:
        """A report that is kept must keep no data and no gradients alive."""
        self.drawn = None
        if self._any_apart:
            for sums in self.terms.values():
                sums.apart = None

    def size(self) -> tuple[int, int, int]:  # micro-batches, rows, tokens
        return self.summed.size if self.summed else (self.micro_batches, self.rows, self.tokens)

    def count(self, micro_batch: Any) -> None:
        """One more micro-batch went through forward and backward."""
        self.micro_batches += 1
        self.rows += self._weigher.rows(micro_batch)
        if self._weigher.counts_tokens:
            self.tokens += self._weigher.tokens(micro_batch)

    def seed(self, term: Term, micro_batch: Any, alone: bool) -> Tensor | None:
        """What backward starts from at this term, of the shape of its value; None where it counts nothing.

        `alone` says that the objective has answered with this one term.
        """
        is_mean = term.weight is None
        weight = self._mean_weight(term.name, micro_batch) if term.weight is None else term.weight
        sums = self.terms.get(term.name)
        if sums is None:
            sums = self.terms[term.name] = self._start(term, weight, alone)
        sums.weight = sums.weight + weight
        if type(weight) is float and weight == 0.0:
            return None  # a mean over nothing is 0 / 0 and must not reach a parameter
        self._weighs_nothing = False
        if self._settings.reduction == "micro_batches":
            factor: Number = 1.0 if is_mean else 1.0 / not_zero(weight)
        else:
            factor = weight if is_mean else 1.0
        value = term.number()
        if type(value) is float and not math.isfinite(value):
            self.losses_are_finite = False
        sums.values.append((self.micro_batches, value, factor))
        number = factor / sums.divisor * self.loss_scale
        if self._settings.coefficients:
            number = number * self._settings.coefficients.get(term.name, 1.0)
        seed = seed_of(number, term.value)
        return seed if term.vector is None else term.vector.to(term.value) * seed

    def settle(self) -> None:
        """The terms were summed over ranks, and may be others now."""
        self._any_apart = any(sums.apart is not None for sums in self.terms.values())
        self._weighs_nothing = all(type(s.weight) is float and s.weight == 0.0 for s in self.terms.values())

    def leftover(self) -> Number:
        """What the gradient must still be divided by beside the loss scale, leaving out the terms held apart."""
        if self.summed is not None:
            return self.summed.leftover
        if len(self.terms) == 1 and not self._any_apart:
            return self.leftover_of(next(iter(self.terms.values())))
        together = [name for name, sums in self.terms.items() if sums.apart is None]
        if not together:
            return 1.0
        leftover = self.leftover_of(self.terms[together[0]])
        for name in together[1:]:
            other = self.leftover_of(self.terms[name])
            if isinstance(leftover, float) and isinstance(other, float) and not math.isclose(leftover, other):
                raise ObjectiveError(
                    f"the weights of '{together[0]}' and '{name}' came out otherwise than was told before the first "
                    "backward: name every term in every micro-batch (Sum(total, 0.0) where it counts nothing), and let "
                    "the objective's weight(micro_batch) tell what it then returns."
                )
        return leftover

    def apart(self) -> list[tuple[dict[str, Tensor], Number]]:
        """The gradients that were held apart, each with all that it must still be divided by."""
        if not self._any_apart:
            return []
        held = [sums for sums in self.terms.values() if sums.apart is not None]
        return [(sums.apart, self.leftover_of(sums) * self.loss_scale) for sums in held if sums.apart is not None]

    def held_apart(self) -> list[Tensor]:
        """The gradients of those terms as they lie there."""
        if not self._any_apart:
            return []
        return [gradient for sums in self.terms.values() for gradient in (sums.apart or {}).values()]

    def weighs_nothing(self) -> bool:
        """Whether every weight is zero, as far as the host knows."""
        return self._weighs_nothing

    def weighs_nothing_on(self, device: torch.device) -> Tensor | None:
        """The same as a flag (float32, 0 or 1) where the weights lie on a device; None where the host knows better."""
        weights = [sums.weight for sums in self.terms.values()]
        if not any(isinstance(weight, Tensor) for weight in weights):
            return None
        if any(isinstance(weight, float) and weight != 0.0 for weight in weights):
            return None
        zeros = [(weight == 0).to(device, torch.float32) for weight in weights if isinstance(weight, Tensor)]
        return torch.stack(zeros).min()

    def losses(self) -> list[tuple[str, int, Number]]:
        """(term, micro-batch, value) of all that weighs something, term by term."""
        return [(name, index, value) for name, sums in self.terms.items() for index, value, _ in sums.values]

    def weights(self) -> dict[str, Number]:
        return {name: sums.weight for name, sums in self.terms.items()}

    def denominators(self) -> dict[str, float]:
        """What each term was divided by, where the host knows it: the next window's guess."""
        found = {name: self._denominator(sums) for name, sums in self.terms.items()}
        return {name: value for name, value in found.items() if isinstance(value, float) and value > 0.0}

    def means(self) -> dict[str, float]:
        """Each term under the window's reduction, read from the device."""
        return {name: self._mean(sums) for name, sums in self.terms.items()}

    def _mean(self, sums: TermSum) -> float:
        denominator = float(self._denominator(sums))
        if sums.total is not None:
            return float(sums.total) / denominator if denominator else float("nan")
        values = as_floats([value for _, value, _ in sums.values])
        factors = as_floats([factor for _, _, factor in sums.values])
        total = sum(v * f for v, f in zip(values, factors, strict=True))
        return total / denominator if denominator else float("nan")

    def _denominator(self, sums: TermSum) -> Number:
        if self._settings.reduction == "mean":
            return sums.weight
        return float(self.size()[0]) if self._settings.reduction == "micro_batches" else 1.0

    def _mean_weight(self, name: str, micro_batch: Any) -> Number:
        """What a mean counts in this micro-batch; of a window that was drawn whole, all are weighed at once."""
        if self.drawn is None:
            return self._weigher.mean_weight(name, micro_batch)
        known = self._weights.get(name)
        if known is None and self.opening is not None:
            known = self.opening.here(name)
        if known is None:
            full = getattr(self.drawn, "is_full", False)
            known = self._weights[name] = [self._weigher.mean_weight(name, drawn, full) for drawn in self.drawn]
        if self.micro_batches < len(known) and self.drawn[self.micro_batches] is micro_batch:
            return known[self.micro_batches]
        return self._weigher.mean_weight(name, micro_batch)

    def _start(self, term: Term, weight: Number, alone: bool) -> TermSum:
        divisor, exact = self._divisor(term, weight)
        # What an objective's one `weight` counts, or the rows, is the same for all its means; so is a window's length.
        means = term.weight is None and not self._weigher.names_weights
        kind = "shared" if means or self._settings.reduction == "micro_batches" else term.name
        base = next((other for other in self.terms.values() if other.apart is None), None) if self.terms else None
        if base is None:
            together = exact or alone or kind == "shared"
        else:
            together = (exact and base.exact) or (kind == base.kind and not base.exact)
            if together and not exact:
                divisor = base.divisor
        if self._settings.reduction == "mean" and self.micro_batches:
            together = False  # it was not in the first micro-batch, so its Σ weight is another
        self._any_apart = self._any_apart or not together
        return TermSum(divisor, exact, kind, apart=None if together else {})

    def _divisor(self, term: Term, weight: Number) -> tuple[Number, bool]:
        reduction = self._settings.reduction
        if reduction == "sum":
            return 1.0, True
        if self.opening is not None:
            means = term.weight is None or self._weigher.declares
            return self.opening.divisor(term.name, weight, means)
        length = None if self.drawn is None else len(self.drawn)
        if reduction == "micro_batches":
            if length is not None:
                return float(length), True
            return power_of_two(self._expected.get(term.name, 1.0)), False
        if self.drawn is not None and (term.weight is None or self._weigher.declares):
            weights = self._weights.get(term.name) or [self._weigher.mean_weight(term.name, m) for m in self.drawn]
            return not_zero(sum(weights[1:], weights[0])), True
        if length == 1:
            return not_zero(weight), True
        if length is not None:
            return power_of_two(weight * length), False
        return power_of_two(self._expected.get(term.name, weight)), False

    def leftover_of(self, sums: TermSum) -> Number:
        """What is left of one term's divisor."""
        denominator = self._denominator(sums)
        if isinstance(denominator, Tensor):
            return torch.where(denominator == 0, 1.0, denominator / sums.divisor)
        return denominator / sums.divisor if denominator else 1.0

    def state_dict(self) -> dict[str, Any]:
        """Numbers and tensors only; the micro-batches themselves come from the data's position."""
        return {
            "micro_batches": self.micro_batches,
            "rows": self.rows,
            "tokens": self.tokens,
            "terms": {name: sums.state_dict() for name, sums in self.terms.items()},
            "opening": None if self.opening is None else self.opening.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.entered = self.micro_batches = state["micro_batches"]
        self.rows, self.tokens = state["rows"], state["tokens"]
        if self.opening is not None and state["opening"] is not None:
            self.opening.load_state_dict(state["opening"])
        self.terms = {name: TermSum.from_state(sums) for name, sums in state["terms"].items()}
        self.settle()
        self.losses_are_finite = all(math.isfinite(value) for _, _, value in self.losses())
