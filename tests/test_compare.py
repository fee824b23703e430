"""scripts/compare and the table of docs/compared.md: what it says of this trainer, and that its judges can say no."""

import importlib.metadata
import importlib.util
import re
import subprocess
import sys
import warnings
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
MEASURED = {"lightning": "2.6.6", "accelerate": "1.15.0", "transformers": "5.23.0", "pytorch-ignite": "0.5.5"}
SCRIPT = ROOT / "scripts" / "compare"


@pytest.fixture(scope="module")
def compare() -> ModuleType:
    loader = SourceFileLoader("compare", str(SCRIPT))
    spec = importlib.util.spec_from_loader("compare", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(SCRIPT.parent))  # as Python itself does for a script
    sys.modules["compare"] = module  # its dataclasses look their module up
    writes, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    loader.exec_module(module)
    sys.dont_write_bytecode = writes
    return module


def installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def tables(text: str) -> dict[str, list[str]]:
    """The cells of every row of every Markdown table, by the row's first cell; the first table's wins."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line.startswith("|") and not line.startswith("|---"):
            name, *cells = [cell.strip() for cell in line.strip("|").split("|")]
            found.setdefault(name, cells)
    return found


def agree(said: str, measured: str) -> bool:
    """The same words; figures equal to 2 %, or both of rounding's size (below 1e-6)."""
    number = r"\d\.\de[+-]\d\d"
    if re.sub(number, "#", said) != re.sub(number, "#", measured):
        return False
    pairs = zip(re.findall(number, said), re.findall(number, measured), strict=True)
    return all(abs(float(a) - float(b)) <= max(0.02 * float(a), 1e-6) for a, b in pairs)


def textbook(problem: Any, net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """The loop that everybody writes."""
    net.train()
    k = problem.accumulation
    scheduler = problem.schedule(optimizer)
    for _ in range(problem.epochs):
        for index, batch in enumerate(problem.loader()):
            (problem.mean(net, *batch) / k).backward()
            if (index + 1) % k == 0 or index + 1 == len(problem.loader()):
                if problem.clip is not None:
                    nn.utils.clip_grad_norm_(net.parameters(), problem.clip)
                optimizer.step()
                optimizer.zero_grad()
            if problem.factor is not None:
                with warnings.catch_warnings(action="ignore"):  # torch warns of a tick before the first step
                    scheduler.step()


def test_the_page_says_of_this_trainer_what_is_measured_now(compare: ModuleType) -> None:
    page = tables((ROOT / "docs" / "compared.md").read_text(encoding="utf-8"))
    assert page["case"] == list(compare.TRAINERS)
    assert len(compare.CASES) == 10
    for case in compare.CASES:
        if case.name == "own loss":
            continue  # its model is transformers': measured below
        measured = compare.cell(case, compare.TRAINERS["this"][1])
        assert agree(page[case.name][-1], measured), (case.name, measured)
        assert f"**{case.name}**" in (ROOT / "docs" / "compared.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("tail", "5.0e-01"),
        ("ragged batch", "1.9e-01"),
        ("token weights", "4.8e-01"),
        ("NaN", "NaN in 4 of 4 parameters"),
        ("frozen norm", "4.4e-01; statistics moved"),
        ("no gradient", "not named"),
        ("clip", "1.0e+00"),
    ],
)
def test_each_judge_finds_the_textbook_loop_wrong(compare: ModuleType, name: str, found: str) -> None:
    case = next(case for case in compare.CASES if case.name == name)
    assert agree(found, compare.cell(case, textbook)), compare.cell(case, textbook)


def test_an_epoch_that_begins_again_after_a_kill_is_found(compare: ModuleType) -> None:
    def begins_again(problem: Any, net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        saved = problem.folder and problem.folder.with_name("model.pt")
        if problem.resume:
            net.load_state_dict(torch.load(saved, weights_only=True))
        if saved and not problem.resume:
            optimizer.register_step_post_hook(lambda *_: torch.save(net.state_dict(), saved))
        textbook(problem, net, optimizer)

    case = next(case for case in compare.CASES if case.name == "resume")
    assert float(compare.cell(case, begins_again)) > 0.1


def test_a_schedule_that_ticks_with_each_micro_batch_is_found(compare: ModuleType) -> None:
    case = next(case for case in compare.CASES if case.name == "schedule")
    assert float(compare.cell(case, textbook)) > 0.1


def test_a_right_loop_is_found_right(compare: ModuleType) -> None:
    """The reference is not this trainer's: the same rows summed by hand agree with it."""

    def by_rows(problem: Any, net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        batches = list(problem.loader())
        for _ in range(problem.epochs):
            for start in range(0, len(batches), problem.accumulation):
                window = batches[start : start + problem.accumulation]
                for inputs, targets in window:
                    share = len(inputs) / sum(len(rows) for rows, _ in window)
                    (problem.mean(net, inputs, targets) * share).backward()
                optimizer.step()
                optimizer.zero_grad()

    for name in ("tail", "ragged batch"):
        case = next(case for case in compare.CASES if case.name == name)
        assert float(compare.cell(case, by_rows)) < 1e-13


def test_the_page_says_of_the_others_what_is_measured_now() -> None:
    page = (ROOT / "docs" / "compared.md").read_text(encoding="utf-8")
    for package, version in MEASURED.items():
        assert version in page
        if installed(package) != version:
            pytest.skip(f"the page was measured with {package} {version}, here is {installed(package)}")
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    written, printed = tables(page), tables(done.stdout)
    assert list(printed) == list(written) and len(printed) == 10 + 5 + 2
    for name, cells in printed.items():
        for said, measured in zip(written[name], cells, strict=True):
            assert agree(said, measured), (name, said, measured)


def test_what_is_not_installed_is_named_and_left_out(
    compare: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compare, "version", lambda package: "1" if package == "gradtrainer" else None)
    monkeypatch.setattr(sys, "argv", ["compare", "--case", "tail"])
    compare.main()
    printed = capsys.readouterr()
    assert "lightning is not installed and left out: pip install lightning" in printed.err
    assert tables(printed.out)["case"] == ["this"]
