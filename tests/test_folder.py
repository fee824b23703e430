"""The checkpoints of a run: which is last or best, which stay, and what is swept up."""

import os
import shutil

import pytest

from trainer import CheckpointError
from trainer.checkpoint import folder, manifest, store
from trainer.checkpoint.folder import Listed
from trainer.checkpoint.manifest import Manifest


def put(run, number: int, steps: int | None = None, best: float | None = None, name: str | None = None):
    steps = number if steps is None else steps
    path = run / folder.CHECKPOINTS / name if name else folder.unused(run, steps)
    label = store.Label(number, {"steps": steps, "micro_batches": steps}, None if best is None else ("loss", best))
    store.save(path, {"n": number}, label)
    return path


def test_the_newest_is_the_one_saved_last_not_the_one_furthest_on(tmp_path) -> None:
    paths = [put(tmp_path, 1, 100), put(tmp_path, 2, 200), put(tmp_path, 3, 150)]
    assert [path.name for path in paths] == ["step-000100", "step-000200", "step-000150"]
    assert folder.last(tmp_path) == paths[2]
    assert [one.path for one in folder.listed(tmp_path)] == paths
    again = put(tmp_path, 4, 100)
    assert again.name == "step-000100-2"
    assert put(tmp_path, 5, 100).name == "step-000100-3"
    assert put(tmp_path, 6, 1_234_567).name == "step-1234567"
    assert folder.last(tmp_path).name == "step-1234567"


def test_the_best_is_the_last_that_was_the_best_when_it_was_saved(tmp_path) -> None:
    assert folder.best(tmp_path) is folder.last(tmp_path) is None
    put(tmp_path, 1, best=0.5)
    best = put(tmp_path, 2, best=0.4)
    last = put(tmp_path, 3)
    for path, wanted in (
        (tmp_path, last), (tmp_path / "last", last), (tmp_path / "best", best), (last, last), (best, best),
        (tmp_path / folder.CHECKPOINTS, last), (tmp_path / folder.CHECKPOINTS / "best", best),
    ):  # fmt: skip
        assert folder.found(path) == wanted
    (best / manifest.NAME).write_text("")
    assert folder.best(tmp_path).name == "step-000001"


def test_where_none_is_a_sentence(tmp_path) -> None:
    (tmp_path / "run").mkdir()
    for path, sentence in (
        (tmp_path / "nothing", "nothing is not there: name a checkpoint or a run's folder"),
        (tmp_path / "run", "run holds no checkpoint: name one"),
        (tmp_path / "run" / "best", "run holds no best checkpoint"),
        (tmp_path / "nothing" / "last", "nothing holds no checkpoint"),
    ):
        with pytest.raises(CheckpointError, match=sentence):
            folder.found(path)
    broken = put(tmp_path / "run", 1)
    (broken / manifest.NAME).write_text("nonsense")
    with pytest.raises(CheckpointError, match=r"step-000001/manifest\.json is damaged"):
        folder.found(tmp_path / "run")


def test_what_is_damaged_is_tried_in_its_place_and_what_is_none_not_at_all(tmp_path) -> None:
    paths = [put(tmp_path, number) for number in (1, 2, 3)]
    (paths[1] / manifest.NAME).unlink()
    for name in ("notes", "step-1", ".step-000004.123.part"):
        (tmp_path / folder.CHECKPOINTS / name).mkdir()
    (tmp_path / folder.CHECKPOINTS / "step-000009").write_text("a file")
    assert [one.path.name for one in folder.newest_first(tmp_path)] == ["step-000002", "step-000003", "step-000001"]
    assert store.newest(tmp_path)[:2] == (paths[2], {"n": 3})
    (paths[2] / "state.json").write_text("{}")
    path, state, damaged = store.newest(tmp_path)
    assert (path, state) == (paths[0], {"n": 1})
    assert [str(error).partition(" is ")[0] for error in damaged] == [
        str(paths[1]), str(paths[2] / "state.json")
    ]  # fmt: skip
    shutil.rmtree(paths[0])
    assert store.newest(tmp_path)[:2] == (None, {})


