"""Where the boxes of a picture lie: layer by layer from what goes in to what comes out, groups inside groups.

The layered method of Sugiyama, Tagawa and Toda (1981), once for each group, from the innermost out: longest path for
the layers, medians for the order, averages for the places. What enters or leaves a group does so by a port on its edge,
so that an arrow finds its way around the boxes of every group that it crosses.
"""

import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from trainer.diagnose.groups import Group, last_name
from trainer.diagnose.picture import Box

LETTER, LINE = 6.7, 15.0
"""Width of a letter, height of a line: pixels."""
GAP, LAYER, PORT, PAD, HEAD = 22.0, 34.0, 16.0, 14.0, 20.0
_SWEEPS = 6

Arrow = tuple[str, str, bool]


@dataclass(slots=True)
class Frame:
    """A rectangle in the drawing: of a box, or of a group with its title."""

    x: float
    y: float
    width: float
    height: float
    what: Box | Group


@dataclass(slots=True)
class Drawing:
    """All that is to be drawn: frames from the outermost in, and each arrow with the points of its way."""

    width: float
    height: float
    frames: list[Frame] = field(default_factory=list)
    ways: list[tuple[list[tuple[float, float]], bool]] = field(default_factory=list)


@dataclass(slots=True)
class _Item:
    """What lies in a layer: a box, a group, a port, or the bend of an arrow that passes."""

    key: str
    width: float
    height: float
    x: float = 0.0
    y: float = 0.0

    @property
    def middle(self) -> float:
        return self.x + self.width / 2


