"""Leaves that take part in the loss and that no optimizer has: layers in a plain list, parameters made in forward."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from trainer.diagnose.cuts import leaves
from trainer.diagnose.graphs import nodes
from trainer.diagnose.holders import held_by
from trainer.diagnose.mistakes import Forward
from trainer.diagnose.trace import Call, Trace, storage_of
from trainer.diagnose.words import listed
from trainer.gradient.parameters import named_parameters

_FLAT = {"RoundBackward", "SignBackward", "SgnBackward", "FloorBackward", "CeilBackward", "TruncBackward"}


def strays(found: Mapping[int, Tensor], forward: Forward) -> list[str]:
    """What is wrong with the leaves that a backward reached, a sentence each.

    Args:
        found: the leaves by id (`cuts.leaves`).
    """
    known = {id(one) for one in (*forward.parameters.values(), *named_parameters(forward.model).values())}
    is_module = isinstance(forward.model, nn.Module)
    left = {key: leaf for key, leaf in found.items() if key not in known}
    if not left:
        return []
    held: dict[str, Tensor] = {}
    for name, tensor in held_by({"model": forward.model, "objective": forward.objective}, parameters=True):
        is_trained = isinstance(tensor, nn.Parameter) or (not is_module and name.startswith("model."))
        if left.get(id(tensor)) is tensor and is_trained:
            held[name.removeprefix("model.")] = tensor
    said = []
    if held:
        which = listed(list(held))
        how = " (nn.ModuleList and nn.ParameterList register what a plain list does not)" if "[" in which else ""
        said.append(
            f"takes part in the loss but is in no optimizer, so not trained: {which}. Give it to one{how}, or set its "
            "requires_grad off."
        )
    ids = {id(tensor) for tensor in held.values()}
    if any(isinstance(leaf, nn.Parameter) and key not in ids for key, leaf in left.items()):
        said += _made_in_forward(forward, known | ids)
    return said


def not_leaves(model: Any) -> list[str]:
    """What a model keeps that requires a gradient and is no leaf, by name. What a hook makes anew before every forward
    (weight_norm of the old kind) is meant."""
    if not isinstance(model, nn.Module):
        return [name.removeprefix("model.") for name, one in held_by({"model": model}) if one.grad_fn is not None]
    return [
        f"{prefix}.{key}" if prefix else key
        for prefix, module in model.named_modules()
        if not module._forward_pre_hooks
        for key, value in vars(module).items()
        if isinstance(value, Tensor) and value.grad_fn is not None
    ]


def _made_in_forward(forward: Forward, known: set[int]) -> list[str]:
    trace, roots = forward.again()
    kept = {id(tensor) for _, tensor in held_by({"objective": forward.objective}, parameters=True)}
    made: dict[str, Call] = {}
    for key, leaf in leaves(roots).items():
        if isinstance(leaf, nn.Parameter) and key not in known | kept:
            maker = _maker_of(leaf, trace)
            if maker is not None and maker.place is not None:
                made.setdefault(str(maker.place), maker)
    return [
        f"a parameter is made anew in every forward, in {place}, and takes part in the loss, but no optimizer can have "
        "it: make it once, in __init__."
        for place in made
    ]


def _maker_of(leaf: Tensor, trace: Trace) -> Call | None:
    storage = storage_of(leaf)
    for call in trace.calls:
        if any(storage_of(tensor) == storage for tensor in (*call.outputs, *(one for one, _ in call.changed))):
            return call
    return None


def flat(names: list[str], forward: Forward) -> list[str]:
    """Why parameters have a gradient that is exactly zero, as far as an operation shows it; nothing where none does.

    Args:
        names: of these parameters.
    """
    trace, roots = forward.again()
    every = list(nodes(roots))
    calls = trace.makers(every)
    reasons = {node: why for node in every if (why := _why_flat(node, calls.get(node)))}
    if not reasons:
        return []
    steep = set(leaves(roots, reasons))
    by_reason: dict[str, list[str]] = {}
    for name in names:
        parameter = forward.parameters[name]
        behind = [node for node in reasons if id(parameter) in leaves(node)]
        if id(parameter) not in steep and behind:
            by_reason.setdefault(reasons[behind[-1]], []).append(name)
    return [f"the gradient of {listed(those)} is zero: {why}." for why, those in by_reason.items()]


def _why_flat(node: Any, call: Call | None) -> str | None:
    name = node.name().rstrip("0123456789")
    if call is None:
        return None
    if name in _FLAT:
        return f"the derivative of {call} is 0 everywhere"
    if name == "ReluBackward" and not bool(node._saved_result.any()):
        return f"every output of {call} is 0 for this micro-batch"
    return None
