"""Tables from files, column by column: CSV, NPZ and Parquet. What is wrong with a file is one sentence."""

import csv
import functools
import os
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy

from trainer.errors import ConfigError, DataError, did_you_mean

Column = numpy.ndarray[Any, Any]
Columns = dict[str, Column]
"""A column by its name: numbers (int, float or bool), or text (dtype object, each cell a str)."""

DELIMITERS = {"comma": ",", "semicolon": ";", "tab": "\t"}


def read(path: str | Path, delimiter: str = "comma") -> Columns:
    """The columns of a file with the ending .csv, .npz or .parquet, each of shape (rows,), all equally long.

    Text that is a number everywhere in its column is one; a cell that is not stays text, and so does its column.
    """
    if delimiter not in DELIMITERS:
        raise ConfigError(f"data.source.delimiter={delimiter!r} is not possible: {did_you_mean(delimiter, DELIMITERS)}")
    path = Path(path).expanduser()
    if path.suffix.lower() not in (".csv", ".npz", ".parquet"):
        raise DataError(f"{path}: a table has the ending .csv, .npz or .parquet.")
    try:
        if not path.exists():
            near = did_you_mean(path.name, os.listdir(path.parent)) if path.parent.is_dir() else ""
            raise DataError(f"{path}: there is no such file{f', {near}' if near.startswith('did') else '.'}")
        facts = path.stat()
        if not facts.st_size:
            raise DataError(f"{path}: the file is empty.")
        return dict(_read(path.absolute(), path, DELIMITERS[delimiter], (facts.st_mtime_ns, facts.st_size)))
    except OSError as error:
        raise DataError(f"{path}: the file cannot be read: {error.strerror or error}.") from None


@functools.lru_cache(maxsize=1)  # a recipe asks for its table several times: for the model, for the data
def _read(absolute: Path, path: Path, delimiter: str, state: tuple[int, int]) -> Columns:
    """The columns of a file in this state."""
    kind = path.suffix.lower()
    columns = _csv(path, delimiter) if kind == ".csv" else _npz(path) if kind == ".npz" else _parquet(path)
    lengths = {len(column) for column in columns.values()}
    if len(lengths) > 1:
        sizes = ", ".join(f"{name} {len(column)}" for name, column in columns.items())
        raise DataError(f"{path}: the columns must have equally many rows, they have: {sizes}.")
    if not columns or lengths == {0}:
        raise DataError(f"{path}: the table has no row.")
    return columns


def _csv(path: Path, delimiter: str) -> Columns:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, delimiter=delimiter, strict=True)
            names = next(reader, [])
            _check_names(path, names, delimiter)
            rows = []
            for row in reader:
                if not row:
                    continue  # a blank line, as at the end of many files
                if len(row) != len(names):
                    raise DataError(
                        f"{path}, line {reader.line_num}: {len(row)} cells, but there are {len(names)} columns."
                    )
                rows.append(row)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: the file is not text in UTF-8 ({error.reason}): save it as UTF-8.") from None
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: this is no CSV: {error}.") from None
    return {name: _of_text(cells) for name, cells in zip(names, zip(*rows, strict=True), strict=True)} if rows else {}


def _check_names(path: Path, names: list[str], delimiter: str) -> None:
    if len(names) == 1:
        for word, other in DELIMITERS.items():
            if other != delimiter and other in names[0]:
                raise DataError(f"{path}: one column only, named {names[0]!r}: write data.source.delimiter={word}.")
    for place, name in enumerate(names, start=1):
        if not name.strip():
            raise DataError(f"{path}: column {place} has no name: the first line names all columns.")
        if names.index(name) != place - 1:
            raise DataError(f"{path}: two columns are named {name!r}: rename one.")


def _of_text(cells: Iterable[str]) -> Column:
    stripped = [cell.strip() for cell in cells]
    try:
        if not any("_" in cell for cell in stripped):  # Python reads 1_000 as a number, nobody else does
            return numpy.array([float(cell) for cell in stripped])
    except ValueError:
        pass
    return numpy.array(stripped, dtype=object)


def _npz(path: Path) -> Columns:
    """Arrays of shape (rows,) are columns; the columns of `name` with shape (rows, n) are name.0, name.1, …"""
    columns: Columns = {}
    try:
        with path.open("rb") as stream, numpy.load(stream, allow_pickle=False) as file:
            for name in file.files:
                array = file[name]
                if array.ndim not in (1, 2):
                    raise DataError(
                        f"{path}: the array '{name}' has shape {array.shape}: a table's have 1 or 2 dimensions."
                    )
                if array.ndim == 1:
                    columns[name] = _of_array(array)
                else:
                    for place in range(array.shape[1]):
                        columns[f"{name}.{place}"] = _of_array(array[:, place])
    except (ValueError, TypeError, AttributeError, EOFError, zipfile.BadZipFile, zlib.error):
        # What numpy says advises to unpickle it, which would run whatever code the file holds.
        raise DataError(
            f"{path}: this is no NPZ file of numbers and text: write it with numpy.savez, without objects."
        ) from None
    return columns


def _of_array(array: Column) -> Column:
    """Numbers as they are; all else (dates, bytes, decimals) as CSV would have it, as text."""
    if array.dtype.kind in "iufb":
        return array
    return _of_text(_text(cell) for cell in array.tolist())


def _text(cell: Any) -> str:
    if cell is None or (isinstance(cell, float) and cell != cell):
        return ""
    return cell.decode("utf-8", "replace") if isinstance(cell, bytes) else str(cell)


def _parquet(path: Path) -> Columns:
    try:
        from pyarrow import ArrowException, parquet, types
    except ModuleNotFoundError as error:
        if not str(error.name).startswith("pyarrow"):
            raise
        raise DataError(
            f'{path}: a Parquet file is read by pyarrow, which is not here: pip install "gradtrainer[tabular]".'
        ) from None
    try:
        table = parquet.read_table(path)
    except ArrowException as error:
        raise DataError(f"{path}: this is no Parquet file: {str(error).rstrip('.')}.") from None
    names = list(table.column_names)
    for name in names:
        if names.count(name) > 1:
            raise DataError(f"{path}: two columns are named {name!r}: rename one.")
    columns: Columns = {}
    for name in names:
        column = table.column(name)
        if types.is_dictionary(column.type):  # as it stands, to_numpy would give missing cells the first value
            column = column.cast(column.type.value_type)
        columns[name] = _of_array(column.to_numpy())
    return columns
