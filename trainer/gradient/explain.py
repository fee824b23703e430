"""What autograd raises inside a step, as a sentence. Torch's own error stays chained behind it."""

from typing import Any

from torch import Tensor, nn

from trainer.errors import GradientError
from trainer.gradient.parameters import named_modules


def explain(error: RuntimeError, model: Any) -> None:
    """Raise the sentence for an error that is known; return for any other, which the caller then raises on."""
    sentence = explained(error, model)
    if sentence is not error:
        raise sentence from error


def explained(error: RuntimeError, model: Any) -> RuntimeError | GradientError:
    """The sentence for an error that is known, the error itself for any other."""
    text = str(error)
    if "Inference tensors cannot be saved for backward" in text or "Inplace update to inference tensor" in text:
        holder = _holder_of_inference_tensor(model)
        where = f"{holder} keeps" if holder else "something in the model or the objective keeps"
        return GradientError(
            f"{where} a tensor that was made under inference mode, and backward cannot use it: set "
            "evaluation.grad_mode=no_grad, or clone the tensor outside inference mode before it is kept."
        )
    if "backward through the graph a second time" in text:
        return GradientError(
            "the graph was walked already: the objective called backward itself, or part of its answer belongs to an "
            "earlier micro-batch. Return the total and leave backward to the step; detach() what is carried over."
        )
    return error


def _holder_of_inference_tensor(model: Any) -> str | None:
    own = [] if isinstance(model, nn.Module) else [("", model)]
    for prefix, module in [*own, *named_modules(model).items()]:
        held = {**getattr(module, "_buffers", {}), **vars(module)} if hasattr(module, "__dict__") else {}
        for name, value in held.items():
            if isinstance(value, Tensor) and value.is_inference():
                return f"'{prefix}.{name}'" if prefix else f"'{name}'"
    return None
