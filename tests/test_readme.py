"""What the README shows, run as it stands there."""

import re
from pathlib import Path

from trainer.cli import main

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def test_trainer_and_step_run_as_shown(capsys):
    names: dict[str, object] = {}
    with_trainer, with_step, _ = blocks("python")
    exec(compile(with_trainer, "README.md", "exec"), names)
    assert "'loss': " in capsys.readouterr().out
    exec(compile(with_step, "README.md", "exec"), names)
    assert names["report"].clip_factor is not None
    assert names["step"].clocks.steps == 4
    assert len(with_trainer.splitlines()) < 15 and len(with_step.splitlines()) < 15


def test_the_recipe_of_ones_own_trains(tmp_path, monkeypatch, capsys):
    *_, python = blocks("python")
    (yaml,) = blocks("yaml")
    assert len((python + yaml).splitlines()) < 30
    (tmp_path / "my_recipes" / "recipe").mkdir(parents=True)
    (tmp_path / "my_recipes" / "my_model.py").write_text(python)
    (tmp_path / "my_recipes" / "recipe" / "mine.yaml").write_text(yaml)
    (command,) = re.findall(r"^trained by `trainer (.*)`\.$", README, flags=re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    assert main(command.split()) == 0
    said = capsys.readouterr().out
    assert "Sequential, 193 parameters" in said and "20 epochs done" in said
    loss = float(re.search(r"last evaluation: loss ([\d.e-]+)", said)[1])
    assert loss < 0.1
    assert list(tmp_path.glob("outputs/mine/*/model.safetensors"))
