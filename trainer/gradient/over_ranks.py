"""One window's sums over ranks: its gradient, its weights, its losses and whether all of it is finite, in one go.

After the last backward every rank sends one flat buffer: in front what it counted and found, behind it the gradient
(`trainer.distributed.buckets`; more buffers where the model is large). So the verdict is one for all: whatever is
decided afterwards is decided by every rank from the same numbers. A rank whose window is empty sends zeros.

A rank that is to stop inside its window sends zeros too, and says so in front: then nothing is summed, and every rank
leaves its window open where it stands (`leave_open`).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trainer.distributed.buckets import Buckets
from trainer.distributed.ranks import Ranks
from trainer.errors import GradientError, Paused
from trainer.gradient import norms, skips
from trainer.gradient.objective import MEAN
from trainer.gradient.open_window import OpenWindow
from trainer.gradient.opening import Opening, Summed
from trainer.gradient.parameters import Trained
from trainer.gradient.present import marks, present, sum_sparse
from trainer.gradient.report import FREE_READS, Number, Report, Trace
from trainer.gradient.term_facts import FACTS, NOTHING, TermFacts, gathered, here, leftover, settle
from trainer.gradient.term_sum import TermSum
from trainer.gradient.weigher import Weigher
from trainer.settings import GradientSettings

# In front: whether there is a term without a place yet, micro-batches, rows, tokens.
_FRONT = 4
# What a rank's own number is made of: its loss and its gradient, where they are not finite, whether it leaves its
# window open, and what it asks.
_LOSS, _GRADIENT, _OPEN, _ASKED = 1, 2, 4, 8


class Reducer:
    """What a step with other ranks has beside its window.

    Attributes:
        ask: what this rank asks of all at the window's end (0: nothing), a small whole number.
        asked: what every rank asked at the last window's end.
        bad_ranks: on a device, a number for each rank, not 0 where its loss or gradient was not finite.
        names: of the terms that have a place among what is summed.
        trace: of the last window; the sums of its gradient are counted in it.
    """

    def __init__(self, ranks: Ranks, settings: GradientSettings, weigher: Weigher, device: torch.device) -> None:
        self._ranks = ranks
        self._settings = settings
        self._weigher = weigher
        self._device = device
        self._reads = device.type in FREE_READS
        self.names: list[str] = [MEAN]
        self._sparse: set[str] = set()
        self._buckets: tuple[Any, Buckets] | None = None
        self._begun: tuple[Opening, Trained] | None = None
        self._found = torch.zeros((), device=device)
        self._one = torch.ones((), device=device)
        self._wrong: list[str] = []
        self.bad_ranks: Tensor | None = None
        self.ask: Callable[[], int] = int
        self.trace = Trace()
        self.asked: list[int] = []

    def open(self, drawn: Sequence[Any] | None, expected: dict[str, float], parameters: Trained) -> Opening:
        """A window begins: what it weighs goes to the other ranks."""
        layout = "\n".join([*self._layout(parameters), *self.names])
        if self._settings.reduction == "sum":
            drawn = None  # then nothing is divided
        opening = Opening(self._ranks, self._weigher, drawn, expected, self._settings.reduction, layout, self._device)
        self._begun = opening, parameters
        return opening

    def leave_open(self) -> None:
        """Tell the other ranks, where they sum the window that was begun, that this rank stops inside it.

        Raises Paused, here and there: every rank's window is as it was.
        """
        if self._begun is None:
            raise GradientError("no window was begun, so there is none to leave open.")
        opening, parameters = self._begun
        opening.arrive()
        layout = self._layout(parameters)
        buckets = self._buckets_for(parameters, layout, [name for name in layout if name not in self._sparse])
        slots = [0.0] * self._ranks.world_size
        slots[self._ranks.rank] = _ASKED * self.ask() + float(_OPEN)
        count = len(self.names)
        facts = [0.0] * _FRONT + slots + [0.0] * (len(layout) + (FACTS + 2 * self._reads) * count)
        self._told(buckets, facts, None if self._reads else torch.zeros_like(buckets.head), {})

    def close(self, window: OpenWindow, parameters: Trained, trace: Trace) -> None:
        """Sum the window over ranks: its gradients in `.grad`, its terms, its size, its verdict.

        Raises, on every rank, ObjectiveError for terms and GradientError for gradients that do not go together.
        """
        opening = window.opening
        if opening is None:
            return
        self.trace = trace
        opening.arrive()
        gradients = parameters.gradients()
        local = here(window, opening, gradients)
        layout = self._layout(parameters)
        dense = [name for name in layout if name not in self._sparse]
        buckets = self._buckets_for(parameters, layout, dense)
        facts, sums = self._facts(window, local, gradients, layout)
        sent = {name: gradient for name, gradient in gradients.items() if gradient.layout is torch.strided}
        on_device = None if self._reads else self._on_device(window, gradients, sums)
        facts, head = self._told(buckets, facts, on_device, sent)
        self.trace.reductions += 1
        buckets.send_whole(self._ranks, sent)

        start = _FRONT + self._ranks.world_size
        found, sparse = present(facts[start : start + len(layout)], layout, self._ranks.world_size)
        self._sparse |= sparse
        summed = buckets.receive(sent, {name for name in dense if name in found})
        self.trace.extra_reductions = len(sparse)
        for name in sorted(sparse):
            summed[name] = sum_sparse(self._ranks, parameters.by_name[name], gradients.get(name))
            self.trace.reductions += 1
        for name, parameter in parameters.by_name.items():
            if name in summed:
                parameter.grad = summed[name]
        for name in self._take(window, opening, facts, head, local):
            self.trace.extra_reductions += 1
            self._sum_apart(window.terms[name], parameters)
        window.settle()

    def reason(self, window: OpenWindow) -> str | None:
        """Why the window is not taken, of the first rank that knows. Asked by every rank, as the verdict is one."""
        wrong = self._wrong
        if self.bad_ranks is not None and self.bad_ranks[self._ranks.rank]:
            wrong = ["some parameter"]
        here = skips.of_losses(skips.losses_of(window), window.micro_batches) or skips.of_gradients(wrong)
        found = [(rank, said) for rank, said in enumerate(self._ranks.gather(here)) if said is not None]
        if not found:
            return None
        others = ", ".join(str(rank) for rank, _ in found[1:])
        return f"on rank {found[0][0]} {found[0][1]}{f' (and something on {others})' if others else ''}"

    def _told(
        self, buckets: Buckets, facts: list[float], on_device: Tensor | None, sent: Mapping[str, Tensor]
    ) -> tuple[list[float], Tensor]:
        """Send the buffers. Returns the sums of what stands in front: those on the host, and the head.

        Raises Paused, on every rank, where one of them leaves its window open.
        """
        host = torch.tensor(facts, dtype=torch.float64)
        arrived = None if on_device is None else self._ranks.sum_later(host)
        buckets.head.copy_(host if on_device is None else on_device)
        buckets.send(self._ranks, sent)
        head = buckets.receive_head()
        if arrived is not None:
            arrived()
        told = (head if on_device is None else host).tolist()
        slots = [int(slot) for slot in told[_FRONT : _FRONT + self._ranks.world_size]]
        self.asked = [slot // _ASKED for slot in slots]
        if any(slot & _OPEN for slot in slots):
            buckets.drop()
            raise Paused
        return told, head

    # What is sent.

    def _layout(self, parameters: Trained) -> list[str]:
        return [name for name, parameter in parameters.by_name.items() if parameter.requires_grad]

    def _buckets_for(self, parameters: Trained, layout: list[str], names: list[str]) -> Buckets:
        own = {name: parameters.by_name[name] for name in names}
        key = (tuple(map(id, own.values())), len(self.names), len(layout))
        if self._buckets is None or self._buckets[0] != key:
            count = len(self.names)
            size = self._ranks.world_size + 2 * count
            if self._reads:
                size += _FRONT + len(layout) + FACTS * count
            self._buckets = (key, Buckets(own, size, self._device))
        return self._buckets[1]

    def _facts(
        self, window: OpenWindow, local: Mapping[str, TermFacts], gradients: dict[str, Tensor], layout: list[str]
    ) -> tuple[list[float], list[Number]]:
        """(numbers of the host, the terms' sums)."""
        terms = [local.get(name, NOTHING) for name in self.names]
        slots = [0.0] * self._ranks.world_size
        slots[self._ranks.rank] = _ASKED * self.ask() + (self._bad(window, gradients) if self._reads else 0.0)
        sums: list[Number] = [number for term in terms for number in term[FACTS:]]
        facts = [
            float(any(name not in self.names for name in local)),
            *(float(count) for count in (window.micro_batches, window.rows, window.tokens)),
            *slots,
            *marks(gradients, layout, self._ranks.world_size),
            *(float(fact) for term in terms for fact in term[:FACTS]),
        ]
        return (facts + [float(number) for number in sums] if self._reads else facts), sums

    def _bad(self, window: OpenWindow, gradients: dict[str, Tensor]) -> float:
        """_LOSS or _GRADIENT where that of this rank is not finite; which it is, is kept for the reason."""
        self._wrong = []
        if self._settings.nonfinite == "allow":
            return 0.0
        if not window.losses_are_finite:
            return _LOSS
        norms.nonfinite([*gradients.values(), *window.held_apart()], self._found, self._one)
        if self._found.item() == 0.0:
            return 0.0
        self._found.zero_()
        self._wrong = norms.nonfinite_names(gradients)
        return _GRADIENT

    def _on_device(self, window: OpenWindow, gradients: dict[str, Tensor], sums: list[Number]) -> Tensor:
        """The same where numbers lie on a device, unread: a flag for each rank, and the terms' sums."""
        slots = torch.zeros(self._ranks.world_size, dtype=torch.float64, device=self._device)
        if self._settings.nonfinite != "allow":
            found = torch.zeros_like(self._found)
            norms.nonfinite([*gradients.values(), *window.held_apart()], found, self._one)
            losses = [torch.as_tensor(value, device=self._device) for _, _, value in window.losses()]
            bad = (~torch.stack(losses).isfinite()).any() if losses else torch.zeros_like(found)
            slots[self._ranks.rank] = _LOSS * bad + _GRADIENT * found
        numbers = [torch.as_tensor(one, dtype=torch.float64, device=self._device) for one in sums]
        return torch.cat([slots, torch.stack(numbers)])

    # What came.

    def _take(
        self, window: OpenWindow, opening: Opening, facts: list[float], head: Tensor, local: Mapping[str, TermFacts]
    ) -> list[str]:
        """Put the sums into the window. Returns the terms that any rank holds apart."""
        world, count = self._ranks.world_size, len(self.names)
        window.summed = summed = Summed((int(facts[1]), int(facts[2]), int(facts[3])))
        slots = [int(slot) for slot in facts[_FRONT : _FRONT + world]]
        if self._reads:
            window.losses_are_finite = not any(slot & _LOSS for slot in slots)
            sums: list[Number] = list(facts[-2 * count :])
            facts = facts[: -2 * count]
        else:
            self.bad_ranks = head[:world].clone()
            summed.is_bad = (self.bad_ranks.max() > 0).to(torch.float32)
            summed.has_bad_loss = (self.bad_ranks.remainder(_GRADIENT).max() > 0).to(torch.float32)
            sums = list(head[world:].clone().unbind())
        told = facts[-FACTS * count :]
        terms = {
            name: TermFacts(*told[FACTS * i : FACTS * (i + 1)], *sums[2 * i : 2 * i + 2])
            for i, name in enumerate(self.names)
        }
        if facts[0]:
            terms = gathered(self._ranks, local)
            self.names = [*terms, *(name for name in self.names if name not in terms and name != MEAN)]
        for name, term in terms.items():
            if term.seen:
                settle(window, name, term, self._settings.reduction)
        # All ranks in one order, as the first one's weight is the report's.
        window.terms = {name: window.terms[name] for name in terms if name in window.terms}
        summed.leftover = leftover(window, terms)
        return [name for name, term in terms.items() if term.apart]

    def _sum_apart(self, sums: TermSum, parameters: Trained) -> None:
        """The gradient of a term that is held apart, by a sum of its own."""
        own = sums.apart or {}
        for name, gradient in own.items():
            if gradient.layout is not torch.strided:
                raise GradientError(
                    f"the gradient of '{name}' is sparse and belongs to a term whose weight is known at the window's "
                    "end only; over ranks that cannot be summed: make the embedding with sparse=False."
                )
        wanted = {name for names in self._ranks.gather(sorted(own)) for name in names}
        layout = self._layout(parameters)
        buckets = self._buckets_for(parameters, layout, [name for name in layout if name not in self._sparse])
        buckets.send(self._ranks, own)
        self.trace.reductions += 1
        buckets.receive_head()
        buckets.send_whole(self._ranks, own)
        sums.apart = buckets.receive(own, wanted)


def reducer_for(ranks: Ranks, settings: GradientSettings, weigher: Weigher, device: torch.device) -> Reducer | None:
    """A reducer where there are other ranks."""
    return None if ranks.world_size == 1 else Reducer(ranks, settings, weigher, device)


def why(window: OpenWindow, gradients: dict[str, Tensor], report: Report, reducer: Reducer | None) -> str:
    """The reason for a window with a non-finite verdict; the rank is named where there are several."""
    if reducer is not None and any(report.weights.values()):
        said = reducer.reason(window)
        if said is not None:
            return said
    return skips.why(window, gradients, report)
