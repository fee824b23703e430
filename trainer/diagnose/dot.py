"""A picture as text for Graphviz (DOT), groups as clusters."""

from trainer.diagnose.groups import Group, grouped, last_name
from trainer.diagnose.picture import Box, Picture

_SHAPES = {"operation": "box", "parameter": "oval", "input": "oval", "root": "oval", "cut": "box"}
_FILLS = {"operation": "white", "parameter": "lightblue", "input": "gray95", "root": "palegreen", "cut": "mistyrose"}


def dot(picture: Picture, collapse: bool = True) -> str:
    """The text that `dot -Tsvg` draws."""
    root, arrows = grouped(picture, collapse)
    lines = ["digraph {", '  node [fontname="monospace", fontsize=10, style=filled]', *_of(root, "  ")]
    for start, end, cut in arrows:
        lines.append(f"  {_quoted(start)} -> {_quoted(end)}{' [style=dashed, color=red]' if cut else ''}")
    return "\n".join([*lines, "}\n"])


def _of(group: Group, indent: str) -> list[str]:
    lines = []
    for item in group.items:
        if isinstance(item, Group):
            lines += [
                f"{indent}subgraph {_quoted('cluster ' + item.name)} {{",
                f"{indent}  label={_quoted(last_name(item.name))}",
            ]
            lines += [*_of(item, indent + "  "), f"{indent}}}"]
        else:
            lines.append(f"{indent}{_quoted(item.key)} [{_looks(item)}]")
    return lines


def _looks(box: Box) -> str:
    label = "\n".join([box.title + (" (in place)" if box.in_place else ""), *box.lines])
    tip = f", tooltip={_quoted(box.note)}" if box.note else ""
    return f"label={_quoted(label)}, shape={_SHAPES[box.kind]}, fillcolor={_FILLS[box.kind]}{tip}"


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
