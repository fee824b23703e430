"""What autograd raises inside a step, as a sentence: what it is about by name, the user's line, and what to do.

All of it comes after the fact. The forward is run once more under a trace, which is dear, but only once something is
wrong. Where the second run does not show the mistake, less is said, rather than guessed.
"""

import re
from typing import Any

import torch
from torch import Tensor, nn

from trainer.diagnose import graphs, places
from trainer.diagnose.cuts import Cut, Flow
from trainer.diagnose.forward import Forward as Forward
from trainer.diagnose.freed import calls_backward, walked_twice
from trainer.diagnose.holders import held_by
from trainer.diagnose.losses import explained_loss
from trainer.diagnose.trace import Call, Trace, storage_of
from trainer.errors import GradientError, ObjectiveError
from trainer.gradient.objective import who
from trainer.gradient.parameters import named_modules

_INFERENCE = ("Inference tensors cannot be saved for backward", "Inplace update to inference tensor")
_LEAF = ("a leaf Variable that requires grad is being used in an in-place operation", "a view of a leaf Variable")


def explain(error: Exception, forward: Forward, roots: tuple[Tensor, ...] = ()) -> None:
    """Raise the sentence for an error that is known; return for any other, which the caller then raises on.

    Args:
        error: what forward or backward raised.
        roots: what backward began from; empty where forward raised.
    """
    sentence = explained(error, forward, roots)
    if sentence is not error:
        raise sentence from error


def explained(error: Exception, forward: Forward, roots: tuple[Tensor, ...] = ()) -> Exception:
    """The sentence for an error that is known, the error itself for any other."""
    loss = explained_loss(error)
    if loss is not None:
        return ObjectiveError(loss)
    text = str(error)
    if any(known in text for known in _INFERENCE):
        return _inference(forward)
    if any(known in text for known in _LEAF):
        return _leaf(error, forward)
    if graphs.CHANGED in text:
        return _changed(forward, roots)
    if "backward through the graph a second time" in text:
        return walked_twice(forward)
    if "torch.utils.checkpoint:" in text:
        return _computed_otherwise(text)
    if "Can't call numpy() on Tensor that requires grad" in text:
        return _into_numpy(error)
    return error


def not_connected(name: str, forward: Forward) -> ObjectiveError:
    """The error for a term of the objective that no parameter can get a gradient from."""
    what = f"{who(forward.objective)} returned a value for '{name}' without a graph"
    if not torch.is_grad_enabled():
        return ObjectiveError(f"{what}: gradients are switched off here; call the step outside no_grad().")
    off = [parameter for parameter, tensor in forward.parameters.items() if not tensor.requires_grad]
    if len(off) == len(forward.parameters):
        # A plain object's tensor that requires no gradient is no parameter, so the model's name for it is looked up.
        held = {id(tensor): name.removeprefix("model.") for name, tensor in held_by({"model": forward.model})}
        off = [held.get(id(forward.parameters[name]), name) for name in off]
        made = places.assigned(forward.model, off[0].partition(".")[0])
        where = f"; '{off[0]}' is made in {made}" if made is not None else ""
        return ObjectiveError(
            f"{what}: no parameter requires a gradient ({_listed(off)}){where}. Make them with requires_grad=True, or "
            "as nn.Parameter."
        )
    trace, roots = forward.again()
    if not roots:
        return ObjectiveError(f"{what}: no parameter that requires a gradient took part in it.")
    flow = Flow(trace, roots, {name: one for name, one in forward.parameters.items() if one.requires_grad})
    cuts = [flow.cut(parameter) for parameter, tensor in forward.parameters.items() if tensor.requires_grad]
    return ObjectiveError(f"{what}: {_nearest(cuts, flow)}")


def _nearest(cuts: list[Cut], flow: Flow) -> str:
    """The cut next to the loss: before it others may be meant (a frozen trunk), it is the one that leaves nothing."""
    reached = [cut for cut in cuts if cut.kind == "cut"]
    last = max(reached, key=lambda cut: cut.calls[0].order) if reached else None
    left = next((cut for cut in cuts if cut.kind == "left"), None)
    if last is None and left is None:
        last = flow.last_cut()
    if last is not None:
        return f"{last}. Return a value that is made of the parameters by operations that have a gradient."
    if left is not None:
        return f"{left}, and no tensor that is made of the parameters reaches the loss."
    if any(cut.kind != "unused" for cut in cuts):
        return "where the graph was cut could not be seen; some detach(), .data, no_grad() or whole number cuts it."
    origins = [call for call in flow.origins() if call.place is not None]
    made = f"; it is made of {origins[0]}" if len(origins) == 1 else ""
    return f"no parameter that requires a gradient took part in it{made}."


