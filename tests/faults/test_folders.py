"""A run's folder that cannot be written, that vanishes or has something in the way: a sentence with exit code 5, and
nothing is lost that was saved or that could still be."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from runs import bits, trainer_of
from test_run_state import differing, whole_state

from trainer import CheckpointError, Trainer
from trainer.checkpoint import lock, store
from trainer.checkpoint.folder import last
from trainer.errors import TrainerWarning

RUN = {"steps": 6, "evaluate_every": None, "checkpoint_every": 1, "checkpoint_clock": "steps"}
LOGS = {"metrics_file": True, "tensorboard": True}


class After:
    """A logger that does something to the folder after so many steps."""

    def __init__(self, steps: int, act) -> None:
        self.steps, self.act = steps, act

    def step(self, report, seconds: float) -> None:
        if report.clocks["steps"] == self.steps:
            self.act()


def replaced(run: Path) -> None:
    shutil.rmtree(run)
    run.write_text("somebody's file")


GONE = {"removed": shutil.rmtree, "moved": lambda run: run.rename(run.with_name("moved")), "replaced": replaced}


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("how", GONE)
def test_a_folder_that_goes_ends_the_run_with_a_sentence(how, background, tmp_path) -> None:
    run = tmp_path / "run"
    after = After(3, lambda: gone_when_still(trainer, how))
    trainer = trainer_of("adamw", folder=run, loggers=[after], checkpoint_background=background, **RUN, **LOGS)
    with pytest.raises(CheckpointError, match=r"could not be written.*(no such file|ot a directory)") as caught:
        trainer.fit()
    assert caught.value.exit_code == 5 and "run" in str(caught.value)
    if how == "replaced":
        assert run.read_text() == "somebody's file"
        return
    assert differing(whole_state(trainer), state_of(run)) == [], "what was trained is saved where the run was told"
    if how == "moved":
        path, _, damaged = store.newest(tmp_path / "moved")
        assert path is not None and not damaged, "nothing is lost that was saved"


def gone_when_still(trainer, how: str) -> None:
    trainer.state._saving._writer.wait()
    GONE[how](trainer.folder)


def state_of(run: Path):
    fresh = trainer_of("adamw", folder=run, start=9, poison=1e4, **RUN, **LOGS)
    fresh.state.resume("last")
    return whole_state(fresh)


@pytest.mark.parametrize("background", [True, False])
def test_training_goes_on_where_that_was_asked_for(background, tmp_path) -> None:
    run = tmp_path / "run"
    trainer = trainer_of(
        "adamw", folder=run, loggers=[After(2, lambda: gone_when_still(trainer, "removed"))],
        checkpoint_background=background, checkpoint_on_error="warn", **RUN, **LOGS,
    )  # fmt: skip
    with pytest.warns(TrainerWarning, match=r"could not be written.*Training goes on \(checkpoint.on_error=warn\)"):
        stop = trainer.fit()
    assert stop.clocks["steps"] == 6
    whole = trainer_of("adamw", folder=tmp_path / "whole", **RUN)
    whole.fit()
    assert bits(list(trainer.model.parameters())) == bits(list(whole.model.parameters()))
    path, state, damaged = store.newest(run)
    assert path is not None and not damaged and state["step"]["clocks"]["steps"] == 6


def test_a_log_that_fails_at_the_end_does_not_keep_the_state_from_being_saved(tmp_path) -> None:
    run = tmp_path / "run"

    def away() -> None:
        (run / "metrics.jsonl").unlink()

    trainer = trainer_of(
        "adamw", folder=run, loggers=[After(6, away)], metrics_file=True, **RUN | {"checkpoint_every": None}
    )
    with pytest.raises(CheckpointError, match=r"metrics.jsonl \(no such file"):
        trainer.fit()
    assert differing(whole_state(trainer), state_of(run)) == []


@pytest.mark.parametrize(
    ("name", "make", "words"),
    [
        ("checkpoints", Path.touch, "is in the way, as a folder for the checkpoints"),
        ("model.safetensors", Path.mkdir, "is in the way, as a file for the finished model"),
        ("run.lock", Path.mkdir, "cannot be written to"),
    ],
)
def test_what_is_in_the_way_is_told_before_anything_is_trained(name, make, words, tmp_path) -> None:
    make(tmp_path / name)
    trainer = trainer_of("adamw", folder=tmp_path, **RUN)
    with pytest.raises(CheckpointError, match=f"{words}.*another folder"):
        trainer.fit()
    assert not trainer.step.clocks.windows
    if (tmp_path / name).is_dir():
        (tmp_path / name).rmdir()
    else:
        (tmp_path / name).unlink()
    trainer.fit()  # the folder is not locked still
    assert last(tmp_path) is not None


def test_a_folder_under_a_file_is_told(tmp_path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="file/run cannot be written to .*give the run another folder"):
        trainer_of("adamw", folder=tmp_path / "file" / "run", **RUN).fit()


READ_ONLY = """
mount -t tmpfs tmpfs "$1" && mkdir "$1/run" || exit 77
"$2" -c 'import sys; sys.path[:0] = sys.argv[1:3]; import test_folders; test_folders.becomes_read_only(sys.argv[3])' \\
    "$3" "$4" "$1/run"
"""


def becomes_read_only(run: str) -> None:
    """The child, with a file system of its own, which becomes one to read in the third step and stays so."""
    trainer = trainer_of("adamw", folder=run, loggers=[After(3, lambda: remount(trainer))], **RUN)
    for _ in range(2):
        try:
            trainer.fit(resume="auto")
        except CheckpointError as error:
            print(error.exit_code, str(error))
        trainer = trainer_of("adamw", folder=run, **RUN)
    path, _, damaged = store.newest(Path(run))
    print(path.name, damaged)


def remount(trainer) -> None:
    trainer.state._saving._writer.wait()
    for file in lock._held.values():  # a file that is open for writing keeps a file system from becoming read-only
        file.close()
    subprocess.run(["mount", "-o", "remount,ro", str(trainer.folder.parent)], check=True)


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="only root may mount")
def test_a_file_system_that_becomes_read_only(tmp_path) -> None:
    here = Path(__file__).parent
    words = ["unshare", "-m", "sh", "-c", READ_ONLY, "sh", tmp_path, sys.executable, here, here.parent]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, check=False, timeout=100)
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("nobody may mount here")
    first, second, left = done.stdout.splitlines()[-3:]
    assert "could not be written" in first and first.startswith("5 ")
    assert second.startswith("5 ") and "cannot be written to (Read-only file system): give the run another" in second
    assert left == "step-000002 []", done.stdout


# The negative control: a loop that saved only after its loggers had written.


def test_without_the_safeguard_a_log_that_fails_loses_what_was_trained(tmp_path, monkeypatch) -> None:
    def stop(self, reason, keep):
        self._loggers.flush()
        keep()

    monkeypatch.setattr(Trainer, "_stop", stop)
    with pytest.raises(CheckpointError, match="holds no checkpoint to go on from"):
        test_a_log_that_fails_at_the_end_does_not_keep_the_state_from_being_saved(tmp_path)
