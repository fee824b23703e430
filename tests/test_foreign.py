"""Checkpoints of others, and of earlier versions: told, and never begun anew over in silence."""

import json
from pathlib import Path

import pytest
import torch
from runs import trainer_of
from safetensors.torch import save_file

from trainer import CheckpointError
from trainer.checkpoint import foreign
from trainer.checkpoint.folder import last


def hugging_face(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 500}))
    save_file({"weight": torch.ones(1)}, folder / "model.safetensors")
    return folder


def of_earlier(path: Path) -> Path:
    save_file({"weight": torch.ones(1)}, path, metadata={"trainer": "{}"})
    return path


def test_an_earlier_versions_checkpoint_is_never_begun_over(tmp_path) -> None:
    of_earlier(tmp_path / "last.safetensors")
    trainer = trainer_of("adamw", folder=tmp_path, steps=1)
    for words in ("auto", "last"):
        with pytest.raises(CheckpointError, match=r"last.safetensors is a checkpoint of an earlier version.*move the"):
            trainer.fit(resume=words)
    assert last(tmp_path) is None
    trainer.fit(resume="never")
    assert last(tmp_path) is not None and (tmp_path / "last.safetensors").exists()


OTHERS = {
    "checkpoint-500": (hugging_face, r"checkpoint-500 is a checkpoint of Hugging Face's Trainer .*init=.*safetensors"),
    "epoch=3.ckpt": (lambda path: path.write_bytes(b"PK"), r"epoch=3.ckpt is a pickled file of another program"),
    "other.safetensors": (
        lambda path: save_file({"a": torch.ones(1)}, path),
        r"other.safetensors is a file of parameters, which holds no state of a run",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_programs_checkpoint_is_told(name, tmp_path) -> None:
    make, words = OTHERS[name]
    make(tmp_path / "run" / name) if (tmp_path / "run").mkdir() is None else None
    trainer = trainer_of("adamw", folder=tmp_path / "run", steps=1)
    with pytest.raises(CheckpointError, match=rf"holds no checkpoint to go on from \(.*{words}.*name the run"):
        trainer.fit(resume="last")
    with pytest.raises(CheckpointError, match=rf"cannot be gone on from: it is {words.partition(' is ')[2]}"):
        trainer.fit(resume=tmp_path / "run" / name)
    trainer.fit(resume="auto")
    (note,) = [note for note in trainer.state.notes if "begins anew" in note]
    assert name in note and (tmp_path / "run" / name).exists()


def test_a_finished_model_without_a_checkpoint_is_told(tmp_path) -> None:
    trainer_of("adamw", folder=tmp_path, steps=1, checkpoint_last=False, checkpoint_best=False).fit()
    again = trainer_of("adamw", folder=tmp_path, steps=1)
    again.fit(resume="auto")
    assert "model.safetensors is there, but there is no checkpoint to go on from" in again.state.notes[0]


def test_an_empty_folder_and_a_file_of_logs_are_nothing_to_tell(tmp_path) -> None:
    (tmp_path / "metrics.jsonl").write_text("{}")
    assert foreign.beside(tmp_path, must_be=False) is None
    assert foreign.beside(tmp_path / "nothing", must_be=False) is None


def test_kinds(tmp_path) -> None:
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "config.json").write_text("{}")
    save_file({"a": torch.ones(1)}, tmp_path / "hub" / "model-00001-of-00002.safetensors")
    (tmp_path / "dcp").mkdir()
    for name in (".metadata", "__0_0.distcp"):
        (tmp_path / "dcp" / name).write_bytes(b"")
    (tmp_path / "plain").mkdir()
    assert "a Hugging Face model" in str(foreign.kind(tmp_path / "hub"))
    assert "torch.distributed.checkpoint" in str(foreign.kind(tmp_path / "dcp"))
    assert foreign.kind(tmp_path / "plain") is None and foreign.kind(tmp_path / "nothing.pt") is None
    (tmp_path / "torn.safetensors").write_bytes(b"\xff" * 20)
    assert not foreign.is_earlier(tmp_path / "torn.safetensors") and not foreign.is_earlier(tmp_path / "nothing")
