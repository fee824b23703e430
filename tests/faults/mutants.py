"""Mutants of a file, made by rule.

Rules: drop a statement, swap two neighbours, move a whole number by one, turn a comparison, `and` into `or`, `+` into
`-`, and take a `not` away. `mutating` runs the tests on them; one that lives shows a line that no test needs. Two
assignments that know nothing of each other are not swapped: the file would do the same.
"""

import ast
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).parents[2]
_TURNED = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq}
_TURNED |= {ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In}
_Place = tuple[str, ast.stmt | None, bool]


@dataclass(frozen=True)
class Mutant:
    """What was changed, and in which class and function (`Step.finish`) and statement."""

    file: str
    place: str
    what: str
    is_inside: bool
    """Of a function: not in a default, a decorator, or the body of a class or the file."""
    lines: tuple[int, int]
    node: int
    change: tuple

    def __str__(self) -> str:
        return f"{self.file}, line {self.lines[0]}, {self.place or 'the file'}: {self.what}"

    def tree(self) -> ast.Module:
        """The file's tree, changed."""
        tree = ast.parse((ROOT / self.file).read_text(encoding="utf-8"))
        _make(next(node for number, node in enumerate(ast.walk(tree)) if number == self.node), self.change)
        return ast.fix_missing_locations(tree)


def mutants(file: str) -> list[Mutant]:
    """All that the rules make of a file."""
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    places = dict(_places(tree, "", None, False))
    made, again = [], Counter[tuple[str, str]]()
    for number, node in enumerate(ast.walk(tree)):
        for change, (what, changed) in _changes(node).items():
            place, statement, is_inside = places[changed]
            if statement is not None:
                what += "" if isinstance(changed, ast.stmt) else f" in `{_short(statement)}`"
                again[place, what] += 1
                what += f" ({again[place, what]})" if again[place, what] > 1 else ""
                first, last = _lines(statement)
                if change[0] == "swap":
                    first = getattr(node, change[1])[change[2] - 1].lineno
                made.append(Mutant(file, place, what, is_inside, (first, last), number, change))
    return made


def unchanged(mutant: Mutant) -> Mutant:
    """The same file as it is: tests that fail with it say nothing of a mutant."""
    return replace(mutant, change=("nothing",))


def _places(node: ast.AST, place: str, statement: ast.stmt | None, inside: bool) -> Iterator[tuple[ast.AST, _Place]]:
    """For each node the class and function it is in, its statement, and whether it is in a function's body."""
    yield node, (place, statement, inside)
    for name, parts in ast.iter_fields(node):
        for one in parts if isinstance(parts, list) else [parts]:
            if isinstance(one, ast.AST):
                is_def = isinstance(node, ast.FunctionDef | ast.ClassDef) and name == "body"
                own = f"{place}.{node.name}".lstrip(".") if is_def else place
                is_inside = inside or (is_def and isinstance(node, ast.FunctionDef))
                yield from _places(one, own, one if isinstance(one, ast.stmt) else statement, is_inside)


def _lines(statement: ast.stmt) -> tuple[int, int]:
    """First and last line; of one with others inside, those of its head."""
    body = getattr(statement, "body", None)
    last = body[0].lineno - 1 if body else statement.end_lineno or statement.lineno
    return statement.lineno, max(last, statement.lineno)


def _changes(node: ast.AST) -> dict[tuple, tuple[str, ast.AST]]:
    found: dict[tuple, tuple[str, ast.AST]] = {}
    if isinstance(node, ast.FunctionDef | ast.If | ast.For | ast.While | ast.With | ast.Try):
        for name in ("body", "orelse", "finalbody"):
            body = getattr(node, name, None)
            if not isinstance(body, list):
                continue
            for at, one in enumerate(body):
                if not _is_text(one) and not isinstance(one, ast.FunctionDef | ast.Raise | ast.Delete):
                    found[("drop", name, at)] = (f"dropped `{_short(one)}`", one)
                if at and not _ends(body[at - 1]) and not _may_change_places(body[at - 1], one):
                    found[("swap", name, at)] = (f"`{_short(one)}` before `{_short(body[at - 1])}`", one)
    if isinstance(node, ast.Constant) and type(node.value) is int:
        found[("by one",)] = (f"{node.value} became {node.value + 1}", node)
    if isinstance(node, ast.Compare) and type(node.ops[0]) in _TURNED:
        found[("turn",)] = (f"turned `{_short(node)}`", node)
    if isinstance(node, ast.BoolOp):
        found[("other",)] = (f"and for or in `{_short(node)}`", node)
    if isinstance(node, ast.BinOp) and type(node.op) in (ast.Add, ast.Mult):
        found[("less",)] = (f"another sign in `{_short(node)}`", node)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        found[("not",)] = (f"no not in `{_short(node)}`", node)
    return found


def _make(node, change: tuple) -> None:
    kind, *where = change
    if kind == "nothing":
        return
    if kind == "drop":
        name, at = where
        getattr(node, name)[at] = ast.Pass()
    elif kind == "swap":
        name, at = where
        body = getattr(node, name)
        body[at - 1], body[at] = body[at], body[at - 1]
    elif kind == "by one":
        node.value += 1
    elif kind == "turn":
        node.ops[0] = _TURNED[type(node.ops[0])]()
    elif kind == "other":
        node.op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
    elif kind == "less":
        node.op = ast.Sub() if isinstance(node.op, ast.Add) else ast.Div()
    else:
        node.op = ast.UAdd()
        node.operand = ast.Call(ast.Name("bool", ast.Load()), [node.operand], [])


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _ends(node: ast.stmt) -> bool:
    return isinstance(node, ast.Return | ast.Raise | ast.Continue | ast.Break)


def _may_change_places(one: ast.stmt, other: ast.stmt) -> bool:
    """Whether a swap changes nothing: a text, or two assignments that call nothing and touch other names each."""
    if _is_text(one) or _is_text(other):
        return True
    stored, others = _stored(one), _stored(other)
    return bool(stored and others) and not (stored & _names(other) or others & _names(one))


def _stored(node: ast.stmt) -> set[str]:
    """The names that a plain assignment gives a value to, attributes by their last name; none of what else it is."""
    if not isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
        return set()
    if any(isinstance(part, ast.Call | ast.Await | ast.Yield | ast.YieldFrom) for part in ast.walk(node)):
        return set()
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    parts = [part for one in targets for part in (one.elts if isinstance(one, ast.Tuple) else [one])]
    if not all(isinstance(part, ast.Name | ast.Attribute) for part in parts):
        return set()  # an item of something that may have a second name
    return {part.id if isinstance(part, ast.Name) else part.attr for part in parts}


def _names(node: ast.AST) -> set[str]:
    names = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
    return names | {part.attr for part in ast.walk(node) if isinstance(part, ast.Attribute)}


def _short(node: ast.AST) -> str:
    text = " ".join(ast.unparse(node).split())
    return text if len(text) <= 90 else f"{text[:87]}..."
