"""When the state of a run is saved: on a thread, one at a time, and what stays."""

import os
import threading
import time

import pytest
import torch

from trainer import CheckpointError
from trainer.checkpoint import disk, folder, lock, store
from trainer.checkpoint.folder import listed
from trainer.checkpoint.saving import Saving
from trainer.errors import TrainerWarning
from trainer.settings import CheckpointSettings


def save(saving: Saving, value: int, **more) -> None:
    saving.save({"model": {"w": torch.full((5,), float(value))}}, {"steps": value, "micro_batches": value}, **more)


def steps(run) -> list[int]:
    return [one.manifest.clocks["steps"] for one in listed(run)]


class Held:
    """Writes that wait until they are let go."""

    def __init__(self, monkeypatch) -> None:
        self.gate = threading.Event()
        self.going, self.most, self.order = 0, 0, []
        write = store.write

        def held(path, taken, label):
            self.going += 1
            self.most = max(self.most, self.going)
            self.order.append(label.clocks["steps"])
            assert self.gate.wait(20)
            self.going -= 1
            return write(path, taken, label)

        monkeypatch.setattr(store, "write", held)


def test_training_goes_on_while_a_save_is_written_and_the_copy_stays_what_it_was(tmp_path, monkeypatch) -> None:
    held = Held(monkeypatch)
    saving = Saving(tmp_path, CheckpointSettings())
    weight = torch.ones(5)
    saving.save({"model": {"w": weight}}, {"steps": 1})
    saving.look()
    weight.fill_(7)  # the next step
    assert steps(tmp_path) == []
    held.gate.set()
    saving.wait()
    assert store.load(folder.last(tmp_path))["model"]["w"].tolist() == [1] * 5


def test_two_are_never_written_at_once_and_none_is_left_out(tmp_path, monkeypatch) -> None:
    held = Held(monkeypatch)
    saving = Saving(tmp_path, CheckpointSettings(keep_last=None))
    save(saving, 1)
    second = threading.Thread(target=save, args=(saving, 2))
    second.start()
    time.sleep(0.05)
    assert second.is_alive() and held.order == [1]
    held.gate.set()
    second.join()
    save(saving, 3)
    saving.wait()
    assert (held.most, held.order, steps(tmp_path)) == (1, [1, 2, 3], [1, 2, 3])


def test_the_very_same_state_is_not_written_twice(tmp_path) -> None:
    saving = Saving(tmp_path, CheckpointSettings(background=False, keep_last=None))
    save(saving, 1, best=("loss", 0.5))
    save(saving, 1)
    save(saving, 1, best=("loss", 0.5))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000001"]
    save(saving, 2)
    save(saving, 2, best=("loss", 0.4))  # the same, but it must be known as the best
    assert [one.path.name for one in listed(tmp_path)] == ["step-000001", "step-000002", "step-000002-2"]
    saving.save({"model": {"w": torch.zeros(5)}}, {"steps": 2, "micro_batches": 2})
    assert len(listed(tmp_path)) == 4
    assert [one.manifest.number for one in listed(tmp_path)] == [1, 2, 3, 4]


def test_numbers_go_on_after_a_damaged_one_and_in_another_process(tmp_path) -> None:
    for value in (1, 2):
        save(Saving(tmp_path, CheckpointSettings(background=False)), value)
    (tmp_path / "checkpoints" / "step-000002" / "manifest.json").write_text("")
    save(Saving(tmp_path, CheckpointSettings(background=False)), 2)
    assert [one.path.name for one in listed(tmp_path)] == ["step-000002", "step-000001", "step-000002-2"]
    assert folder.last(tmp_path).name == "step-000002-2"


@pytest.mark.parametrize("background", [True, False])
def test_a_failure_comes_up_and_the_next_save_is_tried_anew(background, tmp_path, monkeypatch) -> None:
    write = disk.write
    saving = Saving(tmp_path, CheckpointSettings(background=background))

    def act(value: int) -> None:
        save(saving, value)
        if background:
            saving._writer._thread.join()
            saving.look()

    act(1)
    monkeypatch.setattr(disk, "write", lambda path, pieces: write(path, [*pieces, 3]))  # no piece: a bug of ours
    with pytest.raises(TypeError):
        act(2)
    monkeypatch.setattr(
        disk, "write", lambda path, pieces: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(CheckpointError, match="step-000003 could not be written .*No space left on device"):
        act(3)
    saving._settings = CheckpointSettings(background=background, on_error="warn")
    with pytest.warns(TrainerWarning, match="step-000004 could not .* Training goes on .checkpoint.on_error=warn"):
        act(4)
    monkeypatch.setattr(disk, "write", write)
    act(5)
    saving.wait()
    assert steps(tmp_path) == [1, 5]
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step-000001", "step-000005"]


def test_at_the_end_a_failure_is_an_error_whatever_was_asked(tmp_path, monkeypatch) -> None:
    saving = Saving(tmp_path, CheckpointSettings(on_error="warn"))
    monkeypatch.setattr(disk, "write", lambda path, pieces: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    save(saving, 1)
    with pytest.raises(CheckpointError, match="Input/output error"):
        saving.wait()


def test_old_ones_that_cannot_be_removed_are_told_after_the_new_one_is_there(tmp_path, monkeypatch) -> None:
    saving = Saving(tmp_path, CheckpointSettings(background=False, keep_last=1))
    save(saving, 1)
    monkeypatch.setattr(disk, "remove", lambda *words: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    with pytest.raises(CheckpointError, match="that need not stay could not be removed .*Permission denied"):
        save(saving, 2)
    assert steps(tmp_path) == [1, 2]


def test_a_copy_that_is_refused_is_not_written(tmp_path) -> None:
    def refuses(taken) -> None:
        raise CheckpointError("not this one")

    saving = Saving(tmp_path, CheckpointSettings(background=False))
    with pytest.raises(CheckpointError, match="not this one"):
        save(saving, 1, check=refuses)
    assert os.listdir(tmp_path) == []


def test_the_folder_is_locked_and_swept_from_begin_to_end(tmp_path) -> None:
    left = tmp_path / "checkpoints" / ".step-000007.12.part"
    left.mkdir(parents=True)
    saving = Saving(tmp_path, CheckpointSettings())
    saving.begin()
    assert not left.exists()
    assert (tmp_path / lock.NAME).read_text() == f"{os.getpid()}\n"
    with pytest.raises(CheckpointError, match="in use"):
        Saving(tmp_path, CheckpointSettings()).begin()
    save(saving, 1)
    saving.end()
    assert steps(tmp_path) == [1]
    assert not (tmp_path / lock.NAME).exists()
