"""Two gradients side by side, parameter by parameter, and what rounding alone can do to them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.certificate.reference import Gradient

UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
"""The unit roundoff u of each type: half the distance between 1 and the next number."""
TIMES = 4.0
"""How many floors a difference must exceed. The floor is one draw of a rounding error, and so is what is held against
it: of two draws from one distribution the one is now and then a few times the other."""


@dataclass(frozen=True)
class Line:
    """One parameter's gradient against its reference.

    - `error`: ‖g - r‖ / ‖r‖; infinite where the reference is zero and the gradient is not.
    - `cosine`: of the angle between them.
    - `signs`: the share of elements (not zero in the reference) whose sign agrees.
    - `zeros`: the share of elements that are zero here and not in the reference.
    - `floor`: what rounding explains of `error`.
    - `excess`: the difference over TIMES the floor; above 1 it is beyond rounding.
    """

    name: str
    error: float
    cosine: float
    signs: float
    zeros: float
    floor: float
    excess: float


Floors = dict[str, float]
"""The size ‖error‖ that rounding explains, for each parameter: absolute, as a gradient may be zero but for rounding."""


def lines(found: Gradient, reference: Gradient, floors: Floors) -> list[Line]:
    """Every parameter that has a gradient on either side, the worst first."""
    made = [
        _line(name, found.get(name), reference.get(name), floors.get(name, 0.0))
        for name in sorted(found.keys() | reference.keys())
    ]
    return sorted(made, key=lambda line: (-line.excess, -line.error, line.name))


def _line(name: str, found: Tensor | None, reference: Tensor | None, floor: float) -> Line:
    right = _real(reference) if reference is not None else torch.zeros_like(_real(found))  # type: ignore[arg-type]
    left = _real(found) if found is not None else torch.zeros_like(right)
    left = left.to(right.device)
    if not bool(left.isfinite().all()):
        return Line(name, math.inf, math.nan, 0.0, 0.0, _over(floor, float(right.norm())), math.inf)
    size, difference = float(right.norm()), float((left - right).norm())
    nonzero = right != 0
    count = max(1, int(nonzero.sum()))
    product = size * float(left.norm())
    return Line(
        name,
        _over(difference, size),
        float((left * right).sum()) / product if product else (1.0 if difference == 0.0 else 0.0),
        float(((left.sign() == right.sign()) & nonzero).sum()) / count if bool(nonzero.any()) else 1.0,
        float(((left == 0) & nonzero).sum()) / count if bool(nonzero.any()) else 0.0,
        _over(floor, size),
        _over(difference, TIMES * floor),
    )


def worst(found: Gradient, reference: Gradient, floors: Floors) -> float:
    """The largest excess over rounding; 1 or less is agreement."""
    return max((line.excess for line in lines(found, reference, floors)), default=0.0)


def error(found: Gradient, reference: Gradient) -> float:
    """‖g - r‖ / ‖r‖ of the whole gradient as one vector."""
    return _over(distance(found, reference), norm(reference))


def distance(found: Gradient, reference: Gradient) -> float:
    return math.hypot(*_distances(found, reference).values())


def norm(gradient: Gradient) -> float:
    return math.hypot(*(float(_real(one).norm()) for one in gradient.values()))


def floors(reference: Gradient, narrow: Gradient, shaken: Sequence[Gradient], unit: float) -> Floors:
    """What a computation of unit roundoff `unit` can make of the reference, for each parameter as ‖error‖.

    The largest of: u × ‖r‖; the float32 computation's own error × u / u(float32), of the parameter and, relative to its
    norm, of the whole; and how far the reference itself moves when its parameters and inputs are changed by no more
    than u, which is what the precision cannot see (kinks of ReLU and max included, which do not scale with u).

    Args:
        narrow: the reference once more in float32.
        shaken: the reference with parameters and inputs changed by that much, at random.
    """
    scale = unit / UNIT[torch.float32]
    own = _distances(narrow, reference)
    whole = max(unit, error(narrow, reference) * scale)
    moved = [_distances(one, reference) for one in shaken]
    found = {}
    for name in reference.keys() | narrow.keys():
        size = float(_real(reference[name]).norm()) if name in reference else 0.0
        tiny = torch.finfo(torch.float32).tiny * unit
        found[name] = max(whole * size, own.get(name, 0.0) * scale, *(one.get(name, 0.0) for one in moved), tiny)
    return found


def _distances(found: Gradient, reference: Gradient) -> dict[str, float]:
    return {name: _distance(found.get(name), reference.get(name)) for name in found.keys() | reference.keys()}


def _distance(left: Tensor | None, right: Tensor | None) -> float:
    if left is None or right is None:
        only = left if left is not None else right
        return 0.0 if only is None else float(_real(only).norm())
    one, other = _real(left), _real(right)
    return float((one.to(other.device) - other).norm())


def _real(tensor: Tensor) -> Tensor:
    if tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    tensor = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    return tensor.detach().double() if tensor.device.type != "mps" else tensor.detach().cpu().double()


def _over(one: float, other: float) -> float:
    if other:
        return one / other
    return 0.0 if one == 0.0 else math.inf


def shares(parts: Sequence[Gradient], target: Gradient) -> tuple[list[float], float] | None:
    """The factors c with which Σ c_i · part_i comes nearest to the target, and what is left over, relative to it.

    None where the parts are so alike that the factors cannot be told.
    """
    names = sorted({name for part in (*parts, target) for name in part})

    def flat(gradient: Mapping[str, Tensor]) -> Tensor:
        sizes = {name: next(_real(one[name]) for one in (*parts, target) if name in one) for name in names}
        kept = [_real(gradient[name]) if name in gradient else torch.zeros_like(sizes[name]) for name in names]
        return torch.cat([one.reshape(-1).cpu() for one in kept])

    columns = torch.stack([flat(part) for part in parts], 1)
    right = flat(target)
    if columns.shape[0] <= columns.shape[1] or not bool(right.norm()):
        return None
    singular = torch.linalg.svdvals(columns)
    if float(singular[-1]) < 1e-6 * float(singular[0]):
        return None
    found = torch.linalg.lstsq(columns, right).solution
    left = float((columns @ found - right).norm() / right.norm())
    return [float(one) for one in found], left


def norm_floor(floors: Floors, reference: Gradient) -> float:
    """The floors of all parameters together, relative to the whole gradient."""
    return _over(math.hypot(*floors.values()), norm(reference))
