"""A table of your own, by an MLP: regression or classification.

trainer train recipe=tabular data.source.path=my.csv data.source.target=price
"""

import sys
from collections.abc import Sequence
from typing import Any, Literal

import numpy
import torch
from torch import Tensor, nn
from torch.nn import functional
from trainer.recipes.tables import Column, Columns, read

from trainer.data import Split
from trainer.errors import ConfigError, DataError, did_you_mean
from trainer.gradient.objective import Sum

MOST_VALUES = 100
"""A column of categories has at most so many values: each becomes an input."""
FEW_CLASSES = 10
"""Whole numbers with at most so many values are taken for classes, where the task is not told."""


class Table(Split):
    """Inputs of shape (rows, inputs), as they stand in the file, and targets of shape (rows,).

    Targets are float32 in a regression, and int64 numbers of `classes` in a classification.
    """

    inputs: list[str]
    """Names: a column's own, or column=value for each value of a column of categories."""
    classes: list[str] | None
    """In a classification the values of the target, in order."""
    story: str
    """What was made of the file, in a sentence or two."""


def table(
    path: str,
    target: str,
    task: Literal["regression", "classification"] | None = None,
    categories: Sequence[str] = (),
    leave_out: Sequence[str] = (),
    held_out: float = 0.2,
    seed: int = 0,
    delimiter: str = "comma",
) -> Table:
    """The table in a file; see `tables.read`.

    Args:
        path: a file with the ending .csv, .npz or .parquet.
        target: the column to learn.
        task: regression or classification; None: text, truth values and a few whole numbers are classes.
        categories: columns whose values are names, not amounts. Each value of the training rows becomes an input that
            is 1 where the row has it; a value that only held-out rows have leaves all of them 0.
        leave_out: columns that are no inputs.
        held_out: the part of the rows that is held out, drawn by `seed` alone.
        delimiter: what parts the cells of a CSV file: comma, semicolon or tab.

    Raises DataError for whatever the file has that cannot be learnt from, ConfigError for a setting out of range.
    """
    if task not in (None, "regression", "classification"):
        hint = did_you_mean(str(task), ("regression", "classification"))
        raise ConfigError(f"data.source.task={task!r} is not possible: {hint}")
    if not 0 < held_out < 1:
        raise ConfigError(f"data.source.held_out={held_out} is not possible: it is a part of the rows, such as 0.2.")
    columns = read(path, delimiter)
    categories = [categories] if isinstance(categories, str) else categories
    leave_out = [leave_out] if isinstance(leave_out, str) else leave_out
    for key, names in (("target", [target]), ("categories", categories), ("leave_out", leave_out)):
        for name in names:
            if name not in columns:
                raise DataError(f"{path} has no column '{name}' (data.source.{key}): {did_you_mean(name, columns)}")
    rows = len(columns[target])
    count = max(1, round(rows * held_out))
    if rows - count < 2:
        raise DataError(f"{path}: {rows} rows are too few to hold {held_out:g} of them out and learn from the others.")
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    test, train = order[:count], order[count:]

    classes, why = _classes(path, target, columns[target], task)
    if classes is None:
        targets = torch.from_numpy(_numbers(path, target, columns[target], is_target=True))
    else:
        place = {name: index for index, name in enumerate(classes)}
        targets = torch.tensor([place[word] for word in _words(columns[target])])
    if (targets[train] == targets[train][0]).all():
        raise DataError(f"{path}: the target '{target}' has one value in all training rows: there is nothing to learn.")
    names, inputs = _inputs(path, columns, {target, *leave_out}, categories, train.numpy())
    made = Table(train=(inputs[train], targets[train]), evaluation=(inputs[test], targets[test]))
    made.inputs, made.classes = names, classes
    kind = f"classification, {len(classes)} classes" if classes else "regression"
    made.story = f"'{target}': {kind}{why}. {len(names)} inputs, {len(train)} rows to train, {count} held out"
    return made


def _classes(path: str, name: str, column: Column, task: str | None) -> tuple[list[str] | None, str]:
    """The target's classes, None in a regression; and why, where that was not told."""
    is_text = column.dtype == object
    values = sorted(set(column.tolist()))
    if not is_text and not numpy.isfinite(column).all():
        values = []  # the number that is none is named in what follows
    whole = bool(values) and not is_text and all(float(value).is_integer() for value in values)
    few = column.dtype == bool or (whole and len(values) <= FEW_CLASSES)
    if task == "regression" or (task is None and not is_text and not few):
        return None, "" if task else " (to change that: data.source.task=classification)"
    if not is_text and not whole:
        _numbers(path, name, column, is_target=True)
        raise DataError(
            f"{path}: the target '{name}' has values with a fraction, which are no classes: write "
            "data.source.task=regression."
        )
    if is_text and "" in values:
        row = column.tolist().index("") + 1
        raise DataError(f"{path}, row {row} of the data: the target '{name}' is empty: mend it, or take the row out.")
    if len(values) > len(column) / 2:
        raise DataError(
            f"{path}: the target '{name}' has {len(values)} different values in {len(column)} rows, too many for "
            f"classes{_first_text(column)}: choose another target, or mend what should be a number."
        )
    why = "text" if is_text else "few whole numbers; to change that: data.source.task=regression"
    return [_word(value) for value in values], "" if task else f" (its values are {why})"


def _first_text(column: Column) -> str:
    """Where a column of numbers has one cell of text, that is what is wrong with it."""
    if column.dtype != object:
        return ""
    row, cell = _no_number(column)
    return f" (the first that is no number is {cell!r} in row {row})"


