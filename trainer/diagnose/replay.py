"""A window run again, to name what made a number in it that is not finite.

Each micro-batch goes through its forward and backward as it did in the step: the same parameters, buffers, generators,
precision and seeds. The first of which the loss or a gradient is not finite is then looked at (`nonfinite`). Where all
of them are finite by themselves, it may be their sum, their norm or the division by the window's weight.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer import rng
from trainer.checkpoint import changes
from trainer.checkpoint.of_model import load_model, model_state
from trainer.data.sources import place
from trainer.diagnose.capture import Captured, buffers_of, load
from trainer.diagnose.nonfinite import Culprit, Suspect, culprit, listed
from trainer.diagnose.numbers import FINITE, bad, is_finite, level
from trainer.diagnose.origin import gradients
from trainer.errors import CheckpointError, ConfigError, DivergedError
from trainer.gradient.objective import as_objective, terms_of
from trainer.gradient.open_window import OpenWindow
from trainer.gradient.parameters import named_modules, named_parameters
from trainer.gradient.precision import autocast, width
from trainer.gradient.report import Number
from trainer.gradient.skips import KeptBuffers
from trainer.gradient.weigher import Weigher
from trainer.settings import GradientSettings, validated


@dataclass(frozen=True)
class Replay:
    """What a window did when it was run again.

    - `micro_batch`: the one that went wrong, counted from 0; None where none did by itself.
    - `culprit`: what made it so; None where everything stayed finite.
    - `data_rows`: the rows of the data that the culprit's rows are, where that is known.
    - `of_window`: a sentence where the micro-batches are finite and what is made of them together is not.
    - `notes`: what is not as it was when the window was caught.
    """

    what: str
    micro_batches: int
    micro_batch: int | None = None
    culprit: Culprit | None = None
    data_rows: list[int] | None = None
    of_window: str | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def finite(self) -> bool:
        """Whether everything stayed finite."""
        return self.micro_batch is None and self.of_window is None

    @property
    def exit_code(self) -> int:
        """0 where everything stayed finite, else that of a run that diverged (4)."""
        return 0 if self.finite else DivergedError.exit_code

    def __str__(self) -> str:
        lines = [self.what]
        if self.micro_batch is not None:
            where = f"micro-batch {self.micro_batch + 1} of {self.micro_batches}"
            unseen = "its loss or a gradient is not finite, and was when every call was looked at: it is not always so."
            lines.append(f"{where}: {self.culprit if self.culprit is not None else unseen}")
            if self.data_rows is not None:
                lines.append(f"  rows of the data: {listed(self.data_rows)}")
        elif self.of_window is not None:
            lines.append(self.of_window)
        else:
            of = "the micro-batch" if self.micro_batches == 1 else f"each of the {self.micro_batches} micro-batches"
            lines.append(f"all stays finite: the loss and every gradient of {of}, and the whole gradient.")
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for machines."""
        found = self.culprit
        place = found.place if found is not None else None
        return {
            "what": self.what,
            "finite": self.finite,
            "micro_batch": self.micro_batch,
            "micro_batches": self.micro_batches,
            "culprit": None
            if found is None
            else {**vars(found), "place": None if place is None else {"file": place.file, "line": place.line}},
            "data_rows": self.data_rows,
            "of_window": self.of_window,
            "notes": self.notes,
        }


def replay(
    what: str | Path | Captured,
    model: Any,
    objective: Any,
    *,
    count_rows: Callable[[Any], int] | None = None,
    rows: bool = True,
) -> Replay:
    """Run a captured window again and name what made a number in it that is not finite.

    Args:
        what: the window's folder, a run's folder (its first window), or what `capture` has returned.
        model: of the same shapes. It is as it was afterwards.
        objective: as the step has it.
        count_rows: as the step has it.
        rows: whether to look for the rows that are enough (up to 200 runs of the micro-batch).

    Raises CheckpointError where the folder is damaged or does not fit the model; what the objective raises.
    """
    caught = what if isinstance(what, Captured) else load(what)
    if isinstance(model, type) or model is None:
        raise ConfigError("replay() needs the model itself: replay(path, model, objective).")
    with rng.preserved(), _as_it_was(model, caught):
        if caught.generators is not None:
            rng.restore(caught.generators)
        return _Window(caught, model, as_objective(objective, model), count_rows).run(rows)


