"""What a run's folder says of how it came about, and that the words in it give the same run."""

import shlex
import sys

import pytest
import yaml

from trainer.cli import main
from trainer.config import record
from trainer.errors import TrainerError

ROOT = "defaults: [train, _self_]\nseed: 5\n"
MINE = """# @package _global_
description: größer
model: {_target_: trainer.recipes.xor_mlp.MLP, width: "${data.batch_size}"}
objective: {_target_: torch.nn.BCEWithLogitsLoss}
data: {source: {_target_: trainer.recipes.xor.table}, batch_size: 4}
limits: {epochs: 2}
loggers: {console: false, tensorboard: false}
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "my own" / "recipe").mkdir(parents=True)
    (tmp_path / "my own" / "recipe" / "mine.yaml").write_text(MINE, encoding="utf-8")
    (tmp_path / "my own" / "root.yaml").write_text(ROOT)
    return tmp_path


def test_the_config_is_plain_yaml_and_the_words_run_it_again(here):
    words = ["train", "recipe=mine", "optimizer.lr=0.5", "--config-name", "root", "--config-dir", "my own"]
    assert main(words) == 0
    (folder,) = (here / "outputs" / "mine").iterdir()
    text = (folder / "config.yaml").read_text(encoding="utf-8")
    config = yaml.safe_load(text)
    assert config["recipe"] == "mine" and config["optimizer"]["lr"] == 0.5 and config["seed"] == 5
    assert config["model"]["width"] == 4 and "größer" in text and "hydra" not in config and "${" not in text
    where, again, going_on = (folder / "command.txt").read_text().splitlines()
    assert where == f"# in {here}" and text.startswith(f"# {again}\n")
    assert again == "trainer train recipe=mine optimizer.lr=0.5 --config-name root --config-dir 'my own'"
    assert going_on == (
        f"# to go on with this run: trainer train recipe=mine optimizer.lr=0.5 run={folder.name} "
        "--config-name root --config-dir 'my own'"
    )
    assert main(shlex.split(again)[1:]) == 0
    (other,) = [path for path in (here / "outputs" / "mine").iterdir() if path != folder]
    assert (other / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert main([*shlex.split(going_on.partition(": ")[2])[1:], "limits.epochs=3"]) == 0
    assert len(list((here / "outputs" / "mine").iterdir())) == 2  # it went on where it was
    assert yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))["limits"]["epochs"] == 3


def test_a_run_with_a_name_needs_no_other_words_to_go_on_and_evaluation_records_nothing(here):
    assert main(["train", "recipe=mine", "run=a", "--config-dir", "my own"]) == 0
    folder = here / "outputs" / "mine" / "a"
    before = (folder / "command.txt").read_text()
    assert before.splitlines()[1:] == ["trainer train recipe=mine run=a --config-dir 'my own'"]
    assert main(["eval", "recipe=mine", "run=a", "seed=7", "--config-dir", "my own"]) == 0
    assert main(["train", "recipe=mine", "run=a", "optimizer.lr=9", "--config-dir", "my own"]) == 2  # is refused
    assert (folder / "command.txt").read_text() == before


def test_a_folder_that_cannot_be_written_is_a_sentence(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(TrainerError, match="the run cannot be recorded there"):
        record.write(tmp_path / "file", {}, ["trainer"], "trainer")
