"""The heat map of gradient norms: layers from the first (on top) to the last, the run from left to right.

The colours mean the same in every run, so that one look tells: green is what a run that learns shows, violet is nearly
nothing, red is far too much, magenta is not a number any more.
"""

import io
import math
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from trainer.diagnose.history import History
from trainer.loggers.screen import Pace

if TYPE_CHECKING:
    from PIL.ImageDraw import ImageDraw

Colour = tuple[int, int, int]

# log10 of the norm, and its colour. Between them the colours are mixed; beyond the ends they stay.
SCALE: list[tuple[float, Colour]] = [
    (-8, (45, 0, 75)), (-6, (68, 40, 140)), (-4, (45, 105, 160)), (-2, (35, 150, 125)), (0, (100, 200, 95)),
    (1, (200, 220, 50)), (2, (250, 200, 40)), (4, (215, 50, 20)),
]  # fmt: skip
ZERO: Colour = (0, 0, 0)
NOT_FINITE: Colour = (255, 0, 190)
NO_GRADIENT: Colour = (224, 224, 224)
SKIP: Colour = (200, 0, 0)
INK: Colour = (32, 33, 36)
FAINT: Colour = (110, 110, 115)
PAPER: Colour = (255, 255, 255)

GOOD: Colour = (0, 115, 60)

PLOT = 430
"""Pixels that the run has from left to right. The whole is as narrow as TensorBoard's cards, so that words stay legible
there."""
SMALLEST_ROW, LARGEST_ROW = 17, 34
_LABELS = 150
_TEXT = 17
_MARGIN = 14
_LINE = 23


class HeatMap:
    """When it is drawn, and what stands above it.

    Ever more seldom, from 10 seconds up to 10 minutes, so that what drawing takes is nothing to the run; and at once
    where something was found.
    """

    def __init__(self, history: History) -> None:
        self.history = history
        self._pace = Pace(10.0, 1.5, 600.0, at_once=False)
        self._caption = ""
        self._has_news = False

    def tell(self, caption: str) -> None:
        """What is to stand above it from now on."""
        self._caption, self._has_news = caption or self._caption, True

    def is_due(self) -> bool:
        return bool(self.history.rows) and (self._has_news or self._pace.due())

    def png(self) -> tuple[bytes, int, int]:
        """The file's bytes, its width and height."""
        self._has_news = False
        return draw(self.history, self._caption)


def colours(norms: NDArray[np.float64]) -> NDArray[np.uint8]:
    """The colour of each norm, of shape (…, 3)."""
    stops, mixed = [stop for stop, _ in SCALE], np.empty((*norms.shape, 3), np.uint8)
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log10(norms)
    for channel in range(3):
        # A comparison with NaN is false, so what is no number is painted over below.
        mixed[..., channel] = np.nan_to_num(np.interp(logs, stops, [colour[channel] for _, colour in SCALE]))
    mixed[norms == 0] = ZERO
    mixed[np.isnan(norms)] = NO_GRADIENT
    mixed[np.isinf(norms)] = NOT_FINITE
    return mixed


