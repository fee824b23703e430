"""What a window's gradient is, by hand: the reference that the tests hold the product against.

It imports nothing of trainer. Each row's gradient is taken alone, by plain autograd on a float64 copy of the model, and
the rows are added up as the equation says: nothing is accumulated in `.grad`, and no micro-batch is ever run as one.
"""

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

Gradient = dict[str, Tensor]
RowLoss = Callable[[nn.Module, Tensor, Tensor], Tensor]


def mlp(dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Sequential:
    """A small net of three inputs and two outputs whose Sequential can be cut into segments."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)


def rows(count: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Inputs (count, 3) and targets (count, 2), drawn once and far from the net's outputs."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 3, generator=generator, dtype=torch.float64)
    targets = torch.randn(count, 2, generator=generator, dtype=torch.float64) * 2 + 1
    return inputs.to(dtype), targets.to(dtype)


def cut(tensors: Sequence[Tensor], sizes: Sequence[int]) -> list[tuple[Tensor, ...]]:
    """Micro-batches of so many rows each."""
    return list(zip(*(tensor.split(list(sizes)) for tensor in tensors), strict=True))


def windows_of(micro_batches: Sequence[object], length: int) -> list[list[object]]:
    """Windows of so many micro-batches; the last one may be shorter."""
    return [list(micro_batches[start : start + length]) for start in range(0, len(micro_batches), length)]


def squared_error(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """One row's mean squared error; the inputs are one row."""
    return (model(inputs) - targets).square().mean()


def row_gradients(model: nn.Module, inputs: Tensor, targets: Tensor, loss: RowLoss = squared_error) -> list[Gradient]:
    """∇loss of each row alone; the model is float64 already."""
    named = dict(model.named_parameters())
    found = []
    for row in range(len(inputs)):
        value = loss(model, inputs[row : row + 1].double(), targets[row : row + 1])
        gradients = torch.autograd.grad(value, list(named.values()), allow_unused=True)
        found.append(
            {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named.items(), gradients, strict=True)}
        )
    return found


def window_gradient(
    model: nn.Module, window: Sequence[tuple[Tensor, Tensor]], reduction: str, loss: RowLoss = squared_error
) -> Gradient:
    """One window's gradient: of Σ rows / rows, of Σ rows, or of Σ (micro-batch mean) / micro-batches, in float64."""
    parts = [row_gradients(model, inputs, targets, loss) for inputs, targets in window]
    total: Gradient = {}
    for part in parts:
        for gradient in part:
            for name, value in gradient.items():
                share = {
                    "mean": 1.0 / sum(len(other) for other in parts),
                    "sum": 1.0,
                    "micro_batches": 1.0 / (len(part) * len(parts)),
                }[reduction]
                total[name] = total.get(name, torch.zeros_like(value)) + share * value
    return total


def norm_of(gradient: Gradient) -> float:
    return float(torch.cat([value.reshape(-1) for value in gradient.values()]).norm())


def clipped(gradient: Gradient, norm: float | None, value: float | None) -> Gradient:
    if norm is not None:
        factor = min(1.0, norm / norm_of(gradient))
        return {name: factor * part for name, part in gradient.items()}
    if value is not None:
        return {name: part.clamp(-value, value) for name, part in gradient.items()}
    return gradient


def descend(
    model: nn.Module,
    windows: Sequence[Sequence[tuple[Tensor, Tensor]]],
    *,
    rate: float,
    reduction: str = "mean",
    zero_grad: str = "set_to_none",
    clip_norm: float | None = None,
    clip_value: float | None = None,
) -> tuple[dict[str, Tensor], list[float]]:
    """Plain gradient descent over the windows: final parameters, and each step's gradient norm before clipping."""
    model = copy.deepcopy(model).double()
    standing: Gradient | None = None
    norms = []
    for window in windows:
        gradient = window_gradient(model, window, reduction)
        if zero_grad == "never" and standing is not None:
            gradient = {name: standing[name] + part for name, part in gradient.items()}
        norms.append(norm_of(gradient))
        standing = clipped(gradient, clip_norm, clip_value)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter -= rate * standing[name]
    return {name: parameter.detach() for name, parameter in model.named_parameters()}, norms


def farthest(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """The largest difference between two sets of tensors, relative to the largest number in each tensor."""
    if left.keys() != right.keys():
        raise KeyError(f"{sorted(left)} against {sorted(right)}")
    largest = 0.0
    for name in left:
        one, other = left[name].detach(), right[name].detach()
        one, other = (one, other) if one.is_complex() else (one.double(), other.double())
        largest = max(largest, float((one - other).abs().max() / other.abs().max().clamp(min=1e-30)))
    return largest


def state_of(*holders: nn.Module | torch.optim.Optimizer) -> dict[str, Tensor]:
    """Copies of every tensor in the state of modules and optimizers, to be compared bit for bit."""
    found: dict[str, Tensor] = {}
    for index, holder in enumerate(holders):
        if isinstance(holder, nn.Module):
            found |= {f"{index}.{name}": value.detach().clone() for name, value in holder.state_dict().items()}
        else:
            for number, state in holder.state_dict()["state"].items():
                found |= {f"{index}.{number}.{key}": torch.as_tensor(value).clone() for key, value in state.items()}
    return found


def differing(before: dict[str, Tensor], after: dict[str, Tensor]) -> list[str]:
    """Names of what is not equal bit for bit (NaN equals NaN), or is on one side only."""
    changed = sorted(before.keys() ^ after.keys())
    for name in before.keys() & after.keys():
        left, right = before[name], after[name]
        if left.dtype != right.dtype or left.shape != right.shape or not torch.equal(_bits(left), _bits(right)):
            changed.append(name)
    return changed


def _bits(tensor: Tensor) -> Tensor:
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(kinds[tensor.element_size()]) if tensor.is_floating_point() else tensor