class _Window:
    def __init__(self, caught: Captured, model: Any, objective: Any, count_rows: Callable[[Any], int] | None) -> None:
        self._caught = caught
        self._model = model
        self._objective = objective
        self._device = next(iter(named_parameters(model).values())).device
        settings = validated(GradientSettings, caught.gradient, "gradient")
        dtype = width(caught.precision)
        self._batches = [place(one, self._device, dtype) for one in caught.micro_batches()]
        opening: Any = _Divisors(caught.expected) if caught.world_size > 1 else None
        weigher = Weigher(objective, count_rows)
        self._open = OpenWindow(settings, weigher, self._batches, caught.expected, caught.loss_scale, opening)
        self._settings = settings
        self._wanted = frozenset(caught.trained)
        self._sums: dict[str, Tensor] = {}

    def run(self, rows: bool) -> Replay:
        caught = self._caught
        made = Replay(_head(caught), len(self._batches), notes=self._notes())
        for index, micro_batch in enumerate(self._batches):
            suspect = self._suspect(micro_batch)
            before = KeptBuffers(self._model)
            before.keep()
            whole = self._finite(suspect)
            if not whole:
                before.put_back()
                found = culprit(suspect, with_rows=rows)
                return replace(made, micro_batch=index, culprit=found, data_rows=self._data_rows(index, found))
            wrong = next((name for name, gradient in self._sums.items() if not is_finite(gradient)), None)
            if wrong is not None:
                sums = f"the sum of the gradient of '{wrong}' over micro-batches 1 to {index + 1}"
                return replace(made, of_window=f"{sums} is {bad(self._sums[wrong])}, and each of them is finite.")
            self._open.count(micro_batch)
        return replace(made, of_window=self._of_sums())

    def _suspect(self, micro_batch: Any) -> Suspect:
        """The micro-batch with the generators as they are now."""
        inside = autocast(self._caught.precision, self._device.type)
        return Suspect(
            self._model,
            self._objective,
            micro_batch,
            seeds={},
            around=nullcontext if inside is None else lambda: inside,
            state=rng.capture(),
            wanted=self._wanted,
        )

    def _finite(self, suspect: Suspect) -> bool:
        """Run the micro-batch as the step does, add its gradient, and find the seeds; whether all of it is finite."""
        with suspect.around():
            answer = self._objective(self._model, suspect.micro_batch)
        terms = terms_of(answer, self._objective)
        seeds: Any = suspect.seeds
        for term in terms:
            seed = self._open.seed(replace(term, vector=None), suspect.micro_batch, alone=len(terms) == 1)
            if seed is not None:
                seeds[term.name] = float(seed.flatten()[0].real)
        counted, starts = suspect.roots(answer)
        if any(level(term.value) != FINITE for term in counted):
            return False
        leaves = suspect.leaves()
        found = gradients([term.value for term in counted], starts, list(leaves.values()))
        for name, gradient in zip(leaves, found, strict=True):
            if gradient is not None:
                if not is_finite(gradient):
                    return False
                self._sums[name] = self._sums[name] + gradient if name in self._sums else gradient
        return True

    def _of_sums(self) -> str | None:
        """What is not finite although every sum is."""
        order = self._settings.norm_order
        parts = [torch.linalg.vector_norm(_dense(one), order) for one in self._sums.values()]
        norm = torch.linalg.vector_norm(torch.stack([one.to(self._device) for one in parts]), order) if parts else None
        leftover = float(self._open.leftover()) * self._caught.loss_scale
        for name, gradient in self._sums.items():
            if not is_finite(_dense(gradient) / leftover):
                return f"the gradient of '{name}' overflows when it is divided by the window's weight, {leftover:g}."
        if norm is not None and not is_finite(norm) and self._settings.clip_norm is not None:
            largest = max(float(_dense(one).abs().max()) for one in self._sums.values() if one.numel())
            return f"every gradient is finite (the largest number is {largest:.4g}), and their norm is {bad(norm)}."
        return None

    def _data_rows(self, index: int, found: Culprit | None) -> list[int] | None:
        rows = self._caught.rows
        if rows is None or found is None or found.rows is None or index >= len(rows):
            return None
        return [int(rows[index][row]) for row in found.rows if row < len(rows[index])]

    def _notes(self) -> list[str]:
        caught = self._caught
        before, now = caught.machine, changes.machine(self._device)
        other = [f"{what} {before.get(what)} → {now[what]}" for what in now if before.get(what) != now[what]]
        said = [f"not the machine that captured it ({', '.join(other)}): the last bits may differ."] if other else []
        if caught.generators is None:
            said.append("the random generators were not kept: what the forward draws is another draw.")
        elif caught.unknown:
            which = " and ".join(caught.unknown)
            said.append(f"the state of the generator {which} was not known: what it draws is another draw.")
        if caught.world_size > 1:
            said.append(f"this is the window of rank {caught.rank} of {caught.world_size}, run by itself.")
        if self._settings.zero_grad == "never":
            said.append("zero_grad=never adds the gradient of earlier windows, which is not kept.")
        return said


class _Divisors:
    """What a window was divided by over all ranks, which the last one that ended has left."""

    def __init__(self, expected: Mapping[str, float]) -> None:
        self._expected = expected

    def here(self, name: str) -> list[Number] | None:
        return None

    def divisor(self, name: str, weight: Number, means: bool) -> tuple[Number, bool]:
        return self._expected.get(name, weight), True


@contextmanager
def _as_it_was(model: Any, caught: Captured) -> Iterator[None]:
    """The model with the numbers and the modes of the window's start; afterwards with its own again."""
    path = caught.path or Path("the captured window")
    modules, parameters = named_modules(model), named_parameters(model)
    own = {name: tensor.detach().clone() for name, tensor in model_state(model).items()}
    own_buffers = {name: buffer.clone() for name, buffer in buffers_of(model).items()}
    modes = [(module, module.training) for module in modules.values()]
    needs = [(parameter, parameter.requires_grad) for parameter in parameters.values()]
    for name in caught.trained:
        if name not in parameters and not name.startswith("optimizer"):
            raise CheckpointError(f"{path} trains '{name}', which the model has not.")
    load_model(model, caught.model, path)
    try:
        _put(buffers_of(model), caught.buffers, path)
        for name, module in modules.items():
            module.training = name not in caught.in_eval
        for name, parameter in parameters.items():
            parameter.requires_grad_(name not in caught.frozen)
        yield
    finally:
        for parameter, needed in needs:
            parameter.requires_grad_(needed)
        for module, training in modes:
            module.training = training
        load_model(model, own, path)
        _put(buffers_of(model), own_buffers, path)


@torch.no_grad()
def _put(buffers: Mapping[str, Tensor], values: Mapping[str, Tensor], path: Path) -> None:
    for name, value in values.items():
        if name not in buffers or buffers[name].shape != value.shape:
            raise CheckpointError(f"{path}: the buffer '{name}' does not fit the model.")
        buffers[name].copy_(value)


def _dense(gradient: Tensor) -> Tensor:
    return gradient if gradient.layout is torch.strided else gradient.coalesce().values()


def _head(caught: Captured) -> str:
    clocks = caught.clocks
    place = f"{caught.path.as_posix()}: " if caught.path is not None else ""
    scale = f", in {caught.precision} with loss scale {caught.loss_scale:g}" if caught.precision == "fp16" else ""
    count = len(caught.window)
    size = "1 micro-batch" if count == 1 else f"{count} micro-batches"
    return f"{place}the window after step {clocks.get('steps', 0):,}, of {size}{scale}: {caught.why}"
