"""The drawn graph: what is in it, that its bytes are those that autograd keeps, and that nothing overlaps."""

import itertools
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from trainer.recipes import char_lm

from trainer import ConfigError, graph
from trainer.diagnose.groups import Group, grouped
from trainer.diagnose.layout import Drawing, drawn
from trainer.diagnose.picture import Box, Picture, size


class Scalar:
    """Row 1 and 2 of the tutorial: z = (w·x + b)²."""

    def __init__(self) -> None:
        self.x, self.w, self.b = (torch.tensor(value, requires_grad=True) for value in (2.0, 3.0, 1.0))

    def z(self, _: Any = None) -> Tensor:
        return (self.w * self.x + self.b) ** 2


def box_of(picture: Picture, title: str) -> Box:
    (found,) = [box for box in picture.boxes if box.title == title]
    return found


def into(picture: Picture, title: str) -> set[str]:
    """The titles of what goes into a box."""
    names = {box.key: box.title for box in picture.boxes}
    key = box_of(picture, title).key
    return {names[start] for start, end, _ in picture.arrows if end == key}


def test_the_scalar_workflow_with_its_leaves_by_name() -> None:
    model = Scalar()
    found = graph(model, Scalar.z).picture
    assert [box.lines[0] for box in reversed(found.boxes) if box.kind == "operation"] == [
        "PowBackward0",
        "AddBackward0",
        "MulBackward0",
    ]
    assert into(found, "mul") == {"w", "x"}
    assert into(found, "add") == {"mul", "b"}
    assert into(found, "pow") == {"add"}
    assert into(found, "loss") == {"pow"}
    assert {box.title for box in found.boxes if box.kind == "parameter"} == {"w", "x", "b"}


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(3, 8), nn.Tanh())
        self.out = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.inner(x))


def test_modules_are_groups_and_operations_lie_in_them() -> None:
    found = graph(Small(), lambda m, x: m(x).square().mean(), torch.ones(4, 3)).picture
    linears = [box for box in found.boxes if box.title == "linear"]
    assert [box.group for box in linears] == [("inner", "inner.0"), ("out",)]
    assert [box.lines[:2] for box in linears] == [["AddmmBackward0", "4 × 8"], ["AddmmBackward0", "4 × 2"]]
    assert "m(x).square().mean()" in box_of(found, "mean").note
    assert [box.title for box in found.boxes if box.group == ("out",)] == ["weight", "bias", "linear"] or [
        box.title for box in found.boxes if box.group == ("out",)
    ] == ["bias", "weight", "linear"]
    assert box_of(found, "micro-batch 0").lines == ["4 × 3"]


