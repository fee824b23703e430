"""What scripts/torture found, kept row by row in results.json, and RESULTS.md made of it.

A run of some rows alone leaves the others as they were found; each says of which state of `trainer/` it speaks.
"""

import json
import subprocess
from pathlib import Path
from typing import Any

from equivalent import why

HERE = Path(__file__).parent
KEPT, WRITTEN = HERE / "results.json", HERE / "RESULTS.md"
INSIDE = ("in a save", "in an evaluation", "in an open window")
SECOND = "after the second checkpoint"


def of() -> str:
    """Which state of the package was tried: git's short name of the folder, with a + where it was changed since."""
    words = ["git", "-C", str(HERE)]
    tree = subprocess.run(
        [*words, "rev-parse", "--short=9", "HEAD:trainer"], capture_output=True, text=True, check=False
    )
    changed = subprocess.run(
        [*words, "status", "--porcelain", "../../trainer"], capture_output=True, text=True, check=False
    )
    return (tree.stdout.strip() or "unknown") + ("+" if changed.stdout.strip() else "")


def kept() -> dict[str, Any]:
    empty: dict[str, Any] = {"rows": {}, "mutants": {}, "order": [], "with": ""}
    return json.loads(KEPT.read_text(encoding="utf-8")) if KEPT.exists() else empty


def keep(kind: str, name: str, found: dict[str, Any]) -> None:
    everything = kept()
    everything[kind][name] = found
    KEPT.write_text(json.dumps(everything, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def without_answer() -> dict[str, Any]:
    """Of a row whose process ended by itself: its error is on the screen."""
    none: dict[str, Any] = {name: {} for name in ("outcomes", "instants", "sizes")}
    return none | {"told": [], "broken": ["it ended without an answer"], "full": None, "seconds": 0, "of": of()}


def judge_instants(tally: Any) -> None:
    """At least half of the kills of a run strike after its second checkpoint, a quarter inside something that is saved
    open: the row says the shares, and is broken where they are less."""
    if SECOND not in tally.instants:
        return
    kills = sum(count for what, count in tally.instants.items() if what != SECOND)
    second, inside = tally.instants[SECOND], sum(tally.instants[what] for what in INSIDE)
    tally.told.append(
        f"{second} of {kills} kills ({second / kills:.0%}, half are wanted) struck after the run's second checkpoint, "
        f"{inside} ({inside / kills:.0%}, a quarter is wanted) inside a save, an evaluation or an open window."
    )
    if kills >= 20 and (second * 2 < kills or inside * 4 < kills):
        tally.broken.append("the kills struck elsewhere than they should")


def line(name: str, found: dict[str, Any]) -> str:
    """A row of the table."""
    outcomes = found.get("outcomes", {})
    said = ", ".join(f"{what} {count:,}" for what, count in sorted(outcomes.items(), key=lambda one: -one[1]))
    part = "" if found.get("full") in (None, 1.0) else f" ({found['full']:.0%} of the full tier)"
    trials = f"{sum(outcomes.values()):,}{part}"
    return f"| {name} | {trials} | {said} | {len(found['broken'])} | {found.get('seconds', 0)} s | {found.get('of')} |"


def write(order: list[str]) -> None:
    """RESULTS.md, whole, from what is kept; `order` are the names of the table's rows."""
    import torch

    everything = kept() | {"order": order}
    everything["with"] = f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, one thread"
    KEPT.write_text(json.dumps(everything, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    WRITTEN.write_text(text(everything), encoding="utf-8")


def text(found: dict[str, Any]) -> str:
    rows = {name: found["rows"][name] for name in found["order"] if name in found["rows"]}
    trials = sum(sum(row["outcomes"].values()) for row in rows.values())
    broken = sum(len(row["broken"]) for row in rows.values())
    lines = [
        "# Results of the failure programme",
        "",
        f"Written by `scripts/torture` with {found['with']}. What is compared is compared bit for bit. The last column "
        "is the state of `trainer/` that was tried (`git rev-parse HEAD:trainer`).",
        "",
        f"**{trials:,} trials, {broken} broken promises, {broken} silent losses.**",
        "",
        "| fault | trials | outcomes | broken | took | tried |",
        "|---|---|---|---|---|---|",
        *(line(name, row) for name, row in rows.items()),
        *(f"\n- broken: {name}: {told}" for name, row in rows.items() for told in row["broken"]),
        "",
    ]
    others = {name: row for name, row in found["rows"].items() if name not in rows and not row["outcomes"]}
    for name, row in (rows | others).items():
        parts = [*row["told"], *table(row)]
        if parts:
            lines += [f"## {name[0].upper()}{name[1:]}", "", *(f"{part}\n" for part in parts)]
    lines += mutants(found["mutants"])
    return "\n".join(lines).rstrip() + "\n"


def table(row: dict[str, Any]) -> list[str]:
    """Where the trials of a row struck."""
    struck = sorted((what, count) for what, count in row["instants"].items() if what != SECOND)
    if not struck:
        return []
    all_, size = sum(count for _, count in struck), sum(row["sizes"].values())
    if not size:
        lines = ["| instant | struck | share |", "|---|---|---|"]
        return ["\n".join([*lines, *(f"| {what} | {count} | {count / all_:.0%} |" for what, count in struck)])]
    lines = ["| file | bytes | share of all bytes | struck | share of all |", "|---|---|---|---|---|"]
    for what, count in struck:
        bytes_ = row["sizes"][what]
        lines.append(f"| {what} | {bytes_:,} | {bytes_ / size:.1%} | {count} | {count / all_:.1%} |")
    return ["\n".join(lines)]


def mutants(found: dict[str, Any]) -> list[str]:
    if not found:
        return []
    lines = [
        "## Mutants",
        "",
        "Made by rule (`tests/faults/mutants.py`): a statement dropped, two neighbours swapped, a number moved by one, "
        "a comparison, `and`, `+` or `not` turned. Each is tried with the tests that reach its line.",
        "",
        "| file | made | tried | killed | alive | without a reason | took | state |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for file, one in sorted(found.items()):
        alive = len(one["alive"])
        bare = sum(why(file, place, what) is None for place, _, what in one["alive"])
        lines.append(
            f"| {file} | {one['made']} | {one['killed'] + alive} | {one['killed']} | {alive} | {bare} | "
            f"{one['seconds']} s | {one['of']} |"
        )
    lines += ["", "Those that live, and why no test could kill them:", ""]
    for file, one in sorted(found.items()):
        for place, number, what in one["alive"]:
            told = why(file, place, what) or "**No reason is known.**"
            lines.append(f"- {file}, {place or 'the file'}, line {number}: {what}. {told}")
    return [*lines, ""]
