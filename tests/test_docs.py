"""The pages of docs/: each block is run where it stands, and what a page says was printed must be printed.

A page's blocks, in order, in one folder and one namespace: `python` is executed, and prints exactly the `text` block
that follows it, or nothing (a `fit` may talk); `console` runs its `$ trainer …` lines in this process and compares the
lines (`...` alone stands for any lines, inside a line for any text); a block with `file=NAME` is written to that file.
"""

import importlib.util
import itertools
import re
import shlex
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from trainer.recipes import xor, xor_mlp

from trainer import Step, Trainer, supervised
from trainer.cli import main
from trainer.data import mixed
from trainer.gradient.transforms import noise, thaw
from trainer.optim import adamw, cosine
from trainer.optim.groups import parameter_groups

DOCS = Path(__file__).parent.parent / "docs"
PAGES = sorted(page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md"))
RUN = [page for page in PAGES if not page.endswith(".zh.md")]


class Block(NamedTuple):
    language: str
    file: str
    text: str
    line: int


def blocks(page: str) -> list[Block]:
    found: list[Block] = []
    lines = iter(enumerate((DOCS / page).read_text(encoding="utf-8").splitlines(), start=1))
    for number, line in lines:
        if line.startswith("```"):
            language, _, file = line[3:].partition(" file=")
            body = [text for _, text in itertools.takewhile(lambda pair: pair[1] != "```", lines)]
            found.append(Block(language, file, "\n".join(body), number))
    return found


def commands(block: Block) -> Iterator[tuple[list[str], list[str]]]:
    """The words of each command of a console block, and the lines that it is said to print."""
    for part in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
        command, *printed = part.rstrip("\n").replace("\\\n", "").split("\n")
        yield shlex.split(command), printed


def agrees(expected: list[str], printed: str) -> bool:
    pattern = ""
    for line in expected:
        pattern += r"(?:.*\n)*?" if line == "..." else re.escape(line).replace(r"\.\.\.", ".*") + r" *\n"
    return re.fullmatch(pattern, printed) is not None


@pytest.mark.parametrize("page", RUN)
def test_everything_on_the_page_runs_and_prints_what_it_says(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    modules = set(sys.modules)
    stand_in = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    namespace: dict[str, object] = {"__name__": "page", **(yours() if page.startswith("toggles/") else {})}
    found = blocks(page)
    try:
        for block, after in itertools.zip_longest(found, found[1:]):
            where = f"docs/{page}, line {block.line}"
            if block.file:
                (tmp_path / block.file).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / block.file).write_text(block.text + "\n", encoding="utf-8")
            elif block.language == "python":
                exec(compile("\n" * block.line + block.text, str(DOCS / page), "exec"), namespace)
                expected = after.text + "\n" if after is not None and after.language == "text" else ""
                printed = capsys.readouterr().out
                assert printed == expected or ("fit(" in block.text and not expected), where
            elif block.language == "console":
                for words, lines in commands(block):
                    assert words[0] == "trainer", f"{where}: a console block runs trainer only"
                    code = main([*words[1:], *_short(page, words)])
                    printed = capsys.readouterr()
                    is_named = words[1] == "replay" and "  it got" in printed.out
                    assert code == (4 if is_named else 0), f"{where}: {printed.err}"
                    assert not lines or agrees(lines, printed.out), f"{where} printed\n{printed.out}"
    finally:
        for name in set(sys.modules) - modules:
            if Path(getattr(sys.modules[name], "__file__", None) or "/").is_relative_to(tmp_path):
                del sys.modules[name]
    if "import wandb" in "".join(block.text for block in found):
        assert stand_in.said[0] == "init" and stand_in.said[-1] == "finish" and "loss" in stand_in.said


def yours() -> dict[str, object]:
    """What the one line of Python of a toggle's page takes as given."""
    torch.manual_seed(0)
    model, table = xor_mlp.MLP(), xor.table()
    names: dict[str, object] = {"Step": Step, "Trainer": Trainer, "adamw": adamw, "cosine": cosine, "torch": torch}
    return names | {
        "model": model,
        "objective": supervised(torch.nn.BCEWithLogitsLoss()),
        "optimizer": adamw(model.parameters()),
        "data": table.train,
        "held_out": table.evaluation,
        "window": [table.train],
        "parameter_groups": parameter_groups,
        "mixed": mixed,
        "noise": noise,
        "thaw": thaw,
        **{"seed": 0, "epoch": 0, "row": 0},
    }


def _short(page: str, words: list[str]) -> list[str]:
    """A toggle's command shows how it is written: three steps of it are enough, where it sets no limit itself."""
    trains = page.startswith("toggles/") and words[1] == "train" and "-m" not in words
    return ["limits.steps=3"] if trains and "limits." not in " ".join(words) and "--cfg" not in words else []


class Wandb(types.ModuleType):
    """What the page's logger calls of wandb, which is no dependency: it notes what was said to it."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.said: list[str] = []

    def init(self, *, project: str, config: dict[str, object]) -> "Wandb":
        self.said.append("init")
        return self

    def log(self, data: dict[str, object], step: int) -> None:
        self.said.extend(data)

    def finish(self) -> None:
        self.said.append("finish")


@pytest.mark.parametrize("page", [page for page in PAGES if page.endswith(".zh.md")])
def test_a_translation_has_the_same_blocks_and_sections(page):
    english = page.replace(".zh.md", ".md")
    assert [block[:3] for block in blocks(page)] == [block[:3] for block in blocks(english)]
    headings = [
        re.findall(r"^(#+) (\d*)", (DOCS / name).read_text(encoding="utf-8"), re.MULTILINE) for name in (page, english)
    ]
    assert headings[0] == headings[1]


@pytest.mark.parametrize("page", PAGES)
def test_each_page_has_a_command_is_in_the_index_and_links_to_what_is_there(page):
    text = (DOCS / page).read_text(encoding="utf-8")
    assert any(words[:1] == ["trainer"] for block in blocks(page) for words, _ in commands(block))
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)#]+)", prose):
        assert target.startswith("https://") or (DOCS / page).parent.joinpath(target).exists(), target
    assert page == "README.md" or f"({page})" in (DOCS / "README.md").read_text(encoding="utf-8")


def test_no_page_says_nothing_about_what_a_block_of_text_belongs_to():
    for page in RUN:
        found = blocks(page)
        for before, block in itertools.pairwise(found):
            # bash: a script for another program (a queue's), which is shown and not run.
            assert block.language in ("python", "text", "console", "yaml", "bash"), f"docs/{page}, line {block.line}"
            assert block.language != "text" or before.language == "python", f"docs/{page}, line {block.line}"
            assert block.language != "yaml" or block.file, f"docs/{page}, line {block.line}"


def test_the_script_of_the_costs_still_knows_the_toggles(monkeypatch):
    """Everything that it compares is built, and one pair runs; the times themselves are for who asks for them."""
    spec = importlib.util.spec_from_file_location("cost", DOCS / "toggles" / "cost.py")
    cost = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(cost)
    pairs = {}
    monkeypatch.setattr(cost, "compare", lambda name, *runs: pairs.update({name: runs}))
    monkeypatch.setattr(cost, "TURNS", 1)
    cost.main()
    assert {name.split(":")[0] for name in pairs} >= {"accumulation", "reduction", "zero_grad", "clipping", "data"}
    for run in pairs["clipping: clip_norm over none"]:
        run()


def test_a_figure_that_is_not_printed_is_found():
    assert agrees(["...", "  dz/dx = 42", "..."], "one\n  dz/dx = 42\ntwo\n")
    assert agrees(["loss ..., accuracy 1"], "loss 0.25, accuracy 1\n")
    assert not agrees(["...", "  dz/dx = 42"], "one\n  dz/dx = 43\n")
    assert not agrees(["one"], "one\ntwo\n") and not agrees(["one", "two"], "one\n")
