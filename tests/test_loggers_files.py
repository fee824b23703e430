import resource
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from trainer.errors import CheckpointError, TrainerWarning
from trainer.loggers.files import RECORDS, RecordFile, write_whole


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """The operating system refuses files larger than this: what a full disk does, with a short write first."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_records_wait_and_are_written_together(tmp_path: Path) -> None:
    file = RecordFile(tmp_path / "log")
    for _ in range(RECORDS - 1):
        file.write(b"ab\n")
    assert (tmp_path / "log").read_bytes() == b""
    file.write(b"ab\n")
    assert (tmp_path / "log").read_bytes() == b"ab\n" * RECORDS
    file.write(b"last")
    file.close()
    file.close()
    assert (tmp_path / "log").read_bytes() == b"ab\n" * RECORDS + b"last"


def test_a_record_after_a_second_takes_along_what_waits(tmp_path: Path) -> None:
    file = RecordFile(tmp_path / "log")
    file.write(b"1")
    time.sleep(1.05)
    file.write(b"2")
    assert (tmp_path / "log").read_bytes() == b"12"
    file.close()


def test_it_adds_to_what_is_there_unless_it_must_be_new(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "log"
    for text in (b"1", b"2"):
        file = RecordFile(path)
        file.write(text)
        file.close()
    assert path.read_bytes() == b"12"
    with pytest.raises(CheckpointError, match="log cannot be opened for writing"):
        RecordFile(path, new=True)


def test_a_full_disk_is_told_and_leaves_whole_records(tmp_path: Path) -> None:
    path = tmp_path / "log"
    file = RecordFile(path)
    file.write(b"x" * 60 + b"\n")
    file.flush()
    with largest_file(100):
        file.write(b"y" * 60 + b"\n")
        with pytest.raises(
            CheckpointError, match=r"61 bytes could not be written to .*log .*bytes free.*free some space"
        ):
            file.flush()
        with pytest.raises(CheckpointError, match="could not be written"):
            file.write(b"z")
        file.close()
    assert path.read_bytes() == b"x" * 60 + b"\n"


def test_where_training_goes_on_a_full_disk_is_told_once_and_later_records_are_tried(tmp_path: Path) -> None:
    path = tmp_path / "log"
    file = RecordFile(path, goes_on=True)
    file.write(b"x" * 60 + b"\n")
    file.flush()
    with largest_file(100):
        file.write(b"y" * 60 + b"\n")
        with pytest.warns(
            TrainerWarning, match=r"61 bytes could not be written .*Training goes on \(checkpoint.on_error"
        ):
            file.flush()
        file.write(b"z" * 60 + b"\n")
        file.flush()  # not told again
    file.write(b"last\n")
    file.close()
    assert path.read_bytes() == b"x" * 60 + b"\n" + b"last\n"


def test_where_training_goes_on_a_file_that_vanished_is_told_once(tmp_path: Path) -> None:
    file = RecordFile(tmp_path / "run" / "log", goes_on=True)
    shutil.rmtree(tmp_path / "run")
    file.write(b"1")
    with pytest.warns(TrainerWarning, match="see that its folder is there and can be written to"):
        file.flush()
    file.write(b"2")
    file.close()
    with pytest.warns(TrainerWarning, match=r"picture.png cannot be written \(no such file"):
        write_whole(tmp_path / "run" / "picture.png", b"first", goes_on=True)


def test_a_file_that_vanished_is_told(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    file = RecordFile(folder / "log")
    shutil.rmtree(folder)
    file.write(b"1")
    with pytest.raises(CheckpointError, match="no such file"):
        file.flush()
    file.close()


def test_a_file_that_was_replaced_is_told(tmp_path: Path) -> None:
    path = tmp_path / "log"
    file = RecordFile(path)
    path.rename(tmp_path / "moved")
    path.write_bytes(b"another")
    file.write(b"1")
    with pytest.raises(CheckpointError, match="another file took its place"):
        file.close()
    assert path.read_bytes() == b"another"


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="the folder .* cannot be made"):
        RecordFile(tmp_path / "file" / "run" / "log")


def test_a_whole_file_takes_the_place_of_another_or_leaves_it(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    write_whole(path, b"first")
    write_whole(path, b"second")
    assert [one.name for one in tmp_path.iterdir()] == ["picture.png"]
    assert path.read_bytes() == b"second"
    with (
        largest_file(3),
        pytest.raises(CheckpointError, match=r"picture.png cannot be written \(file too large\): free"),
    ):
        write_whole(path, b"third")
    assert path.read_bytes() == b"second"
    assert [one.name for one in tmp_path.iterdir()] == ["picture.png"]
    with pytest.raises(CheckpointError, match=r"picture.png cannot be written \(no such file or directory\)"):
        write_whole(tmp_path / "gone" / "picture.png", b"")
