"""A graph that was walked already: by the objective, by a derivative inside it, or for an earlier micro-batch."""

from collections.abc import Iterator, Mapping

from torch import Tensor

from trainer.diagnose import graphs
from trainer.diagnose.forward import Forward
from trainer.diagnose.holders import held_by
from trainer.diagnose.trace import Call
from trainer.errors import GradientError

_BEHIND = "part of the objective's answer belongs to the graph of an earlier micro-batch, which backward has freed"
_TO_DO = "detach() what is carried over from one micro-batch to the next"


def calls_backward(call: Call) -> GradientError:
    return GradientError(
        f"the objective calls {call} itself: return the total and leave backward to the step, which would walk the "
        "same graph again (retain_graph=True would only add the gradient twice)."
    )


def walked_twice(forward: Forward) -> GradientError:
    roots = {"model": forward.model, "objective": forward.objective}
    held = dict(_by_id(held_by(roots)))
    trace, again = forward.again()
    own = next((call for call in trace.calls if call.name == "backward"), None)
    if own is not None:
        return calls_backward(own)
    made: set[int] = set()
    for call in (*trace.calls, *([trace.failed] if trace.failed is not None else [])):
        for tensor in call.inputs:
            if tensor.grad_fn is not None and id(tensor) not in made:
                name = held[id(tensor)][0] if id(tensor) in held else None
                now = dict(held_by(roots))
                is_kept = name is not None and now.get(name) is tensor and not _grows(name, held, now)
                return _kept(name, call) if name is not None and is_kept else _carried_over(name, call)
        made.update(id(tensor) for tensor in call.outputs)
    derivatives = [call for call in trace.calls if call.name == "grad"]
    if derivatives and (not again or graphs.unreadable(again, graphs.FREED)):
        return GradientError(
            f"the graph that is needed afterwards was freed by {derivatives[-1]}: give it create_graph=True (or "
            "retain_graph=True, where its result is not differentiated)."
        )
    return GradientError(
        f"{_BEHIND}, or the objective called backward itself: {_TO_DO}, and leave backward to the step."
    )


def _carried_over(name: str | None, call: Call) -> GradientError:
    what = f"the old '{name}'" if name is not None else "an old tensor"
    return GradientError(f"{_BEHIND}: {what} goes into {call}; {_TO_DO}.")


def _kept(name: str, call: Call) -> GradientError:
    """Something that no forward makes anew."""
    return GradientError(
        f"'{name}' goes into {call} and was computed before this forward, by operations whose graph the first backward "
        "has freed: compute it in every forward, or keep a leaf: detach().requires_grad_() where it is to be trained, "
        "detach() where it is not."
    )


def _grows(name: str, before: Mapping[int, tuple[str, Tensor]], now: Mapping[str, Tensor]) -> bool:
    """Whether a forward puts more beside it: a list of what earlier ones made, say."""
    beside = name.rpartition("[")[0]
    then = {other for other, _ in before.values()}
    return bool(beside) and any(other.rpartition("[")[0] == beside and other not in then for other in now)


def _by_id(held: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[int, tuple[str, Tensor]]]:
    for name, tensor in held:
        yield id(tensor), (name, tensor)
