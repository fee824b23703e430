"""A picture's boxes as a tree of module calls, in which what repeats is drawn once and then counted."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from trainer.diagnose.picture import Box, Picture, size

REPEATS = 3
"""From so many equal groups in a row on, all but the first become one box."""


@dataclass(slots=True)
class Group:
    """A module's call: its name and what is in it, in the order of the forward."""

    name: str
    items: list["Box | Group"] = field(default_factory=list)

    @property
    def key(self) -> str:
        return f"g{self.name}"

    def boxes(self) -> Iterator[Box]:
        for item in self.items:
            if isinstance(item, Group):
                yield from item.boxes()
            else:
                yield item


def grouped(picture: Picture, collapse: bool = True) -> tuple[Group, list[tuple[str, str, bool]]]:
    """The tree of a picture and its arrows; with `collapse`, repeats as one box, and arrows into them redirected."""
    root = Group("")
    for box in picture.boxes:
        _place(root, box)
    redirected: dict[str, str] = {}
    if collapse:
        _collapse(root, redirected)
    arrows: dict[tuple[str, str], bool] = {}
    for start, end, cut in picture.arrows:
        pair = redirected.get(start, start), redirected.get(end, end)
        if pair[0] != pair[1]:
            arrows[pair] = arrows.get(pair, False) or cut
    return root, [(start, end, cut) for (start, end), cut in arrows.items()]


def _place(root: Group, box: Box) -> None:
    group = root
    for depth in range(len(box.group)):
        name = "/".join(box.group[: depth + 1])
        inner = next((one for one in group.items if isinstance(one, Group) and one.name == name), None)
        if inner is None:
            inner = Group(name)
            group.items.append(inner)
        group = inner
    group.items.append(box)


def _collapse(group: Group, redirected: dict[str, str]) -> None:
    kept: list[Box | Group] = []
    run: list[Group] = []

    def close() -> None:
        if len(run) < REPEATS:
            kept.extend(run)
        else:
            kept.append(run[0])
            kept.append(_repeat(run[1:], redirected))
        run.clear()

    for item in group.items:
        if isinstance(item, Group) and run and _signature(item) == _signature(run[0]):
            run.append(item)
            continue
        # A parameter that several groups share lies between them and does not end a row of repeats.
        if run and isinstance(item, Box) and item.kind in ("parameter", "input"):
            kept.append(item)
            continue
        close()
        if isinstance(item, Group):
            run.append(item)
        else:
            kept.append(item)
    close()
    group.items = kept
    for item in group.items:
        if isinstance(item, Group):
            _collapse(item, redirected)


def _repeat(run: list[Group], redirected: dict[str, str]) -> Box:
    names = [last_name(group.name) for group in run]
    boxes = [box for group in run for box in group.boxes()]
    saved = sum(box.saved for box in boxes)
    lines = [f"the same, {len(run)} times", f"{len(boxes)} boxes"] + ([f"keeps {size(saved)}"] if saved else [])
    box = Box(f"x{run[0].name}", "operation", f"{names[0]} … {names[-1]}", lines, saved=saved)
    redirected.update({inner.key: box.key for inner in boxes})
    return box


def _signature(item: Box | Group) -> object:
    """What two groups have in common that are drawn alike: operations, shapes and bytes."""
    if isinstance(item, Group):
        return tuple(_signature(inner) for inner in item.items)
    return item.kind, item.title, tuple(item.lines), item.in_place


def last_name(name: str) -> str:
    """A group's own name as it is shown inside the group around it: `attention` in `blocks.0`."""
    above, _, own = name.rpartition("/")
    return own.removeprefix(f"{above.rpartition('/')[2].partition(' ')[0]}.") if above else own
