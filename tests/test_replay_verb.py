"""`trainer replay`: what it prints, its exit codes, and what it takes from a folder that somebody else has written."""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import MSE, QUIET, rows
from torch import nn

from trainer import Trainer
from trainer.checkpoint import store
from trainer.cli import main
from trainer.diagnose.capture import captured
from trainer.optim import sgd

RECIPE = """# @package _global_
defaults: [{override /optimizer: sgd}]
model: {_target_: mine_replayed.Model}
objective: {_target_: mine_replayed.objective, _partial_: true}
data: {source: {_target_: mine_replayed.data}, batch_size: 8}
gradient: {accumulation_steps: 2}
limits: {epochs: 1}
seed: 0
"""
CODE = """import torch
from torch import nn

from trainer import Split


class Head(nn.Module):
    def __init__(self, shift):
        super().__init__()
        self.shift = shift

    def forward(self, x):
        return torch.log(x + self.shift)  # HERE


class Model(nn.Module):
    def __init__(self, shift=0.0):
        super().__init__()
        self.scale, self.drop, self.head = nn.Parameter(torch.ones(3)), nn.Dropout(0.3), Head(shift)

    def forward(self, x):
        return self.head(self.drop(x * self.scale) + 1)


def objective(model, batch):
    return (model(batch[0]) - batch[1]).square().mean()


def data():
    x = torch.rand(64, 3, generator=torch.Generator().manual_seed(1))
    x[37] = -5.0
    return Split((x, torch.zeros(64, 3)))
"""
LINE = 1 + next(index for index, line in enumerate(CODE.splitlines()) if "# HERE" in line)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: Any) -> tuple[Path, str]:
    """A folder with the recipe and a run of it, made once; and what the run has printed."""
    where = tmp_path_factory.mktemp("trained")
    (where / "recipe").mkdir()
    (where / "recipe" / "mine.yaml").write_text(RECIPE)
    (where / "recipe" / "mine_replayed.py").write_text(CODE)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as said:
        patch.chdir(where)
        patch.setattr(sys, "path", list(sys.path))
        assert main(["train", "recipe=mine", "run=a", "--config-dir", "."]) == 0
    sys.modules.pop("mine_replayed")
    return where, said.getvalue()


@pytest.fixture(autouse=True)
def here(trained: tuple[Path, str], tmp_path: Path, monkeypatch: Any) -> Any:
    shutil.copytree(trained[0], tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("mine_replayed", None)


def test_the_words_that_a_run_prints_name_the_fault(trained: tuple[Path, str], here: Path, capsys: Any) -> None:
    said = trained[1]
    (path,) = captured(here / "outputs" / "mine" / "a")
    words = f"trainer replay outputs/mine/a/captured/{path.name} --config-dir ."
    assert f"is kept as it was; what made it so is named by {words}\n" in said
    assert "  captured     outputs/mine/a/captured\n" in said
    printed = []
    by_folder, by_name = "replay outputs/mine/a --config-dir .", "replay recipe=mine run=a --config-dir ."
    for line in (words.removeprefix("trainer "), by_folder, by_name):
        assert main(line.split()) == 4
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    assert printed[0].splitlines()[1:] == printed[2].splitlines()[1:]
    head, where, got, some, data = printed[0].splitlines()
    assert head.startswith(f"outputs/mine/a/captured/{path.name}: the window after step ")
    assert f": log() in module 'head', recipe/mine_replayed.py:{LINE} (`return torch.log(x + self.shift)" in where
    assert " made nan " in where and got.startswith("  it got 8 × 3 float32 in [-")
    assert some.startswith("  rows of the micro-batch that are enough: ")
    assert data == "  rows of the data: 37"


def test_a_mended_model_is_exit_code_0_and_machines_can_read_it(here: Path, capsys: Any) -> None:
    assert main(["replay", "outputs/mine/a", "+model.shift=10.0", "--config-dir", ".", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["finite"], found["culprit"], found["micro_batches"]) == (True, None, 2)
    assert main(["replay", "outputs/mine/a", "--config-dir", ".", "--json"]) == 4
    found = json.loads(capsys.readouterr().out)
    assert (found["finite"], found["culprit"]["what"], found["data_rows"]) == (False, "log()", [37])
    assert found["culprit"]["place"]["line"] == LINE


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["outputs/mine/a"], "if you trust it, write trust=[mine_replayed]"),
        (["outputs/nowhere"], "outputs/nowhere is not there: name a folder that is in captured/"),
        (["outputs/mine/a", "modle.shift=1"], "there is no setting 'modle.shift': did you mean 'model'?"),
        (["outputs/mine/a", "gradient.nonfinte=skip"], "there is no setting 'gradient.nonfinte': did you mean"),
        (["outputs/mine/a", "precision=[fp32"], "'precision=[fp32' cannot be read"),
        (["outputs/mine/a", "precision=fp32,bf16"], "and no sweep, group or ~key"),
        (["outputs/mine/a", "precision=fp31"], "precision='fp31' is not possible"),
        (["outputs/mine/a", "-m"], "and no other flag"),
    ],
)
def test_what_cannot_be_meant_is_one_sentence(words: list[str], sentence: str, here: Path, capsys: Any) -> None:
    assert main(["replay", *words]) in (2, 5)
    out, err = capsys.readouterr()
    assert out == ""
    assert sentence in err
    assert err.count("\n") == 1