def _inference(forward: Forward) -> GradientError:
    trace, _ = forward.again()
    for tensor in trace.failed.inputs if trace.failed is not None else []:
        maker = trace.maker(tensor)
        if tensor.is_inference() and maker is not None:
            return GradientError(
                f"{maker} runs under inference mode, and what it makes goes into {trace.failed}, whose backward cannot "
                "use it: where no gradient is wanted write no_grad() in place of inference_mode(), else neither."
            )
    holder = _holder_of_inference_tensor(forward.model)
    where = f"{holder} keeps" if holder else "something in the model or the objective keeps"
    return GradientError(
        f"{where} a tensor that was made under inference mode, and backward cannot use it: set "
        "evaluation.grad_mode=no_grad, or clone the tensor outside inference mode before it is kept."
    )


def _computed_otherwise(text: str) -> GradientError:
    numbers = re.findall(r"tensors saved during (?:forward|recomputation): (\d+)", text)
    how = f" ({numbers[0]} in forward, {numbers[1]} in the recompute)" if len(numbers) == 2 else ""
    return GradientError(
        f"what activation checkpointing computes again in backward is not what forward computed: it saves other tensors"
        f"{how}, so it takes another way the second time. For segments of activation_checkpointing its verify=true "
        "names the module and the line."
    )


def _into_numpy(error: Exception) -> GradientError:
    place = places.of(error)
    where = f" in {place}" if place is not None else ""
    return GradientError(
        f"a tensor that requires a gradient goes into numpy{where}, which has no gradient: use torch's operation "
        "there; detach().numpy() is for what the loss does not depend on."
    )


def _leaf(error: Exception, forward: Forward) -> GradientError:
    trace, _ = forward.again()
    what = "a parameter"
    if trace.failed is not None:
        names = forward.names()
        known = (names.get(storage_of(tensor) or 0) for tensor in trace.failed.inputs if tensor.requires_grad)
        what = next((name for name in known if name is not None), "a leaf that requires a gradient")
    place = places.of(error)
    where = f" in {place}" if place is not None else ""
    return GradientError(
        f"{what} is changed in place while autograd records{where}: make a new tensor of it there, or change it under "
        "torch.no_grad() outside the objective."
    )


def _changed(forward: Forward, roots: tuple[Tensor, ...]) -> GradientError:
    """Backward needs a tensor as it was in forward, and it was changed in place since."""
    names = forward.names()
    held = [
        names[storage]
        for _, storages in graphs.unreadable(roots, graphs.CHANGED)
        for storage in storages
        if storage in names
    ]
    trace, again = forward.again()
    stuck = graphs.unreadable(again, graphs.CHANGED)
    for node, storages in stuck:
        saver = _maker_of_node(trace, node)
        for storage in storages:
            changes = [call for call in trace.changes(storage) if saver is None or call.order > saver.order]
            if changes:
                what = names.get(storage) or _made(trace, storage, saver)
                needs = f"backward of {saver}" if saver is not None else f"backward ({node.name()})"
                return GradientError(
                    f"{needs} needs {what} as it was then, but it was changed in place since, by {changes[0]}: write "
                    "the result into a new tensor there (x = x + 1, not x += 1), or clone() before."
                )
    what = held[0] if len(set(held)) == 1 else "a tensor that backward needs"
    return GradientError(
        f"{what} was changed in place between forward and backward, and backward needs it as it was: make a new tensor "
        "instead, or clone() before."
    )


def _made(trace: Trace, storage: int, saver: Call | None) -> str:
    if saver is not None and any(storage_of(tensor) == storage for tensor in saver.outputs):
        return "its own result"
    for call in trace.calls:
        if any(storage_of(tensor) == storage for tensor in call.outputs):
            return f"the result of {call}"
    return "a tensor"


def _maker_of_node(trace: Trace, node: Any) -> Call | None:
    return next((call for call in trace.calls if node in call.nodes), None)


def written_in_forward(name: str, forward: Forward) -> GradientError:
    """The sentence for a parameter whose gradient was written while forward ran."""
    trace, _ = forward.again()
    own = next((call for call in trace.calls if call.name == "backward"), None)
    if own is not None:
        return calls_backward(own)
    return GradientError(
        f"the gradient of '{name}' was written during forward, and the step would count it as its own: return the "
        "total and leave backward to the step."
    )


def _holder_of_inference_tensor(model: Any) -> str | None:
    own = [] if isinstance(model, nn.Module) else [("", model)]
    for prefix, module in [*own, *named_modules(model).items()]:
        held = {**getattr(module, "_buffers", {}), **vars(module)} if hasattr(module, "__dict__") else {}
        for name, value in held.items():
            if isinstance(value, Tensor) and value.is_inference():
                return f"'{prefix}.{name}'" if prefix else f"'{name}'"
    return None


def _listed(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
