"""A drawing as SVG: no program beside, readable in any browser."""

from collections.abc import Sequence
from html import escape
from itertools import pairwise

from trainer.diagnose.groups import Group, last_name
from trainer.diagnose.layout import LINE, PAD, Drawing, Frame
from trainer.diagnose.picture import Box

_COLOURS = {
    "operation": ("#ffffff", "#5b6b7c"),
    "parameter": ("#e6f0fb", "#2f6db5"),
    "input": ("#f3f3f3", "#8a8a8a"),
    "root": ("#e7f6e9", "#2d8a3e"),
    "cut": ("#fdeaea", "#c62828"),
}
_STYLE = (
    ".m{text-anchor:middle}text{font-family:ui-monospace,Menlo,Consolas,monospace;font-size:11px;fill:#22303c}"
    ".t{font-weight:600;font-size:12px}.s{fill:#5b6b7c}.g{fill:#5b6b7c;font-size:11px}"
    ".e{fill:none;stroke:#8595a5;stroke-width:1.2}.c{fill:none;stroke:#c62828;stroke-width:1.4;stroke-dasharray:5 4}"
)


def svg(drawing: Drawing, title: str) -> str:
    """The whole picture as one SVG document."""
    margin, head = 16.0, 34.0
    width, height = drawing.width + 2 * margin, drawing.height + 2 * margin + head
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}">',
        f"<title>{escape(title)}</title><style>{_STYLE}</style>",
        '<defs><marker id="a" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0L8 4L0 8z" fill="#8595a5"/></marker>'
        '<marker id="x" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0L8 4L0 8z" fill="#c62828"/></marker></defs>',
        f'<rect width="{width:.0f}" height="{height:.0f}" fill="#fbfcfd"/>',
        f'<text x="{margin}" y="{margin + 10}" class="t">{escape(title)}</text>',
        f'<g transform="translate({margin} {margin + head})">',
    ]
    parts += [_group(frame) for frame in drawing.frames if isinstance(frame.what, Group)]
    parts += [_way(points, cut) for points, cut in drawing.ways]
    parts += [_box(frame, frame.what) for frame in drawing.frames if isinstance(frame.what, Box)]
    return "\n".join([*parts, "</g></svg>\n"])


def _group(frame: Frame) -> str:
    name = escape(last_name(frame.what.name)) if isinstance(frame.what, Group) else ""
    return (
        f'<rect x="{frame.x:.1f}" y="{frame.y:.1f}" width="{frame.width:.1f}" height="{frame.height:.1f}" rx="8" '
        f'fill="#5b6b7c" fill-opacity=".055" stroke="#c3ccd5"/>'
        f'<text x="{frame.x + 10:.1f}" y="{frame.y + 16:.1f}" class="g">{name}</text>'
    )


def _box(frame: Frame, box: Box) -> str:
    fill, stroke = _COLOURS[box.kind]
    round_corner = frame.height / 2 if box.kind in ("parameter", "root", "input") else 4
    middle = frame.x + frame.width / 2
    tip = f"<title>{escape(box.note)}</title>" if box.note else ""
    top = frame.y + PAD + 3
    lines = [
        f'<text x="{middle:.1f}" y="{top + LINE * number:.1f}" class="m {kind}">{escape(line)}</text>'
        for number, (kind, line) in enumerate([("t", box.title), *(("s", line) for line in box.lines)])
    ]
    mark = ""
    if box.in_place:
        mark = (
            f'<circle cx="{frame.x + frame.width - 2:.1f}" cy="{frame.y + 2:.1f}" r="7" fill="#e08a00"/>'
            f'<text x="{frame.x + frame.width - 2:.1f}" y="{frame.y + 6:.1f}" text-anchor="middle" fill="#fff">!</text>'
        )
    dash = ' stroke-dasharray="5 4"' if box.kind == "cut" else ""
    return (
        f"<g>{tip}"
        f'<rect x="{frame.x:.1f}" y="{frame.y:.1f}" width="{frame.width:.1f}" height="{frame.height:.1f}" '
        f'rx="{round_corner:.1f}" fill="{fill}" stroke="{stroke}"{dash}/>{"".join(lines)}{mark}</g>'
    )


def _way(points: Sequence[tuple[float, float]], cut: bool) -> str:
    """A smooth line through the points, upright at each."""
    path = f"M{points[0][0]:.1f} {points[0][1]:.1f}"
    for (x1, y1), (x2, y2) in pairwise(points):
        bend = (y2 - y1) / 2
        path += f"C{x1:.1f} {y1 + bend:.1f} {x2:.1f} {y2 - bend:.1f} {x2:.1f} {y2:.1f}"
    kind, end = ("c", "x") if cut else ("e", "a")
    return f'<path d="{path}" class="{kind}" marker-end="url(#{end})"/>'
