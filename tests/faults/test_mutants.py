"""The rules that make mutants: what they change, and what they leave because it would change nothing."""

import ast

import mutants
import pytest

BEFORE_THE_OTHER = """
def act(self, given):
    {first}
    {second}
"""


@pytest.mark.parametrize(
    ("first", "second", "is_swapped"),
    [
        ("self.a = given", "self.b = 0", False),
        ("a, self.b = given, 1", "c: int = 2", False),
        ("self.a = given", "'What a is.'", False),
        ("'What a is.'", "self.a = given", False),
        ("self.a = given", "b = self.a", True),
        ("b = self.a", "self.a = given", True),
        ("self.a = given", "self = other", True),
        ("a = given", "a = 2", True),
        ("a += 1", "b = a", True),
        ("self.a = read()", "self.b = read()", True),
        ("given[0] = 1", "b = self.a[0]", True),
        ("self.a = given", "self.act()", True),
    ],
)
def test_only_neighbours_that_may_need_each_other_are_swapped(tmp_path, monkeypatch, first, second, is_swapped) -> None:
    monkeypatch.setattr(mutants, "ROOT", tmp_path)
    (tmp_path / "file.py").write_text(BEFORE_THE_OTHER.format(first=first, second=second))
    swaps = [made for made in mutants.mutants("file.py") if made.change[0] == "swap"]
    assert bool(swaps) is is_swapped
    for made in swaps:
        changed = ast.unparse(made.tree()).splitlines()
        assert [line.strip() for line in changed[1:]] == [second, first]


def test_each_rule_changes_what_it_says(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(mutants, "ROOT", tmp_path)
    (tmp_path / "file.py").write_text("def act(a, b):\n    return not a or a + 3 < b\n")
    changed = {ast.unparse(made.tree()).splitlines()[1].strip() for made in mutants.mutants("file.py")}
    assert changed == {
        "pass",
        "return not a and a + 3 < b",
        "return not a or a + 4 < b",
        "return not a or a - 3 < b",
        "return not a or a + 3 <= b",
        "return +bool(a) or a + 3 < b",
    }