def kept(run: Any, without: list[Tensor]) -> int:
    """Bytes that autograd keeps for backward, each storage once, by torch's own hooks."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        answer = run()
    for tensor in without:
        storages.pop(tensor.untyped_storage()._cdata, None)
    del answer
    return sum(storages.values())


@pytest.mark.parametrize(
    ("make", "rows"),
    [
        (Small, torch.randn(16, 3)),
        (
            lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.GELU(), nn.Flatten()),
            torch.randn(2, 1, 6, 6),
        ),
        (lambda: nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Dropout(0.5)), torch.randn(7, 3)),
    ],
)
def test_the_bytes_are_those_that_autograd_keeps(make, rows) -> None:
    torch.manual_seed(0)
    model = make()
    expected = kept(lambda: model(rows).square().mean(), list(model.parameters()))
    assert graph(model, lambda m, x: m(x).square().mean(), rows).picture.saved == expected > 0


def test_nothing_is_left_behind() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    graph(model, lambda m, x: m(x).square().mean(), torch.randn(4, 3, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.rand(2), expected)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model[0]._forward_hooks
    assert not nn.modules.module._global_forward_hooks
    assert not nn.modules.module._global_forward_pre_hooks


def test_cuts_and_changes_in_place_are_marked() -> None:
    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.never = nn.Linear(3, 3), nn.Linear(3, 1), nn.Linear(1, 1)

        def forward(self, x: Tensor) -> Tensor:
            out = self.b(self.a(x).detach())
            out += 1
            return out

    found = graph(Cut(), lambda m, x: m(x).mean(), torch.ones(4, 3)).picture
    assert box_of(found, "detach").kind == "cut"
    assert into(found, "detach") == {"a.weight", "a.bias"}
    assert "self.a(x).detach()" in box_of(found, "detach").note
    assert into(found, "not used") == {"never.weight", "never.bias"}
    assert box_of(found, "add").in_place
    assert not box_of(found, "linear").in_place
    assert "detach" in into(found, "linear")


def test_a_function_of_ones_own_goes_by_its_name() -> None:
    class Halved(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 2 / 4

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient / 2

    found = graph(nn.Linear(2, 1), lambda m, x: Halved.apply(m(x)).mean(), torch.ones(3, 2)).picture
    assert box_of(found, "Halved").lines[:2] == ["HalvedBackward", "3 × 1"]


def test_repeats_are_drawn_once_and_counted() -> None:
    model = char_lm.Transformer(16, width=8, depth=12, heads=2)
    symbols = torch.randint(0, 90, (2, 16))
    made = graph(model, char_lm.NextCharacter(), (symbols, symbols))
    tree, arrows = grouped(made.picture)
    names = [item.name if isinstance(item, Group) else item.title for item in tree.items]
    assert "blocks.0" in names
    assert "blocks.1 … blocks.11" in names
    assert "blocks.5" not in names
    repeat = next(box for box in tree.boxes() if box.title == "blocks.1 … blocks.11")
    assert repeat.lines[0] == "the same, 11 times"
    keys = {box.key for box in tree.boxes()}
    assert {key for start, end, _ in arrows for key in (start, end)} <= keys
    assert sum(box.saved for box in tree.boxes()) == made.picture.saved
    whole = graph(model, char_lm.NextCharacter(), (symbols, symbols), every_node=True)
    assert "blocks.5" in whole.svg()
    assert len(whole.picture.boxes) > len(made.picture.boxes)


def overlaps(drawing: Drawing) -> list[tuple[str, str]]:
    boxes = [frame for frame in drawing.frames if isinstance(frame.what, Box)]
    return [
        (a.what.title, b.what.title)
        for a, b in itertools.combinations(boxes, 2)
        if a.x < b.x + b.width and b.x < a.x + a.width and a.y < b.y + b.height and b.y < a.y + a.height
    ]


@pytest.mark.parametrize("every_node", [False, True])
def test_no_two_boxes_overlap_and_all_lie_inside_their_groups(every_node) -> None:
    model = char_lm.Transformer(16, width=8, depth=2, heads=2)
    symbols = torch.randint(0, 90, (2, 16))
    made = graph(model, char_lm.NextCharacter(), (symbols, symbols), every_node=every_node)
    drawing = drawn(*grouped(made.picture, not every_node))
    assert overlaps(drawing) == []
    groups = {frame.what.name: frame for frame in drawing.frames if isinstance(frame.what, Group)}
    for frame in drawing.frames:
        assert frame.x >= 0
        assert frame.x + frame.width <= drawing.width + 1e-6
        if isinstance(frame.what, Box) and frame.what.group:
            around = groups["/".join(frame.what.group)]
            assert around.x <= frame.x
            assert frame.x + frame.width <= around.x + around.width + 1e-6
            assert around.y <= frame.y
            assert frame.y + frame.height <= around.y + around.height + 1e-6
    for points, _ in drawing.ways:  # every arrow goes down
        assert all(below[1] >= above[1] for above, below in itertools.pairwise(points))


def test_svg_is_whole_and_escapes_what_it_shows() -> None:
    text = graph(nn.Linear(2, 1), lambda m, x: (m(x) * (x.sum() > 0)).mean(), torch.ones(3, 2)).svg()
    root = ElementTree.fromstring(text)
    shown = {element.text for element in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {"linear", "weight", "bias", "AddmmBackward0", "loss"} <= shown


def test_dot_is_what_graphviz_reads(tmp_path) -> None:
    made = graph(Small(), lambda m, x: m(x).square().mean(), torch.ones(4, 3))
    text = made.dot()
    assert text.startswith("digraph {")
    assert text.count("{") == text.count("}")
    assert re.search(r'subgraph "cluster inner" \{\n +label="inner"', text)
    assert r'label="linear\nAddmmBackward0\n4 × 8' in text
    if shutil.which("dot"):
        (tmp_path / "graph.dot").write_text(text, encoding="utf-8")
        subprocess.run(["dot", "-Tsvg", "-o", "graph.svg", "graph.dot"], cwd=tmp_path, check=True)
    assert made.save(tmp_path / "graph.svg").read_text(encoding="utf-8") == made.svg()
    with pytest.raises(ConfigError, match=r"written as \.svg or \.dot, not as '\.png'"):
        made.save(tmp_path / "graph.png")
    with pytest.raises(ConfigError, match="cannot be written"):
        made.save(tmp_path / "nowhere" / "graph.svg")


def test_shared_parameters_are_one_box_outside_both() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
            self.second.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x))

    found = graph(Tied(), lambda m, x: m(x).mean(), torch.ones(2, 3)).picture
    shared = box_of(found, "first.weight")
    assert shared.group == ()
    assert sum(start == shared.key for start, _, _ in found.arrows) == 2


def test_several_terms_are_several_roots() -> None:
    found = graph(nn.Linear(2, 1), lambda m, x: {"fit": m(x).mean(), "size": m.weight.square().sum()}, torch.ones(3, 2))
    assert [box.title for box in found.picture.boxes if box.kind == "root"] == ["fit", "size"]


def test_a_recurrent_module_is_a_group_for_each_call() -> None:
    cell = nn.ModuleDict({"cell": nn.Linear(2, 2)})
    found = graph(cell, lambda m, x: m["cell"](F.relu(m["cell"](x))).mean(), torch.ones(3, 2)).picture
    assert {box.group for box in found.boxes if box.title == "linear"} == {("cell",), ("cell (call 2)",)}
    assert overlaps(drawn(*grouped(found))) == []


def test_bytes_for_people() -> None:
    assert [size(n) for n in (0, 1023, 1024, 5 * 2**20, 3 * 2**30)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "5.0 MiB",
        "3.0 GiB",
    ]
