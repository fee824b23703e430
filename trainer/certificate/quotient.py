"""A backward against the difference quotient of its forward, at a few elements, by torch's gradcheck in float64."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainer import rng
from trainer.certificate.batches import mapped

EPS = 1e-6
_ATOL, _RTOL = 1e-5, 1e-3
_MOST_OUTPUTS = 8
_BESIDE = 3
"""So many other places are tried where a quotient and a backward differ."""


class UncheckedError(Exception):
    """It cannot be checked; the sentence says why."""


@dataclass(frozen=True)
class Wrong:
    """The first input whose gradient is wrong: the element, what backward says of it, and the difference quotient."""

    name: str
    element: int
    value: float
    output: int | None
    analytical: float
    numerical: float

    @property
    def error(self) -> float:
        return abs(self.analytical - self.numerical) / max(abs(self.analytical), abs(self.numerical))

    def __str__(self) -> str:
        what = "all outputs together" if self.output is None else f"output {self.output}"
        return (
            f"for element {self.element} of '{self.name}' ({self.value:.4g}) and {what}, backward gives "
            f"{self.analytical:.4g} and the difference quotient {self.numerical:.4g}"
        )


@dataclass
class Subject:
    """Something with inputs by name; `call` is given some of them in place of those that it was met with."""

    inputs: Mapping[str, Tensor]
    call: Callable[[Mapping[str, Tensor]], Any]


class Function:
    """The outputs as a function of one input, all in one flat vector. Each call draws the same."""

    def __init__(self, subject: Subject, name: str) -> None:
        self.name = name
        self._subject = subject
        self._draws = rng.Rewind()
        self._draws.mark()

    def __call__(self, value: Tensor) -> Tensor:
        self._draws.back()
        outputs: list[Tensor] = []

        def take(tensor: Tensor) -> Tensor:
            one = torch.view_as_real(tensor) if tensor.is_complex() else tensor
            if one.is_floating_point():
                outputs.append(one.reshape(-1))
            return tensor

        mapped(self._subject.call({self.name: value}), take)
        narrow = [one.dtype for one in outputs if one.dtype is not torch.float64]
        if narrow:
            raise UncheckedError(f"computes in {str(narrow[0]).removeprefix('torch.')} whatever it is given")
        return torch.cat(outputs) if outputs else value.new_zeros(1, dtype=torch.float64)


def look(function: Function, value: Tensor, most: int) -> tuple[Wrong | None, bool]:
    """(what is wrong, whether it is right only beside the values that it was met with)."""
    flat = (torch.view_as_real(value) if value.is_complex() else value).reshape(-1)
    if not flat.numel():
        return None, False
    # From the smallest value to the largest, so that a function of several pieces is met in each.
    elements = flat.argsort()[torch.linspace(0, flat.numel() - 1, min(most, flat.numel())).long().to(flat.device)]
    first: tuple[Tensor, Tensor, Tensor] | None = None
    wrong = torch.ones(len(elements), dtype=torch.bool, device=flat.device)

    def outputs(given: Tensor, at: Tensor) -> Tensor:
        whole = at.index_copy(0, elements, given)
        if value.is_complex():
            return function(torch.view_as_complex(whole.view(*value.shape, 2)))
        return function(whole.view(value.shape))

    for attempt in range(1 + _BESIDE):
        at = flat if not attempt else _beside(flat, attempt)

        start = at[elements]
        usual = outputs(start, at).detach()
        mixing = torch.randn(len(usual), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        mixing = mixing.to(usual.device).where(usual.isfinite(), 0.0)

        def mixed(given: Tensor, at: Tensor = at, usual: Tensor = usual, mixing: Tensor = mixing) -> Tensor:
            # Without what does not change, whose rounding would be in the quotient.
            return ((outputs(given, at) - usual).where(mixing != 0.0, 0.0) * mixing).sum()

        analytical, numerical = _analytical(mixed, start), _numerical(mixed, start)
        size = float(torch.maximum(analytical.abs(), numerical.abs()).max())
        if not math.isfinite(size):
            raise UncheckedError(f"or its derivative is not finite at the '{function.name}' that it was met with")
        noise = torch.finfo(torch.float64).eps / EPS * float((usual.nan_to_num() * mixing).norm())
        if size <= 1e3 * noise:
            return None, attempt > 0  # a derivative of zero, as far as a quotient can tell
        tolerance = max(_ATOL, 10 * noise / size)
        if _passes(mixed, start, size, tolerance):
            return None, attempt > 0
        wrong &= (analytical - numerical).abs() > tolerance * size + _RTOL * numerical.abs()
        first = first or (start, analytical, numerical)
    if first is None or not wrong.any():
        raise UncheckedError("has a forward that jumps, or a backward that comes out otherwise each time")
    start, analytical, numerical = first
    worst = int(((analytical - numerical).abs() * wrong).argmax())
    element, at_worst = int(elements[worst]), float(start[worst])
    single = _single(lambda given: outputs(given, flat), start, worst, element)
    return Wrong(
        function.name, element, at_worst, *(single or (None, float(analytical[worst]), float(numerical[worst])))
    ), False


def _single(
    function: Callable[[Tensor], Tensor], start: Tensor, worst: int, element: int
) -> tuple[int, float, float] | None:
    """One output that shows it: (which, backward's number, the quotient)."""
    step = torch.zeros_like(start)
    step[worst] = EPS
    with torch.no_grad():
        column = ((function(start + step) - function(start - step)) / (2 * EPS)).nan_to_num()
    likely = {*column.abs().topk(min(_MOST_OUTPUTS, len(column))).indices.tolist(), min(element, len(column) - 1)}
    found = []
    for output in likely:
        leaf = start.clone().requires_grad_()
        value = function(leaf)[output]
        given = torch.autograd.grad(value, leaf, allow_unused=True)[0] if value.requires_grad else None
        found.append((output, 0.0 if given is None else float(given[worst]), float(column[output])))
    output, analytical, numerical = max(found, key=lambda one: abs(one[1] - one[2]))
    is_off = abs(analytical - numerical) > _RTOL * max(abs(analytical), abs(numerical))
    return (output, analytical, numerical) if is_off else None


def _passes(function: Callable[[Tensor], Tensor], start: Tensor, size: float, tolerance: float) -> bool:
    """Its tolerances are absolute too, so the derivative is brought near one."""
    return bool(
        torch.autograd.gradcheck(
            lambda given: function(given) / size,
            (start.clone().requires_grad_(),),
            eps=EPS,
            atol=tolerance,
            rtol=_RTOL,
            nondet_tol=1e-9,
            check_undefined_grad=False,
            raise_exception=False,
        )
    )


def _analytical(function: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    leaf = start.clone().requires_grad_()
    value = function(leaf)
    if not torch.equal(value, function(leaf)):
        raise UncheckedError("comes out otherwise each time, with the same inputs and draws")
    found = torch.autograd.grad(value, leaf, allow_unused=True)[0] if value.requires_grad else None
    return torch.zeros_like(start) if found is None else found


def _numerical(function: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    found = torch.zeros_like(start)
    with torch.no_grad():
        for index in range(len(start)):
            step = torch.zeros_like(start)
            step[index] = EPS
            found[index] = (function(start + step) - function(start - step)) / (2 * EPS)
    return found


def _beside(flat: Tensor, attempt: int) -> Tensor:
    """Other values of the same signs, none near zero, each some per cent away: off a kink that many may lie on."""
    generator = torch.Generator().manual_seed(attempt)
    share = torch.rand(flat.shape, generator=generator, dtype=torch.float64).to(flat)
    least = 1e-3 * max(1.0, float(flat.abs().max()))
    sign = torch.where(flat == 0, torch.where(share > 0.5, 1.0, -1.0).to(flat), flat.sign())
    return sign * flat.abs().clamp(min=least) * (1 + 0.05 * share)
