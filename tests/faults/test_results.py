"""RESULTS.md is what scripts/torture wrote; the rules make mutants; each reason is of a mutant that there is."""

import ast

import pytest
import results
from equivalent import EQUIVALENT, TARGETS, why
from mutants import ROOT, mutants
from tally import Tally


def test_the_page_is_what_the_script_wrote() -> None:
    assert results.WRITTEN.read_text(encoding="utf-8") == results.text(results.kept())


def test_kills_that_strike_elsewhere_break_the_row() -> None:
    for first, second, is_broken in ((30, 20, False), (35, 20, True), (30, 12, True)):
        tally = Tally()
        tally.instants.update({"between": first, "in a save": 40 - first, results.SECOND: second})
        results.judge_instants(tally)
        assert bool(tally.broken) is is_broken and len(tally.told) == 1


def test_the_rules_make_what_they_say(tmp_path) -> None:
    file = tmp_path / "file.py"
    file.write_text("def f(a, b=1):\n    x = a + 2\n    if not a < 1:\n        return x\n    return b and x\n")
    found = {mutant.what.split(" in `")[0]: ast.unparse(mutant.tree()) for mutant in mutants(str(file))}
    assert "x = a + 3" in found["2 became 3"]
    assert "x = a - 2" in found["another sign"]
    assert "not a <= 1" in found["turned `a < 1`"]
    assert "+bool(a < 1)" in found["no not"]
    assert "b or x" in found["and for or"]
    assert "pass\n    if" in found["dropped `x = a + 2`"]
    assert found["`if not a < 1: return x` before `x = a + 2`"].index("x = a") > 40
    outside = [mutant for mutant in mutants(str(file)) if not mutant.is_inside]
    assert [mutant.what for mutant in outside if "became" in mutant.what] == [
        "1 became 2 in `def f(a, b=1): x = a + 2 if not a < 1: return x return b and x`"
    ]


@pytest.mark.parametrize("file", list(TARGETS))
def test_each_reason_is_of_a_mutant_that_there_is(file) -> None:
    assert all((ROOT / test).exists() for test in TARGETS[file])
    reasons = [why(mutant.file, mutant.place, mutant.what) for mutant in mutants(file)]
    for (of, place, what), reason in EQUIVALENT.items():
        if file.endswith(of):
            assert reason in reasons, f"{of}, {place}: {what} is no mutant any more"
