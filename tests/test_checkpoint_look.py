"""trainer state PATH: what lies there, whether every byte is as it was written, and what is wrong."""

import json

import pytest
from runs import found, trainer_of

from trainer import CheckpointError
from trainer.checkpoint import folder
from trainer.checkpoint.look import look
from trainer.cli import main


@pytest.fixture
def run(tmp_path):
    trainer_of("adamw", folder=tmp_path / "run", steps=4, checkpoint_every=2, checkpoint_clock="steps").fit()
    return tmp_path / "run"


def test_one_checkpoint(run, capsys) -> None:
    path = found(run)
    for word in (path, run / "last"):
        assert main(["state", str(word)]) == 0
        said = capsys.readouterr()
        assert not said.err
        lines = said.out.splitlines()
        assert lines[0] == path.as_posix()
        assert "steps 4, rows 32" in said.out and "windows 4" in said.out
        for name in ("state.json", "model.safetensors", "optimizers.safetensors", "rest.safetensors"):
            (line,) = (line for line in lines if f" {name} " in line)
            assert f"{(path / name).stat().st_size:,} bytes  whole" in line
        assert "  model      9 tensors, 56 numbers" in lines
        assert lines[-1].startswith("whole: ") and lines[-1].endswith("in 4 files, each as it was written (SHA-256)")
    assert main(["state", str(path), "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["whole"] is True and values["manifest"]["clocks"]["steps"] == 4
    assert values["parts"]["model"] == {"tensors": 9, "numbers": 56}


def test_all_of_a_run(run, capsys) -> None:
    for word in (run, run / folder.CHECKPOINTS):
        assert main(["state", str(word)]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0] == run.as_posix() and len(lines) == 1 + len(folder.listed(run))
        assert "whole, last" in lines[-1]
        assert sum(line.endswith("best") for line in lines) == 1
    assert main(["state", str(run), "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["last"] == found(run).as_posix() and values["best"] == found(run / "best").as_posix()
    assert all(one["whole"] and one["error"] is None for one in values["checkpoints"])


@pytest.mark.parametrize("name", ["model.safetensors", "state.json", "manifest.json"])
def test_what_is_damaged_is_named_and_the_exit_code_is_5(name, run, capsys) -> None:
    path = found(run)
    content = bytearray((path / name).read_bytes())
    content[len(content) // 2] ^= 1
    (path / name).write_bytes(content)
    sentence = f"{path / name} is damaged: its bytes are not those that were written (SHA-256).\n"
    for word in (path, run):
        assert main(["state", str(word)]) == 5
        said = capsys.readouterr()
        assert said.err == sentence
        assert ("damaged" in said.out) is (word == run or name != "manifest.json")
        assert main(["state", str(word), "--json"]) == 5
        values = json.loads(capsys.readouterr().out)
        errors = [values["error"]] if word == path else [one["error"] for one in values["checkpoints"] if one["error"]]
        assert errors == [sentence.strip()]
    (path / name).unlink()
    assert main(["state", str(path)]) == 5
    assert f"{path / name} is missing: the checkpoint is not whole." in capsys.readouterr().err


def test_where_nothing_is(tmp_path, capsys) -> None:
    with pytest.raises(CheckpointError, match="nothing is not there"):
        look(tmp_path / "nothing")
    assert main(["state", str(tmp_path / "nothing")]) == 5
    assert capsys.readouterr().err == f"{tmp_path / 'nothing'} is not there: name a checkpoint or a run's folder.\n"
    for words in ([], ["a", "b", "c"]):
        assert main(["state", *words]) == 2
        assert "give it one path or two" in capsys.readouterr().err
    assert main(["state", "--help"]) == 0
    assert "usage: trainer state PATH [PATH] [flags]" in capsys.readouterr().out
