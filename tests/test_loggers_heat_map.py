"""The heat map as one sees it: the PNG is decoded and its pixels looked at."""

import io
import itertools
import math

import numpy as np
import pytest
from PIL import Image

from trainer.diagnose.history import History
from trainer.loggers import heat_map
from trainer.loggers.heat_map import NO_GRADIENT, NOT_FINITE, PAPER, SKIP, ZERO, colours, draw


def history(rows: list[list[float]], skips: list[int] | None = None, names: list[str] | None = None) -> History:
    made = History("rows")
    made.layers = {name: [name] for name in names or [f"layer {number}" for number in range(len(rows))]}
    made.rows = [list(column) for column in zip(*rows, strict=True)]
    made.places = [64 * (number + 1) for number in range(len(made.rows))]
    made.skips = skips or [0] * len(made.rows)
    return made


def pixels(made: History, caption: str = "") -> np.ndarray:
    png, width, height = draw(made, caption)
    found = np.asarray(Image.open(io.BytesIO(png)))
    assert found.shape == (height, width, 3)
    return found


def cells(picture: np.ndarray, rows: int, columns: int) -> list[list[tuple[int, ...]]]:
    """The colour in the middle of each cell: the map lies inside the one long frame."""
    frame = np.argwhere((picture == heat_map.FAINT).all(axis=2))
    top = min(y for y in range(len(picture)) if (picture[y] == heat_map.FAINT).all(axis=1).sum() > 40)
    line = frame[frame[:, 0] == top][:, 1]
    left, right = line.min(), line.max()
    below = frame[(frame[:, 1] == left)][:, 0]
    bottom = top + next(n for n in range(1, 10_000) if top + n + 1 not in below)
    down = (top + 1 + (bottom - top - 1) / rows * (np.arange(rows) + 0.5)).astype(int)
    across = (left + 1 + (right - left - 1) / columns * (np.arange(columns) + 0.5)).astype(int)
    return [[tuple(cell) for cell in row] for row in picture[np.ix_(down, across)].tolist()]


def colour(norm: float) -> tuple[int, ...]:
    return tuple(colours(np.array([norm]))[0].tolist())


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (2, 3), (12, 40), (48, 200)])
def test_every_cell_has_the_colour_of_its_norm(rows: int, columns: int) -> None:
    norms = [[10.0 ** (-9 + 14 * ((r * 7 + c) % 29) / 28) for c in range(columns)] for r in range(rows)]
    assert cells(pixels(history(norms)), rows, columns) == [
        [tuple(cell) for cell in row] for row in colours(np.array(norms)).tolist()
    ]


def test_what_is_no_number_has_colours_of_its_own() -> None:
    found = cells(pixels(history([[1e-12, 1.0, 1e9], [0.0, math.inf, math.nan]])), 2, 3)
    assert found[1] == [ZERO, NOT_FINITE, NO_GRADIENT]
    assert found[0] == [heat_map.SCALE[0][1], colour(1.0), heat_map.SCALE[-1][1]]
    assert len({*found[0], *found[1]}) == 6


def test_colours_tell_a_layer_that_vanished_from_one_that_is_well_and_one_that_exploded() -> None:
    vanished, well, exploded = (np.array(colour(norm), int) for norm in (1e-9, 0.3, 1e5))
    assert vanished.sum() < 150
    assert well.argmax() == 1
    assert exploded.argmax() == 0
    between = [np.array(colour(10.0**power), int) for power in np.linspace(-8, 4, 49)]
    assert all(np.abs(a - b).sum() > 0 for a, b in itertools.pairwise(between))


def test_a_skip_is_marked_above_its_column_and_nothing_is_where_none_was() -> None:
    rows = [[1.0] * 10]
    without = pixels(history(rows))
    assert not (without == SKIP).all(axis=2).any()
    assert (pixels(history(rows), "not well: skipped") == SKIP).all(axis=2).any()
    assert not (pixels(history(rows), "good: median norm 1") == SKIP).all(axis=2).any()
    marked = pixels(history(rows, skips=[0, 0, 0, 0, 0, 0, 0, 3, 0, 0]))
    red = np.argwhere((marked == SKIP).all(axis=2))
    triangle = red[red[:, 1] > red[:, 1].max() - 11]
    frame = [x for x in range(marked.shape[1]) if (marked[:, x] == heat_map.FAINT).all(axis=1).sum() > 30]
    inside = (triangle[:, 1].mean() - frame[0] - 1) / (frame[1] - frame[0] - 1)
    assert inside == pytest.approx(0.75, abs=0.01)


def test_words_and_long_names_fit() -> None:
    names = ["transformer.blocks.11.attention.projection.in_projection_and_more.*", "w"]
    short = pixels(history([[1.0], [1.0]], names=["v", "w"]))
    long = pixels(history([[1.0], [1.0]], names=names))
    assert short.shape[1] < long.shape[1] < 1100
    one = pixels(history([[1.0], [1.0]]), "well")
    three = pixels(history([[1.0], [1.0]]), "a sentence that goes on and on " * 8)
    assert three.shape[1] == one.shape[1]
    assert three.shape[0] > one.shape[0]
    # The margin stays white: no word runs out of the picture.
    for picture in (short, long, one, three):
        assert (picture[:, -4:] == PAPER).all() and (picture[-4:] == PAPER).all()
