"""What a checkpoint holds: one list, and every part of it goes back. That a run then goes on bit for bit is
tests/test_run_state.py."""

import pytest
from runs import bits, saved, trainer_of

from trainer import CheckpointError, rng
from trainer.checkpoint import contents


def test_the_list_is_what_is_saved(tmp_path) -> None:
    trainer = trainer_of("adamw", folder=tmp_path, steps=3, config={"a": 1})
    trainer.fit()
    state = saved(tmp_path)
    assert set(state) == set(contents.PARTS)
    assert bits(state["model"]) == bits(contents.model_state(trainer.model))
    assert bits(state["optimizers"]) == bits([contents.optimizer_state(trainer.step.optimizers[0])])
    assert bits(state["step"]) == bits(trainer.step.state_dict())
    assert bits(state["rng"]) == bits(rng.capture())
    assert state["config"]["a"] == 1
    assert {"epoch_began", "order_seed", "best", "metrics", "owes_evaluation"} <= set(state["run"])


@pytest.mark.parametrize("part", [part for part in contents.PARTS if part != "config"])
def test_a_state_without_a_part_is_refused_before_anything_is_changed(part, tmp_path) -> None:
    trainer_of("adamw", folder=tmp_path, steps=3).fit()
    state = saved(tmp_path)
    del state[part]
    other = trainer_of("adamw", start=5, steps=3)
    before = bits([contents.model_state(other.model), other.step.state_dict(), rng.capture()])
    with pytest.raises(CheckpointError, match=f"here has no '{part}': it was not written whole, or by another version"):
        contents.put_back(state, other.model, other.step, ("best",), "here")
    assert bits([contents.model_state(other.model), other.step.state_dict(), rng.capture()]) == before


def test_what_is_put_back_is_what_was_taken(tmp_path) -> None:
    trainer_of("two", folder=tmp_path, steps=5).fit()
    state = saved(tmp_path)
    other = trainer_of("two", start=5, steps=5, poison=1e3)
    assert contents.put_back(state, other.model, other.step, ("best", "order_seed"), "here") == {
        "best": state["run"]["best"],
        "order_seed": state["run"]["order_seed"],
    }
    assert bits(contents.take(other.model, other.step, state["run"], {})) == bits({**state, "config": {}})
