"""A training step written out by hand, in float64: forward, loss, clipping and the optimizers' formulas.

It imports nothing of trainer and nothing of torch.optim, torch.nn or torch's clipping. A window is one batch of all its
rows, so nothing is accumulated, and no precision but float64 is met. What the matrix of tests is held against.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

Named = dict[str, Tensor]
SMALLEST = 1e-3
"""The least that a unit's parameters count in adaptive clipping (Brock and others 2021, equation 3: epsilon)."""


def forward(parameters: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
    """The net of `matrix_cases.net`: three layers with tanh between them; inputs of shape (…, 3)."""
    hidden = inputs
    for layer in ("0", "2", "4"):
        hidden = hidden @ parameters[f"{layer}.weight"].T + parameters[f"{layer}.bias"]
        if layer != "4":
            hidden = torch.tanh(hidden)
    return hidden


def loss(outputs: Tensor, targets: Tensor) -> tuple[Tensor, float]:
    """(total, weight): squared errors over elements; for whole targets log-likelihoods over those that are not < 0."""
    if targets.is_floating_point():
        return ((outputs - targets) ** 2).sum(), float(targets.numel())
    kept = targets >= 0
    outputs, targets = outputs[kept], targets[kept]
    likely = outputs - torch.log(torch.exp(outputs).sum(-1, keepdim=True))
    return -likely[torch.arange(len(targets)), targets].sum(), float(len(targets))


def window_gradient(parameters: Mapping[str, Tensor], inputs: Tensor, targets: Tensor) -> tuple[Named, float]:
    """(∇ total / weight, weight) of all rows as one batch."""
    leaves = {name: value.detach().double().requires_grad_() for name, value in parameters.items()}
    total, weight = loss(forward(leaves, inputs.double()), targets.double() if targets.is_floating_point() else targets)
    gradients = torch.autograd.grad(total / weight, list(leaves.values()))
    return dict(zip(leaves, gradients, strict=True)), weight


def flat(named: Mapping[str, Tensor]) -> Tensor:
    """All tensors as one vector, in the order of their names' mapping."""
    return torch.cat([part.detach().reshape(-1) for part in named.values()])


def clipped(gradient: Mapping[str, Tensor], parameters: Mapping[str, Tensor], way: str, largest: float) -> Named:
    """The gradient as it is, with a norm of at most `largest`, or with that ratio of each unit to its parameters."""
    if way == "none":
        return dict(gradient)
    if way == "norm":
        factor = min(1.0, largest / float((flat(gradient) ** 2).sum().sqrt()))
        return {name: part * factor for name, part in gradient.items()}
    found = {}
    for name, part in gradient.items():
        units = part.reshape(len(part), -1) if part.dim() > 1 else part.reshape(1, -1)
        own = parameters[name].double().reshape(units.shape)
        bound = largest * (own**2).sum(1).sqrt().clamp(min=SMALLEST)
        size = (units**2).sum(1).sqrt()
        factor = torch.where(size > bound, bound / size, torch.ones_like(size))
        found[name] = (units * factor[:, None]).reshape(part.shape)
    return found


class Optimizer:
    """sgd, momentum (0.9) and adamw by their formulas, on all parameters as one vector, in its dtype."""

    def __init__(self, kind: str, lr: float, decay: float = 0.1) -> None:
        self.kind, self.lr, self.decay = kind, lr, decay
        self.steps = 0
        self.first: Tensor | None = None
        self.second: Tensor | None = None

    def moved(self, p: Tensor, g: Tensor) -> Tensor:
        """The parameters after one more step with the gradient g."""
        self.steps += 1
        if self.kind == "sgd":
            return p - self.lr * g
        if self.kind == "momentum":
            self.first = g.clone() if self.first is None else 0.9 * self.first + g
            return p - self.lr * self.first
        zero = torch.zeros_like(g)
        self.first = 0.9 * (zero if self.first is None else self.first) + (1 - 0.9) * g
        self.second = 0.999 * (zero if self.second is None else self.second) + (1 - 0.999) * g * g
        m_hat, v_hat = self.first / (1 - 0.9**self.steps), self.second / (1 - 0.999**self.steps)
        return p * (1 - self.lr * self.decay) - self.lr * m_hat / (v_hat.sqrt() + 1e-8)


def apart(found: Tensor, true: Tensor) -> float:
    """‖found - true‖ / ‖true‖ of two vectors."""
    difference = found.double() - true.double()
    return float((difference @ difference / (true.double() @ true.double())) ** 0.5)


def joined(micro_batches: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Micro-batches of rows, or of rows and positions, as one batch of rows (or positions)."""
    flat = [
        (inputs.reshape(-1, inputs.shape[-1]), targets if targets.is_floating_point() else targets.reshape(-1))
        for inputs, targets in micro_batches
    ]
    return torch.cat([inputs for inputs, _ in flat]), torch.cat([targets for _, targets in flat])
