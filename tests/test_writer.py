"""Saves off the step's path: one at a time, and no error is lost."""

import subprocess
import sys
import threading

import pytest

from trainer.checkpoint.writer import Writer


def test_one_job_at_a_time_on_a_thread_of_its_own() -> None:
    writer, going, most, seen, lock = Writer(), 0, 0, [], threading.Lock()

    def job() -> None:
        nonlocal going, most
        with lock:
            going += 1
            most = max(most, going)
        seen.append(threading.current_thread().name)
        threading.Event().wait(0.01)
        with lock:
            going -= 1

    for _ in range(5):
        writer.start(job)
    writer.wait()
    assert (most, seen) == (1, ["checkpoint"] * 5)
    writer.wait()


@pytest.mark.parametrize("ask", ["check", "wait", "start"])
def test_an_error_comes_up_once_at_whatever_is_asked_next(ask) -> None:
    writer = Writer()

    def fails() -> None:
        raise OSError("full")

    writer.start(fails)
    writer._thread.join()
    with pytest.raises(OSError, match="full"):
        writer.start(lambda: None) if ask == "start" else getattr(writer, ask)()
    writer.check()
    writer.wait()


def test_a_process_that_ends_waits_for_what_is_being_written(tmp_path) -> None:
    code = (
        "import sys, time\n"
        "from trainer.checkpoint.writer import Writer\n"
        "def job():\n"
        "    time.sleep(0.3)\n"
        "    open(sys.argv[1], 'w').close()\n"
        "Writer().start(job)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "done")], check=True, timeout=60)
    assert (tmp_path / "done").exists()