def kept(rows, **settings) -> list[str]:
    """Rows are (name, steps, micro-batches, best)."""
    listed = [
        Listed(
            folder.Path(name),
            Manifest(number, {"steps": steps, "micro_batches": place}, None if best is None else ("loss", best), {}),
        )
        for number, (name, steps, place, best) in enumerate(rows)
    ]
    wanted = {"last": 1, "best": 0, "every": None, "clock": "steps", **settings}
    return sorted(str(path) for path in folder.kept(listed, **wanted))


def test_which_stay() -> None:
    rows = [("a", 2, 2, None), ("b", 4, 4, 0.5), ("c", 7, 7, 0.4), ("d", 8, 8, None), ("e", 12, 12, None)]
    assert kept(rows) == ["e"]
    assert kept(rows, last=2) == ["d", "e"]
    assert kept(rows, last=9) == kept(rows, last=None) == ["a", "b", "c", "d", "e"]
    assert kept(rows, best=1) == ["c", "e"]
    assert kept(rows, best=2) == kept(rows, best=9) == ["b", "c", "e"]
    # The first at or after 4, 8 and 12; before the first multiple none.
    assert kept(rows, every=4) == ["b", "d", "e"]
    assert kept(rows, every=5) == ["c", "e"]
    assert kept(rows, every=100) == ["e"]
    # Once removed, the others stay what they are.
    assert kept([row for row in rows if row[0] in kept(rows, every=4)], every=4) == ["b", "d", "e"]


def test_of_several_at_one_place_the_newest_counts_and_a_best_one_stays() -> None:
    rows = [("a", 4, 4, None), ("b", 8, 8, 0.3), ("c", 8, 8, None), ("d", 8, 8, None)]
    assert kept(rows, last=2) == ["a", "d"]
    assert kept(rows, last=2, best=1) == ["a", "b", "d"]


def test_one_that_cannot_be_read_stays(tmp_path) -> None:
    broken = Listed(tmp_path / "x", None, CheckpointError("damaged"))
    assert folder.kept([broken], 1, 1, None, "steps") == {tmp_path / "x"}


def test_pruning_removes_the_others_only(tmp_path) -> None:
    paths = [put(tmp_path, number) for number in (1, 2, 3)]
    (tmp_path / folder.CHECKPOINTS / "notes.txt").write_text("mine")
    folder.prune(tmp_path, {paths[1]})
    assert sorted(os.listdir(tmp_path / folder.CHECKPOINTS)) == ["notes.txt", "step-000002"]


def test_what_a_save_left_is_swept_up_and_nothing_else(tmp_path) -> None:
    put(tmp_path, 1)
    inside = tmp_path / folder.CHECKPOINTS
    ours = [inside / ".step-000002.71.part", inside / ".step-000001.71.gone", inside / ".step-000003.9.part"]
    for path in ours:
        path.mkdir()
    (ours[0] / "model.safetensors").write_text("half")
    (ours[0] / manifest.NAME).write_text("half")
    (tmp_path / ".model.safetensors.71.part").write_text("half")
    others = [inside / ".step-000002.71.part2", inside / ".hidden", inside / ".step-000004.71.part"]
    for path in others:
        path.mkdir()
    (others[2] / "my notes.txt").write_text("mine")
    (tmp_path / ".other.71.part").write_text("mine")
    (inside / ".step-000005.71.part").write_text("a file")
    os.symlink(others[2], inside / ".step-000006.71.part")
    removed = folder.sweep(tmp_path)
    assert sorted(removed) == sorted([*ours, tmp_path / ".model.safetensors.71.part"])
    assert folder.last(tmp_path).name == "step-000001"
    assert all(path.exists() for path in [*others, tmp_path / ".other.71.part", inside / ".step-000005.71.part"])
    assert (inside / ".step-000006.71.part").is_symlink()
    assert folder.sweep(tmp_path) == []
    assert folder.sweep(tmp_path / "nothing") == []