def test_who_is_trusted_is_never_read_from_the_folder(here: Path, capsys: Any) -> None:
    (path,) = captured(here / "outputs" / "mine" / "a")
    state = store.load(path)
    state["config"] |= {"trust": ["os"], "model": {"_target_": "os.mkdir", "path": "canary"}}
    store.save(here / "hostile", state)
    capsys.readouterr()
    assert main(["replay", "hostile", "--config-dir", "."]) == 2
    assert "os.mkdir is refused" in capsys.readouterr().err
    assert not (here / "canary").exists()


def test_a_window_of_a_trainer_in_python_says_which_call_runs_it(here: Path, capsys: Any) -> None:
    class Roots(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x * self.w).sqrt().sum(-1, keepdim=True)

    model = Roots()
    Trainer(model, MSE, sgd(model.parameters(), lr=0.1), data=rows(8), epochs=1, folder=here / "p", **QUIET).fit()
    assert main(["replay", "p"]) == 2
    err = capsys.readouterr().err
    assert 'call trainer.replay("p/captured/window-000001", model, objective).' in err


def test_without_a_path_the_next_window_of_the_config_is_run(here: Path, capsys: Any) -> None:
    assert main(["replay", "recipe=xor"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("the window after step 0, of 1 micro-batch: it was asked for\nall stays finite: ")
    assert main(["replay", "recipe=mine", "--config-dir", ".", "data.batch_size=64", "seed=1"]) == 4
    assert "rows of the data: 37\n" in capsys.readouterr().out
    assert [path.name for path in (here / "outputs" / "mine").iterdir()] == ["a"]


def test_an_error_of_the_users_own_keeps_its_traceback(here: Path, capsys: Any) -> None:
    code = CODE.replace("return torch.log(x + self.shift)", "raise LookupError('mine')")
    (here / "recipe" / "mine_replayed.py").write_text(code)
    os.utime(here / "recipe" / "mine_replayed.py", (1, 1))  # newer or older: not what was compiled before
    capsys.readouterr()
    assert main(["replay", "outputs/mine/a", "--config-dir", "."]) == 1
    err = capsys.readouterr().err
    assert "LookupError: mine" in err
    assert "trainer/diagnose" not in err.split("mine_replayed.py")[0]


def test_in_a_pipe_that_is_closed(here: Path) -> None:
    line = f"{sys.executable} -m trainer replay outputs/mine/a --config-dir . | head -c 20"
    done = subprocess.run(line, shell=True, capture_output=True, text=True, timeout=120, cwd=here)
    assert done.stdout == "outputs/mine/a/captu"
    assert done.stderr == ""