class _Level:
    """One group, laid out."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self.items: dict[str, _Item] = {}
        self.inner: dict[str, _Level] = {}
        self.bends: dict[tuple[str, str], list[str]] = {}
        self.width = self.height = 0.0


def drawn(root: Group, arrows: Sequence[Arrow]) -> Drawing:
    """The drawing of a tree of groups."""
    paths: dict[str, tuple[Group, ...]] = {}
    _note(root, (), paths)
    steps: dict[str, list[tuple[str, str]]] = defaultdict(list)
    ways = [(_steps(start, end, paths, steps), cut) for start, end, cut in arrows if start in paths and end in paths]
    level = _lay(root, steps)
    drawing = Drawing(level.width, level.height)
    at: dict[tuple[str, str], tuple[float, float, float, float]] = {}
    _collect(level, 0.0, 0.0, drawing, at)
    for way, cut in ways:
        drawing.ways.append((_points(way, level, at), cut))
    return drawing


def _note(group: Group, above: tuple[Group, ...], paths: dict[str, tuple[Group, ...]]) -> None:
    here = (*above, group)
    for item in group.items:
        if isinstance(item, Group):
            _note(item, here, paths)
        else:
            paths[item.key] = here


def _steps(
    start: str, end: str, paths: dict[str, tuple[Group, ...]], steps: dict[str, list[tuple[str, str]]]
) -> list[tuple[str, str, str]]:
    """An arrow as steps (group, from, to), each inside one group: out by ports, over, and in by ports again."""
    outer, inner = paths[start], paths[end]
    shared = next(
        (i for i, (a, b) in enumerate(zip(outer, inner, strict=False)) if a is not b), min(len(outer), len(inner))
    )
    way: list[tuple[str, str, str]] = []
    current = start
    for group in reversed(outer[shared:]):
        way.append((group.key, current, f"out {start}"))
        current = group.key
    target = inner[shared].key if len(inner) > shared else end
    way.append((outer[shared - 1].key, current, target))
    for depth in range(shared, len(inner)):
        target = inner[depth + 1].key if len(inner) > depth + 1 else end
        way.append((inner[depth].key, f"in {start}", target))
    for group_key, a, b in way:
        if (a, b) not in steps[group_key]:
            steps[group_key].append((a, b))
    return way


def _lay(group: Group, steps: dict[str, list[tuple[str, str]]]) -> _Level:
    level = _Level(group)
    edges = steps[group.key]
    for item in group.items:
        if isinstance(item, Group):
            inner = level.inner[item.key] = _lay(item, steps)
            level.items[item.key] = _Item(item.key, inner.width, inner.height)
        else:
            level.items[item.key] = _Item(item.key, *_size_of(item))
    for a, b in edges:
        for port in (a, b):
            if port.startswith(("in ", "out ")):
                level.items.setdefault(port, _Item(port, 1.0, 0.0))
    layers = _layers(level, edges)
    links = _bend(level, edges, layers)
    _place(level, _order(level, links, layers), links)
    return level


def _size_of(box: Box) -> tuple[float, float]:
    longest = max([len(box.title) * 1.1, *(len(line) * 0.9 for line in box.lines)])
    return longest * LETTER + 2 * PAD, LINE * (1 + len(box.lines)) + PAD


def _layers(level: _Level, edges: Sequence[tuple[str, str]]) -> dict[str, int]:
    before, after = defaultdict(list), defaultdict(list)
    for a, b in edges:
        before[b].append(a)
        after[a].append(b)
    found: dict[str, int] = {}
    waiting = {key: len(before[key]) for key in level.items}
    ready = [key for key in level.items if not waiting[key]]
    while ready:
        key = ready.pop()
        found[key] = max((found[one] + 1 for one in before[key]), default=0)
        for one in after[key]:
            waiting[one] -= 1
            if not waiting[one]:
                ready.append(one)
    for key in level.items:
        found.setdefault(key, 0)  # a ring, which a graph of calls has not; it is drawn all the same
    for key in level.items:
        if not before[key] and after[key] and not key.startswith("in "):
            found[key] = max(0, min(found[one] for one in after[key]) - 1)  # a leaf right above what it goes into
    last = max(found.values(), default=0)
    if any(key.startswith("out ") for key in found):
        bottom = max((layer for key, layer in found.items() if not key.startswith("out ")), default=0) + 1
        last = max(last, bottom)
        found.update({key: last for key in found if key.startswith("out ")})
    if any(key.startswith("in ") for key in found):
        lowest = min((layer for key, layer in found.items() if not key.startswith("in ")), default=1)
        found = {key: 0 if key.startswith("in ") else layer - lowest + 1 for key, layer in found.items()}
    return found


def _bend(level: _Level, edges: Sequence[tuple[str, str]], layers: dict[str, int]) -> list[tuple[str, str]]:
    """The edges from layer to layer, those that pass several cut by bends."""
    links = []
    for a, b in edges:
        previous, bends = a, []
        for layer in range(layers[a] + 1, layers[b]):
            key = f"bend {a} {b} {layer}"
            level.items[key] = _Item(key, 4.0, 0.0)
            layers[key] = layer
            bends.append(key)
            links.append((previous, key))
            previous = key
        level.bends[a, b] = bends
        links.append((previous, b))
    return links


def _order(level: _Level, links: Sequence[tuple[str, str]], layers: dict[str, int]) -> list[list[str]]:
    rows: list[list[str]] = [[] for _ in range(max(layers.values(), default=-1) + 1)]
    for key in level.items:
        rows[layers[key]].append(key)
    above, below = defaultdict(list), defaultdict(list)
    for a, b in links:
        above[b].append(a)
        below[a].append(b)
    for sweep in range(_SWEEPS):
        down = sweep % 2 == 0
        for row, beside in zip(rows[1:], rows, strict=False) if down else zip(rows[-2::-1], rows[::-1], strict=False):
            place = {key: index for index, key in enumerate(beside)}
            neighbours = above if down else below
            median = {
                key: _median([place[one] for one in neighbours[key] if one in place], index)
                for index, key in enumerate(row)
            }
            row.sort(key=median.__getitem__)
    return rows


def _median(places: list[int], default: float) -> float:
    return statistics.median(places) if places else default


def _place(level: _Level, rows: list[list[str]], links: Sequence[tuple[str, str]]) -> None:
    items = level.items
    neighbours = defaultdict(list)
    for a, b in links:
        neighbours[a].append(b)
        neighbours[b].append(a)
    for row in rows:
        x = 0.0
        for key in row:
            items[key].x = x
            x += items[key].width + GAP
    for sweep in range(2 * _SWEEPS):
        for row in rows if sweep % 2 == 0 else reversed(rows):
            wanted = [
                sum(items[one].middle for one in neighbours[key]) / len(neighbours[key]) - items[key].width / 2
                if neighbours[key]
                else items[key].x
                for key in row
            ]
            _spread([items[key] for key in row], wanted)
    left = min((item.x for item in items.values()), default=0.0)
    top = HEAD if level.group.name else 0.0
    y = PAD + top
    for row in rows:
        height = max((items[key].height for key in row), default=0.0)
        for key in row:
            items[key].x += PAD - left
            items[key].y = y + (height - items[key].height) / 2
        y += height + (LAYER if height else PORT)
    level.width = max(
        [len(last_name(level.group.name)) * LETTER + 2 * PAD, *(item.x + item.width + PAD for item in items.values())]
    )
    level.height = y - (LAYER - PAD) if rows and items[rows[-1][0]].height else y - PORT


def _spread(row: list[_Item], wanted: list[float]) -> None:
    """Each item as near to where it wants to be as its neighbours allow: blocks that touch move as one."""
    blocks: list[tuple[float, int, float, list[_Item]]] = []  # (sum of wishes of its start, count, width, items)
    for item, wish in zip(row, wanted, strict=True):
        block = (wish, 1, item.width + GAP, [item])
        while blocks and blocks[-1][0] / blocks[-1][1] + blocks[-1][2] > block[0] / block[1]:
            total, count, width, before = blocks.pop()
            block = (total + block[0] - block[1] * width, count + block[1], width + block[2], before + block[3])
        blocks.append(block)
    for total, count, _, items in blocks:
        x = total / count
        for item in items:
            item.x = x
            x += item.width + GAP


def _collect(
    level: _Level, x: float, y: float, drawing: Drawing, at: dict[tuple[str, str], tuple[float, float, float, float]]
) -> None:
    if level.group.name:
        drawing.frames.append(Frame(x, y, level.width, level.height, level.group))
    boxes = {item.key: item for item in level.group.items}
    for key, item in level.items.items():
        at[level.group.key, key] = (x + item.x, y + item.y, item.width, item.height)
        if key in level.inner:
            _collect(level.inner[key], x + item.x, y + item.y, drawing, at)
        elif key in boxes:
            drawing.frames.append(Frame(x + item.x, y + item.y, item.width, item.height, boxes[key]))


def _points(
    way: Sequence[tuple[str, str, str]], root: _Level, at: dict[tuple[str, str], tuple[float, float, float, float]]
) -> list[tuple[float, float]]:
    """The way of an arrow: from the lower edge of where it starts, by ports and bends, to the upper edge of its end."""
    levels: dict[str, _Level] = {}
    for level in (ahead := [root]):
        levels[level.group.key] = level
        ahead.extend(level.inner.values())
    x, y, width, height = at[way[0][0], way[0][1]]
    points = [(x + width / 2, y + height)]
    for group, a, b in way:
        for key in (*levels[group].bends.get((a, b), []), b):
            if key in levels[group].inner:
                continue  # the port inside says where
            x, y, width, height = at[group, key]
            points.append((x + width / 2, y))
    return points