def _inputs(
    path: str, columns: Columns, left_out: set[str], categories: Sequence[str], train: Column
) -> tuple[list[str], Tensor]:
    names: list[str] = []
    made: list[Column] = []
    for name, column in columns.items():
        if name in left_out:
            continue
        if name not in categories:
            names.append(name)
            made.append(_numbers(path, name, column))
            continue
        words = numpy.array(_words(column), dtype=object)
        values = sorted(set(words[train]))
        if len(values) > MOST_VALUES:
            raise DataError(
                f"{path}: the column '{name}' has {len(values)} values, more than the {MOST_VALUES} that categories "
                f"may have: write data.source.leave_out=[{name}]."
            )
        names += [f"{name}={value}" for value in values]
        made += [(words == value).astype(numpy.float32) for value in values]
    if not made:
        raise DataError(f"{path}: no column is left to learn from.")
    return names, torch.from_numpy(numpy.stack(made, axis=1))


def _numbers(path: str, name: str, column: Column, is_target: bool = False) -> Column:
    """A column as float32. Raises DataError with the first row whose cell is no number there."""
    otherwise = "take the row out" if is_target else f"write data.source.leave_out=[{name}]"
    if column.dtype == object:
        row, cell = _no_number(column)
        said = f"holds {cell!r}, which is no number" if cell else "is empty"
        if cell and not is_target:
            otherwise = (
                f"write data.source.categories=[{name}] (an input for each value) or data.source.leave_out=[{name}]"
            )
        raise DataError(f"{path}, row {row} of the data: the column '{name}' {said}: mend it, or {otherwise}.")
    wide = column.astype(numpy.float64)
    with numpy.errstate(over="ignore"):
        narrow: Column = wide.astype(numpy.float32)
    bad = numpy.flatnonzero(~numpy.isfinite(narrow))
    if len(bad):
        raise DataError(
            f"{path}, row {bad[0] + 1} of the data: the column '{name}' holds {wide[bad[0]]:g}: mend it, or "
            f"{otherwise}."
        )
    spread = wide.std()
    if numpy.abs(wide).max() * 2**-24 > 0.01 * spread > 0:
        raise DataError(
            f"{path}: the numbers of the column '{name}' lie too close together for their size, float32 blurs them: "
            "subtract what they have in common, or leave the column out."
        )
    return narrow


def _no_number(column: Column) -> tuple[int, str]:
    for row, cell in enumerate(column.tolist(), start=1):
        try:
            float(cell)
        except ValueError:
            return row, cell
        if "_" in cell:
            return row, cell
    return 0, ""


def _words(column: Column) -> list[str]:
    return [_word(value) for value in column.tolist()]


def _word(value: Any) -> str:
    return f"{value:.0f}" if isinstance(value, float) and value.is_integer() else str(value)


class TabularMLP(nn.Module):
    """An MLP that takes rows as they stand in the table, and answers with logits or with numbers of the target's size.

    What the training rows have for mean and deviation is kept in buffers, so a saved model needs nothing beside it.
    """

    centre: Tensor
    scale: Tensor
    target_centre: Tensor
    target_scale: Tensor

    def __init__(self, table: Table, width: int = 64, depth: int = 2) -> None:
        super().__init__()
        if width < 1 or depth < 0:
            raise ConfigError(f"model.width={width}, model.depth={depth} is not possible: they are at least 1 and 0.")
        inputs, targets = table.train
        self.is_regression = table.classes is None
        self._keep("centre", "scale", inputs)
        self._keep("target_centre", "target_scale", targets if self.is_regression else torch.zeros(1))
        layers: list[nn.Module] = []
        size = inputs.shape[1]
        for _ in range(depth):
            layers += [nn.Linear(size, width), nn.ReLU()]
            size = width
        self.layers = nn.Sequential(*layers, nn.Linear(size, len(table.classes or ["the number"])))

    def _keep(self, centre: str, scale: str, rows: Tensor) -> None:
        deviation = rows.double().std(dim=0, correction=0)
        self.register_buffer(centre, rows.double().mean(dim=0).float())
        self.register_buffer(scale, deviation.where(deviation > 0, 1.0).float())

    def forward(self, rows: Tensor) -> Tensor:
        """Rows of shape (rows, inputs) to numbers of shape (rows,), or to logits of shape (rows, classes)."""
        answers: Tensor = self.layers((rows - self.centre) / self.scale)
        return answers.squeeze(1) * self.target_scale + self.target_centre if self.is_regression else answers


def loss(model: Any, micro_batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross-entropy of classes; of numbers the mean square error, in units of the training rows' variance.

    So 1 is what the mean of the training rows reaches, and 0 is perfect.
    """
    inputs, targets = micro_batch
    answers = model(inputs)
    if not targets.is_floating_point():
        return functional.cross_entropy(answers, targets)
    return functional.mse_loss(answers / model.target_scale, targets / model.target_scale)


def metrics(model: Any, micro_batch: tuple[Tensor, Tensor]) -> dict[str, Sum]:
    """Accuracy of classes; of numbers the mean absolute error, in the target's own unit."""
    inputs, targets = micro_batch
    answers = model(inputs)
    if not targets.is_floating_point():
        return {"accuracy": Sum((answers.argmax(dim=1) == targets).sum(), len(targets))}
    return {"absolute_error": Sum((answers - targets).abs().sum(), len(targets))}


class Story:
    """A logger that says at the start what was made of the file."""

    def __init__(self, table: Table) -> None:
        self.story = table.story

    def start(self, event: Any) -> None:
        sys.stdout.write(f"  {self.story}\n")
