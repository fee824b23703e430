"""trainer state A B: the first step and field in which two checkpoints or two runs differ."""

import json

import pytest
import torch
from runs import found, trainer_of

from trainer import CheckpointError
from trainer.checkpoint import compare, store
from trainer.checkpoint.compare import Difference
from trainer.cli import main

STATE = {
    "model": {"a": torch.zeros(2, 3), "b": torch.ones(2)},
    "optimizers": [{"state": {0: {"exp_avg": torch.zeros(2, 3)}}}],
    "step": {"clocks": {"steps": 3}},
    "run": {"best": 0.5},
    "config": {"run": "one"},
}


def saved(path, steps: int = 3, **changes):
    store.save(path, {**STATE, **changes}, store.Label(1, {"steps": steps}))
    return path


@pytest.mark.parametrize(
    ("changes", "field", "left", "right", "others"),
    [
        ({"model": {"a": torch.zeros(2, 3).index_put((torch.tensor(1), torch.tensor(2)), torch.tensor(0.5)),
                    "b": torch.ones(2)}}, "model/a[1, 2]", "0.0", "0.5", 0),
        ({"model": {"a": -torch.zeros(2, 3), "b": torch.ones(2)}}, "model/a[0, 0]", "0.0", "-0.0", 0),
        ({"model": {"a": torch.zeros(3, 2), "b": torch.zeros(2)}}, "model/a", "F32 2×3", "F32 3×2", 1),
        ({"model": {"a": torch.zeros(2, 3).double(), "b": torch.ones(2)}}, "model/a", "F32 2×3", "F64 2×3", 0),
        ({"model": {"a": torch.zeros(2, 3)}}, "model/b", "F32 2", "nothing", 0),
        ({"step": {"clocks": {"steps": 4}}, "run": {"best": 1}}, "step/clocks/steps", "3", "4", 1),
        ({"run": {"best": 0.5000000000000001}}, "run/best", "0.5", "0.5000000000000001", 0),
        ({"run": {"best": 0.5, "more": "text"}}, "run/more", "nothing", '"text"', 0),
        ({"run": {"best": True}}, "run/best", "0.5", "true", 0),
    ],
)  # fmt: skip
def test_the_first_field_that_differs_and_how_many_more(changes, field, left, right, others, tmp_path, capsys) -> None:
    one, other = saved(tmp_path / "one"), saved(tmp_path / "other", **changes)
    found = compare.compare(one, other).difference
    assert found == Difference(3, field, left, right, others)
    assert main(["state", str(one), str(other)]) == 1
    said = capsys.readouterr().out
    assert f"differ at step 3, in {field}: {left} and {right}" in said
    assert ("more differ" in said) is bool(others)
    assert main(["state", str(one), str(other), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["difference"]["field"] == field


def test_equal_ones_are_equal_whatever_they_were_made_from(tmp_path, capsys) -> None:
    elsewhere = {**STATE["run"], "machine": {"threads": 4}}
    one, other = saved(tmp_path / "one"), saved(tmp_path / "other", config={"run": "other"}, run=elsewhere)
    assert main(["state", str(one), str(other)]) == 0
    assert "equal, bit for bit" in capsys.readouterr().out
    assert main(["state", str(one), str(other), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"equal": True, "difference": None}


def test_at_different_steps(tmp_path) -> None:
    one = saved(tmp_path / "one")
    other = saved(tmp_path / "other", steps=4, step={"clocks": {"steps": 4}})
    assert str(compare.compare(one, other).difference) == "differ in step/clocks/steps: 3 and 4"


def run(folder, **settings):
    every = {"checkpoint_every": 2, "checkpoint_clock": "steps", "checkpoint_keep_last": None, "steps": 6}
    every["checkpoint_best"] = False
    trainer = trainer_of("adamw", folder=folder, **{**every, "metrics_file": True, "log_every": 1, **settings})
    trainer.fit()
    return folder


def test_two_runs_are_compared_where_both_were_saved(tmp_path, capsys) -> None:
    one, same = run(tmp_path / "one"), run(tmp_path / "same", checkpoint_every=3)
    assert main(["state", str(one), str(same)]) == 0
    assert "at steps 6: equal, bit for bit" in capsys.readouterr().out
    assert main(["state", str(one), str(run(tmp_path / "two"))]) == 0
    assert "at steps 2, 4, 6: equal" in capsys.readouterr().out
    other = run(tmp_path / "other", start=1)
    assert main(["state", str(one), str(other)]) == 1
    assert "differ at step 1, in metrics.jsonl: loss: " in capsys.readouterr().out
    (other / "metrics.jsonl").unlink()
    assert main(["state", str(one), str(other)]) == 1
    assert "differ at step 2, in " in capsys.readouterr().out
    assert main(["state", str(one), str(found(one))]) == 0
    assert "step-000006-2: equal" in capsys.readouterr().out


def test_runs_without_a_step_in_common(tmp_path) -> None:
    one = run(tmp_path / "one", metrics_file=False, steps=2)
    other = run(tmp_path / "other", metrics_file=False, steps=3, checkpoint_every=None)
    with pytest.raises(CheckpointError, match="one has checkpoints at steps 2, .*other at 3: none in common"):
        compare.compare(one, other)


def test_damage_is_no_difference(tmp_path, capsys) -> None:
    one, other = saved(tmp_path / "one"), saved(tmp_path / "other")
    (other / "model.safetensors").write_bytes(b"")
    assert main(["state", str(one), str(other)]) == 5
    assert "other/model.safetensors is damaged" in capsys.readouterr().err