def draw(history: History, caption: str = "") -> tuple[bytes, int, int]:
    """The heat map as a PNG with its width and height in pixels; `history` holds at least one column.

    A triangle above the map marks a column in which windows were skipped.
    """
    # Here, so that a run that draws nothing does not pay for its import.
    from PIL import Image, ImageDraw, ImageFont

    norms = np.array(history.rows, np.float64).T
    layers, columns = norms.shape
    row = max(SMALLEST_ROW, min(LARGEST_ROW, 340 // layers))
    column = min(PLOT / 8, PLOT / columns)
    width, height = round(column * columns), row * layers
    text, small = ImageFont.load_default(_TEXT), ImageFont.load_default(_TEXT - 2)
    heading = ImageFont.load_default(_TEXT + 3)
    labels = [_shortened(name, small) for name in history.layers]
    left = _MARGIN + max(60, *(math.ceil(small.getlength(label)) for label in labels)) + 8
    words = _lines(caption, text, PLOT + left - _MARGIN)
    top = _MARGIN + 28 + _LINE * len(words) + 24
    whole = Image.new("RGB", (left + PLOT + 34, top + height + 146), PAPER)
    pen = ImageDraw.Draw(whole)

    pen.text((_MARGIN, 10), "Gradient norm of each layer", INK, heading)
    tone = SKIP if caption.startswith("not well") else GOOD if caption.startswith("good") else INK
    for number, line in enumerate(words):
        pen.text((_MARGIN, 38 + _LINE * number), line, tone, text)
    pixels = Image.fromarray(colours(norms))
    whole.paste(pixels.resize((width, height), Image.Resampling.NEAREST), (left, top))
    pen.rectangle((left - 1, top - 1, left + width, top + height), outline=FAINT)
    for number, label in enumerate(labels):
        pen.text((left - 8, top + row * number + row / 2), label, INK, small, anchor="rm")
    _marks(pen, history, left, top, column, small)
    _ticks(pen, history, left, top + height, column, small)
    _legend(pen, left, top + height + 58, small)

    file = io.BytesIO()
    whole.save(file, "PNG")
    return file.getvalue(), whole.width, whole.height


def _marks(pen: "ImageDraw", history: History, left: int, top: int, column: float, font: Any) -> None:
    marked = [number for number, count in enumerate(history.skips) if count]
    for number in marked:
        middle = left + column * number + column / 2
        pen.polygon([(middle - 5, top - 14), (middle + 5, top - 14), (middle, top - 3)], fill=SKIP)
    if marked:
        pen.text((left - 8, top - 9), "skipped", SKIP, font, anchor="rm")


def _ticks(pen: "ImageDraw", history: History, left: int, bottom: int, column: float, font: Any) -> None:
    """A few places of the clock below the map, as many as there is room for, the last one among them."""
    places = history.places
    last = len(places) - 1
    parts = int(min(last, 4, column * last // 80))
    for number in sorted({round(last * part / parts) for part in range(parts + 1)} if parts else {last}):
        middle = left + column * number + column / 2
        pen.line((middle, bottom + 1, middle, bottom + 6), FAINT)
        pen.text((middle, bottom + 8), f"{places[number]:,}", INK, font, anchor="ma")
    pen.text((left + column * len(places) / 2, bottom + 27), history.clock.replace("_", "-"), INK, font, anchor="ma")


def _legend(pen: "ImageDraw", left: int, top: int, font: Any) -> None:
    low, high = SCALE[0][0], SCALE[-1][0]
    pen.text((left - 8, top + 7), "norm", INK, font, anchor="rm")
    bar = colours(10.0 ** np.linspace(low, high, PLOT))
    for offset, colour in enumerate(bar.tolist()):
        pen.line((left + offset, top, left + offset, top + 14), tuple(colour))
    for power in range(int(low), int(high) + 1, 2):
        at = left + (power - low) / (high - low) * (PLOT - 1)
        pen.line((at, top + 14, at, top + 18), FAINT)
        pen.text((at, top + 20), "1" if power == 0 else f"1e{power}", INK, font, anchor="ma")
    meanings = [(NOT_FINITE, "not finite"), (ZERO, "zero"), (NO_GRADIENT, "no gradient")]
    for index, (colour, meaning) in enumerate(meanings):
        at = left + 145 * index
        pen.rectangle((at, top + 49, at + 14, top + 63), fill=colour, outline=FAINT)
        pen.text((at + 21, top + 56), meaning, INK, font, anchor="lm")


def _shortened(name: str, font: Any) -> str:
    """A name that fits beside the map: its middle left out where it is long."""
    kept = len(name)
    short = name
    while font.getlength(short) > _LABELS and kept > 4:
        kept -= 1
        short = f"{name[: kept // 2]}…{name[-(kept - kept // 2) :]}"
    return short


def _lines(words: str, font: Any, width: int) -> list[str]:
    """The words in lines that are no longer than so many pixels."""
    lines: list[str] = []
    for word in words.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines
