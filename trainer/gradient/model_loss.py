"""The objective of a model that returns its own mean loss, as those of transformers do.

Such a model shifts its labels or does not, leaves some of them out, and returns one number; whoever weighs that number
by another count than the model's gets another gradient. So the count is not taken from the model's name but measured:
of the first micro-batch the loss is computed again from the logits, under every reading of `trainer.gradient.readings`,
and the reading that gives the model's own number is the one. It is held against it again at micro-batch 2, 4, 8, …
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from trainer import rng
from trainer.errors import ConfigError, ObjectiveError, did_you_mean
from trainer.gradient.objective import Sum
from trainer.gradient.readings import READINGS, Reading, are_classes
from trainer.gradient.report import FREE_READS, Number
from trainer.gradient.skips import KeptBuffers
from trainer.gradient.weights import first_tensor, host_number

_LABELS = ("labels", "shift_labels")


Fit = tuple[Reading, tuple[Any, Any], float, float]
"""A reading, the places of labels and logits, and there its total and its count."""
Count = Literal["shifted", "labels", "rows"] | Callable[[Any], Number]


class ModelLoss:
    """`model(**micro_batch).loss`, weighed by exactly what it is a mean of. Made by `model_loss`."""

    def __init__(self, count: Count | None = None, ignore_index: int = -100) -> None:
        if isinstance(count, str) and count not in ("shifted", "labels", "rows"):
            raise ConfigError(
                f"count={count!r} is not possible: {did_you_mean(count, ('shifted', 'labels', 'rows'))} "
                "Or give a function of the micro-batch."
            )
        self._told = count
        self._ignore_index = ignore_index
        self._reading: Reading | None = None
        self._guess: Reading | None = None  # while the first loss is not finite: that window is skipped in any case
        self._place: tuple[Any, Any] = (None, None)  # of the labels in a micro-batch, of the logits in an output
        self._calls = 0
        self._model: Any = None

    def bind(self, model: Any) -> None:
        """The step's model: it is run once more where a weight is asked for before its first forward."""
        self._model = model

    @property
    def what(self) -> str:
        """What the loss is a mean of, in words."""
        if callable(self._told):
            return "what count= says"
        if self._told == "rows":
            return "rows"
        reading = READINGS[self._told] if self._told else self._reading
        return reading.what if reading else "what the model's loss is a mean of, measured at the first micro-batch"

    def __call__(self, model: Any, micro_batch: Any) -> Tensor | Sum:
        output = _output(model, micro_batch)
        loss = _loss(output)
        if self._told is None:
            self._calls += 1
            if not self._calls & (self._calls - 1):
                self._look(loss, output, micro_batch, model)
            reading = self._reading
            if reading is not None:
                logits = _at(output, self._place[1])
                if torch.finfo(loss.dtype).bits < torch.finfo(logits.dtype).bits:
                    # Transformers casts logits to float32 before its losses, float64 too: half of the digits are gone.
                    total = reading.total(logits, _at(micro_batch, self._place[0]), self._ignore_index)
                    if total is not None:
                        return Sum(total, self.weight(micro_batch))
        if loss.device.type not in FREE_READS:
            # Of a micro-batch without a label that counts, the mean is 0 / 0. On the CPU its weight is read before.
            return torch.where(torch.as_tensor(self.weight(micro_batch)) > 0, loss, 0.0)
        return loss

    def weight(self, micro_batch: Any) -> Number:
        """How many labels (rows, elements) the model's loss of this micro-batch is a mean of."""
        if callable(self._told):
            return host_number(self._told(micro_batch))
        if self._told == "rows":
            return float(len(first_tensor(micro_batch)))
        if self._told is not None:
            return host_number(READINGS[self._told].count(self._labels(micro_batch), self._ignore_index))
        if self._reading is None and self._guess is None and self._model is not None:
            self._measure(micro_batch)
        reading = self._reading or self._guess
        if reading is None:
            raise ObjectiveError(
                "model_loss() is asked for a weight before the model's first forward, by which it measures what the "
                "loss is a mean of: give count= (shifted, labels, rows or a function of the micro-batch)."
            )
        return host_number(reading.count(_at(micro_batch, self._place[0]), self._ignore_index))

    def tokens(self, micro_batch: Any) -> int:
        """Labels, where a row has many; 0 elsewhere."""
        labels = next((one for name, one in _tensors(micro_batch) if name in _LABELS), None)
        return labels.numel() if labels is not None and labels.dim() > 1 and not labels.is_floating_point() else 0

    def _labels(self, micro_batch: Any) -> Tensor:
        found = _labels_of(micro_batch)
        if not found:
            raise ObjectiveError(f"the micro-batch ({type(micro_batch).__name__}) holds no labels to count.")
        return found[0][1]

    def _measure(self, micro_batch: Any) -> None:
        """Look by a forward of its own that leaves no trace: ranks sum their weights before the first forward."""
        buffers = KeptBuffers(self._model)
        buffers.keep()
        with rng.preserved(), torch.enable_grad():
            output = _output(self._model, micro_batch)
        buffers.put_back()
        self._look(_loss(output), output, micro_batch, self._model)

    def _look(self, loss: Tensor, output: Any, micro_batch: Any, model: Any) -> None:
        """Find the reading that gives the model's loss, or hold the one that was found against it."""
        readings = [self._reading] if self._reading else list(READINGS.values())
        places = [self._place] if self._reading else list(_places(output, micro_batch, loss))
        value = float(loss.detach())
        fitting: list[Fit] = []
        for place in places:
            labels, logits = _at(micro_batch, place[0]), _at(output, place[1])
            if not are_classes(labels, logits):
                continue
            for reading in readings:
                total = reading.total(logits.detach(), labels, self._ignore_index)
                if total is not None:
                    fitting.append((reading, place, float(total), float(reading.count(labels, self._ignore_index))))
        if not math.isfinite(value):
            self._not_finite(fitting, model)
            return
        width = max(1e-5, 4 * torch.finfo(loss.dtype).eps) * max(1.0, abs(value))
        found = [one for one in fitting if one[3] and abs(one[2] / one[3] - value) <= width]
        if len({count for *_, count in found}) > 1:
            found = self._by_gradient(found, loss, output, micro_batch)
        if len({count for *_, count in found}) != 1:
            raise ObjectiveError(self._cannot_tell(model, fitting, value, several=bool(found)))
        self._reading, self._place = found[0][:2]

    def _not_finite(self, fitting: list[Fit], model: Any) -> None:
        if self._reading is not None:
            return
        weighing = [one for one in fitting if one[3]]
        if not weighing:
            raise ObjectiveError(
                f"the first loss of {type(model).__name__} is a mean over nothing, so what it counts cannot be "
                "measured: give model_loss(count=…) (shifted, labels, rows or a function of the micro-batch)."
            )
        self._guess, self._place = weighing[0][:2]
        self._calls = 0

    def _by_gradient(self, found: list[Fit], loss: Tensor, output: Any, micro_batch: Any) -> list[Fit]:
        """Of readings that give the same number (logits that are all equal do), those that also give the gradient."""
        kept = []
        for reading, place, total, count in found:
            logits = _at(output, place[1])
            if not (loss.requires_grad and logits.requires_grad):
                continue
            (true,) = torch.autograd.grad(loss, logits, retain_graph=True, allow_unused=True)
            leaf = logits.detach().requires_grad_()
            with torch.enable_grad():
                again = reading.total(leaf, _at(micro_batch, place[0]), self._ignore_index)
            if true is None or again is None:
                continue
            (read,) = torch.autograd.grad(again / count, leaf)
            if float((true - read).abs().max()) <= max(1e-3, 4 * torch.finfo(true.dtype).eps) * float(read.abs().max()):
                kept.append((reading, place, total, count))
        return kept

    def _cannot_tell(self, model: Any, fitting: list[Fit], value: float, several: bool) -> str:
        name = type(model).__name__
        advice = "give model_loss(count=…): shifted, labels, rows, or a function of the micro-batch."
        if several:
            return f"the loss of {name} is the same number over different counts of labels: {advice}"
        if self._reading is not None:
            return (
                f"micro-batch {self._calls}: the loss of {name} is {value:.6g} and no longer the mean over "
                f"{self._reading.what}, as it was before: {advice}"
            )
        means = ", ".join(f"{total / count:.6g} over {count:g} {one.what}" for one, _, total, count in fitting if count)
        tried = f"it would be {means}" if means else "its output has no logits that fit labels of the micro-batch"
        return f"what the loss of {name} ({value:.6g}) is a mean of cannot be told ({tried}): {advice}"

    def __repr__(self) -> str:
        return f"model_loss(), weighed by {self.what}"


def model_loss(count: Count | None = None, ignore_index: int = -100) -> ModelLoss:
    """The objective of a model that computes its loss itself, a Hugging Face model among them.

    A micro-batch is a mapping, which the model is given as keywords, or a tuple, given in its order. The loss is the
    output's `loss`, or the one scalar of a tuple. What it is a mean of is measured (see above), and where that cannot
    be told, an ObjectiveError says so.

    Args:
        count: says what the loss is a mean of, where it shall not be measured: `shifted` (labels after each row's
            first, as in causal language models), `labels`, `rows`, or a function of the micro-batch.
        ignore_index: the label that counts for nothing.
    """
    return ModelLoss(count, ignore_index)


def _output(model: Any, micro_batch: Any) -> Any:
    if isinstance(micro_batch, Mapping):
        return model(**micro_batch)
    if isinstance(micro_batch, list | tuple):
        return model(*micro_batch)
    raise ObjectiveError(
        f"model_loss() needs micro-batches that are mappings of the model's keywords, or tuples, not "
        f"{type(micro_batch).__name__}."
    )


def _loss(output: Any) -> Tensor:
    loss = _parts(output).get("loss")
    if loss is None and isinstance(output, tuple | list):
        scalars = [one for one in output if isinstance(one, Tensor) and one.is_floating_point() and one.numel() == 1]
        loss = scalars[0] if len(scalars) == 1 else None
    if not isinstance(loss, Tensor):
        raise ObjectiveError(
            f"the model returned {type(output).__name__} without a loss: models of transformers return one where the "
            "micro-batch has 'labels'."
        )
    if loss.numel() != 1:
        raise ObjectiveError(f"the model's loss has shape {tuple(loss.shape)}: model_loss() takes one number, a mean.")
    return loss


def _parts(value: Any) -> Mapping[Any, Any]:
    """What a mapping, a sequence or an object holds, by key, index or name."""
    if isinstance(value, Mapping):
        return value
    return dict(enumerate(value)) if isinstance(value, list | tuple) else vars(value)


def _tensors(value: Any) -> list[tuple[Any, Tensor]]:
    return [(place, item) for place, item in _parts(value).items() if isinstance(item, Tensor)]


def _labels_of(micro_batch: Any) -> list[tuple[Any, Tensor]]:
    """What may be the labels: what is called so, else every tensor, the last first."""
    tensors = _tensors(micro_batch)
    return [pair for pair in tensors if pair[0] in _LABELS] or tensors[::-1]


def _places(output: Any, micro_batch: Any, loss: Tensor) -> Iterator[tuple[Any, Any]]:
    tensors = [(place, one) for place, one in _tensors(output) if one is not loss and one.is_floating_point()]
    logits = [pair for pair in tensors if pair[0] == "logits"] or [pair for pair in tensors if pair[1].dim()]
    for label_place, _ in _labels_of(micro_batch):
        for logit_place, _ in logits:
            yield label_place, logit_place


def _at(value: Any, place: Any) -> Tensor:
    found: Tensor = _parts(value)[place]
    return found
