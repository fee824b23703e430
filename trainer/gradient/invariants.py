"""What must hold of every window, whatever the model: counted, not believed.

`check` is for every step, out of counts that the host has anyway, `Untouched` for the first window. `writes` puts a
hook on every parameter: it is for `trainer check` and for tests.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor

from trainer.errors import GradientError
from trainer.gradient.open_window import OpenWindow
from trainer.gradient.report import Trace


def check(trace: Trace, window: OpenWindow, world_size: int) -> None:
    """Raises GradientError where a loss was weighed and did not go through backward once, or where the gradient was not
    summed over ranks once (and once more for each gradient that is sparse or held apart).
    """
    weighed = 0
    for sums in window.terms.values():
        weighed += len(sums.values)
    if trace.values != weighed:
        raise GradientError(
            f"{weighed} losses were weighed in this window, and {trace.values} went through backward: its gradient is "
            "not that of its loss. Was accumulate() called from two threads, or the window changed by hand?"
        )
    if trace.reductions != (0 if world_size == 1 else 1 + trace.extra_reductions):
        raise GradientError(
            f"the window's gradient was summed over ranks {trace.reductions} times in place of once: use a Step with "
            "ranks for each window on its own."
        )


class Untouched:
    """The gradients as they stand before a forward, which must leave them alone."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self._before = [(name, one, one.grad, _version(one.grad)) for name, one in parameters.items()]

    def written(self) -> str | None:
        """The name of one that was written since."""
        for name, parameter, gradient, version in self._before:
            if parameter.grad is not gradient or _version(gradient) != version:
                return name
        return None


def _version(gradient: Tensor | None) -> int:
    return 0 if gradient is None else gradient._version


@contextmanager
def writes(parameters: Mapping[str, Tensor]) -> Iterator[dict[str, int]]:
    """Counts, by name, how often each parameter's gradient is written while the block runs.

    What takes gradients without writing them counts for nothing (`torch.autograd.grad`, as for terms held apart).
    """
    counts = dict.fromkeys(parameters, 0)

    def counting(name: str) -> None:
        def count(_: Tensor) -> None:
            counts[name] += 1

        handles.append(parameters[name].register_post_accumulate_grad_hook(count))

    handles: list[object] = []
    try:
        for name, parameter in parameters.items():
            if parameter.requires_grad:
                counting(name)
        yield counts
    finally:
        for handle in handles:
            handle.remove()  # type: ignore[attr-defined]


def check_writes(counts: Mapping[str, int], micro_batches: int) -> None:
    """Raises GradientError for a parameter whose gradient was written, but not once for each micro-batch.

    A model that uses a parameter in some micro-batches only (a branch, an expert) breaks this rightly.
    """
    for name, count in counts.items():
        if count not in (0, micro_batches):
            often = "once" if count == 1 else f"{count} times"
            raise GradientError(
                f"the gradient of '{name}' was written {often} in a window of {micro_batches} micro-batches: "
                + (
                    "something runs backward a second time (reentrant activation checkpointing, a hook)."
                    if count > micro_batches
                    else "some of them do not use it."
                )
            )
