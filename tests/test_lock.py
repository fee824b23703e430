"""One run in a folder: a second one is told who is there, and a process that dies leaves no lock behind."""

import os
import signal
import subprocess
import sys

import pytest
from runs import trainer_of

from trainer import CheckpointError
from trainer.checkpoint import lock
from trainer.checkpoint.lock import Lock

HOLDS = """
import sys, time
from pathlib import Path
from trainer.checkpoint.lock import Lock
Lock(Path(sys.argv[1])).take()
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLDS, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_another_process_is_kept_out_with_a_sentence_and_let_in_when_the_first_is_killed(tmp_path, holder) -> None:
    with pytest.raises(CheckpointError) as caught:
        Lock(tmp_path).take()
    assert str(caught.value) == (
        f"{tmp_path} is in use by process {holder.pid}: wait for it, or give this run another folder (run=NAME)."
    )
    assert caught.value.exit_code == 5
    trainer = trainer_of("momentum", folder=tmp_path, steps=1)
    with pytest.raises(CheckpointError, match=f"in use by process {holder.pid}"):
        trainer.fit()
    assert trainer.step.clocks.windows == 0
    assert os.listdir(tmp_path) == [lock.NAME]
    holder.send_signal(getattr(signal, "SIGKILL", signal.SIGTERM))
    holder.wait()
    assert Lock(tmp_path).take()
    trainer_of("momentum", folder=tmp_path / "other", steps=1).fit()


def test_another_trainer_of_this_process_is_kept_out_too(tmp_path) -> None:
    first, second = Lock(tmp_path), Lock(tmp_path / "." / ".." / tmp_path.name)
    assert first.take()
    with pytest.raises(CheckpointError, match="in use by another Trainer of this process"):
        second.take()
    first.release()
    first.release()
    assert os.listdir(tmp_path) == []
    assert second.take()
    second.release()


def test_a_run_lets_its_folder_go_at_its_end_also_when_it_fails(tmp_path) -> None:
    for _ in range(2):
        trainer_of("momentum", folder=tmp_path, steps=1).fit()
        assert lock.NAME not in os.listdir(tmp_path)
    trainer = trainer_of("momentum", folder=tmp_path, steps=1)
    with pytest.raises(CheckpointError):
        trainer.fit(resume=tmp_path / "nothing")
    assert lock.NAME not in os.listdir(tmp_path)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_child_neither_holds_the_lock_nor_gives_it_up(tmp_path) -> None:
    own = Lock(tmp_path)
    own.take()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            own.release()
            Lock(tmp_path).take()
        except CheckpointError as error:
            code = 0 if f"in use by process {os.getppid()}" in str(error) else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert (tmp_path / lock.NAME).exists()
    own.release()


def test_a_folder_that_cannot_be_written_to_is_a_sentence(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file cannot be written to .*: give the run another folder"):
        Lock(tmp_path / "file").take()


def test_a_file_system_without_locks_keeps_nobody_out(tmp_path, monkeypatch) -> None:
    fcntl = pytest.importorskip("fcntl")

    def none(*words):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", none)
    one = Lock(tmp_path)
    assert not one.take()
    one.release()


def test_held_for_a_while(tmp_path) -> None:
    with lock.held(tmp_path / "run"):
        with pytest.raises(CheckpointError, match="in use by another Trainer"), lock.held(tmp_path / "run"):
            pass
        assert (tmp_path / "run" / lock.NAME).exists()
    with lock.held(tmp_path / "run"):
        pass
    assert os.listdir(tmp_path / "run") == []
