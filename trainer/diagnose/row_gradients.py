"""The norms of the gradients of single rows: all rows of a piece at once, or where that is refused one by one.

At once means torch.func: vmap over the rows of grad of the objective. It refuses an objective that reads its values, a
custom Function without setup_context, saved-tensor hooks, and a model that is a plain object.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trainer.data.rows import changed, rows_at
from trainer.errors import TrainerError
from trainer.gradient.objective import Cotangents, Sum, terms_of
from trainer.gradient.weigher import Weigher
from trainer.gradient.weights import not_zero

_MEMORY = 64 << 20
"""Bytes of gradients of single rows that are held at once."""


class RowGradients:
    """Called with a micro-batch: the norm of each row's gradient, and each row's loss, as float64 on the CPU.

    A row's gradient is the one that a window of this row alone would have.

    Args:
        parameters: those whose gradient counts, by name.
        coefficients: factors of named terms.

    Attributes:
        notes: what the user should know of how it was done.
    """

    def __init__(
        self,
        model: Any,
        objective: Callable[[Any, Any], Any],
        parameters: Mapping[str, Tensor],
        coefficients: Mapping[str, float],
        weigher: Weigher,
    ) -> None:
        self.notes: list[str] = []
        self._model, self._objective, self._coefficients, self._weigher = model, objective, coefficients, weigher
        self._parameters = {name: one for name, one in parameters.items() if one.requires_grad}
        size = sum(one.numel() * one.element_size() for one in self._parameters.values())
        self._piece = _MEMORY // max(1, size)
        self._together: Any = None
        if not isinstance(model, nn.Module):
            self._one_by_one(f"{type(model).__name__} is a plain object")
        elif self._piece < 2:
            self._one_by_one(f"two gradients are more than {_MEMORY >> 20} MiB")
        else:
            bound = _Bound(model, objective)
            self._together = lambda given, rows: self._value(torch.func.functional_call(bound, given, (rows,)))

    def __call__(self, micro_batch: Any) -> tuple[Tensor, Tensor]:
        count = self._weigher.rows(micro_batch)
        if self._together is not None:
            # The step's own words for an answer that is none, which would be lost in a vmap.
            terms_of(self._objective(self._model, rows_at(micro_batch, [0], count)), self._objective)
            try:
                return self._at_once(micro_batch, count)
            except TrainerError:
                raise
            except Exception as error:  # RuntimeError as a rule, and whatever code makes of a batched tensor
                first = (str(error).strip() or type(error).__name__).splitlines()[0]
                self._together = None
                self._one_by_one(f"torch.func refuses: {first[:160]}")
        found = [self._single(rows_at(micro_batch, [row], count)) for row in range(count)]
        return _numbers([norm for norm, _ in found]), _numbers([loss for _, loss in found])

    def _one_by_one(self, why: str) -> None:
        self.notes.append(f"one row after the other, which is slow: {why}")

    def _at_once(self, micro_batch: Any, count: int) -> tuple[Tensor, Tensor]:
        norms, losses = [], []
        for start in range(0, count, self._piece):
            piece = rows_at(micro_batch, range(start, min(count, start + self._piece)), count)
            rows = min(count, start + self._piece) - start
            own: list[Tensor] = []
            changed(piece, rows, own.append, _no_lists)

            def value(given: dict[str, Tensor], *single: Tensor, piece: Any = piece, rows: int = rows) -> Any:
                parts = iter(single)
                row = changed(piece, rows, lambda tensor: next(parts).unsqueeze(0), _no_lists)
                loss = self._together({f"model.{name}": one for name, one in given.items()}, row)
                return loss, loss.detach()

            given = {name: one.detach() for name, one in self._parameters.items()}
            of_each = torch.func.vmap(
                torch.func.grad(value, has_aux=True),
                in_dims=(None, *(0 for _ in own)),
                randomness="different",
            )
            gradients, values = of_each(given, *own)
            norms.append(_norms(list(gradients.values())))
            losses.append(values.reshape(-1))
        return _numbers(norms), _numbers(losses)

    def _single(self, row: Any) -> tuple[Tensor, Tensor]:
        answer = self._objective(self._model, row)
        terms_of(answer, self._objective)
        loss = self._value(answer)
        if not loss.requires_grad:
            return torch.zeros(()), loss.detach()
        found = torch.autograd.grad(loss, list(self._parameters.values()), allow_unused=True)
        return _norms([one.to_dense().unsqueeze(0) for one in found if one is not None])[0], loss.detach()

    def _value(self, answer: Any) -> Tensor:
        """The terms of one row, each divided by its weight, with their coefficients."""
        named = answer if isinstance(answer, Mapping) else {"": answer}
        values = []
        for name, one in named.items():
            if isinstance(one, Sum):
                value = one.total / _weight(one.weight)
            elif isinstance(one, Cotangents):
                product = one.outputs * one.vector.to(one.outputs).conj()
                value = (product.real if product.is_complex() else product).sum() / _weight(one.weight)
            else:
                value = one
            values.append(value.reshape(()) * self._coefficients.get(str(name), 1.0))
        total: Tensor = sum(values[1:], values[0])
        return total


class _Bound(nn.Module):
    """The model and its objective as one module, so that torch.func can give it other parameters."""

    def __init__(self, model: nn.Module, objective: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        self.model = model
        self._objective = [objective]  # in a list, as one that is a module would be registered

    def forward(self, micro_batch: Any) -> Any:
        return self._objective[0](self.model, micro_batch)


def _weight(weight: Any) -> Any:
    return not_zero(weight.detach() if isinstance(weight, Tensor) else float(weight))


def _no_lists(items: Any) -> Any:
    raise TypeError(f"a {type(items).__name__} of the micro-batch has an item for each row")


def _norms(gradients: list[Tensor]) -> Tensor:
    """Over all of them, for each entry of their first dimension."""
    if not gradients:
        return torch.zeros(1)
    squares = [torch.linalg.vector_norm(one.flatten(1), dim=1, dtype=_wide(one)).real.square() for one in gradients]
    return torch.stack([square.to(squares[0].device) for square in squares]).sum(dim=0).sqrt()


def _wide(gradient: Tensor) -> torch.dtype:
    if gradient.is_complex():
        return torch.complex128
    return torch.float32 if gradient.device.type == "mps" else torch.float64


def _numbers(values: list[Tensor]) -> Tensor:
    return torch.cat([value.detach().reshape(-1).cpu().double() for value in values])
