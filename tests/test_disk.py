"""What a save asks of the file system. That the order survives a crash is tests/faults/test_store_operations.py."""

import contextlib
import hashlib
import os
import shutil

import pytest

from trainer.checkpoint import disk


def test_pieces_of_any_size_come_out_in_order_with_their_length_and_hash(tmp_path) -> None:
    large, exact = os.urandom((1 << 20) + 3), os.urandom(1 << 20)
    small = [b"ab"] * 1000
    kinds = [
        [],
        [b""],
        [b"a"],
        [b"a", b"", b"bc"],
        [large],
        [b"a", large, b"b"],
        [large, large],
        [exact],
        [b"a", exact, b"b"],
        [b"a" * 700_000, b"b" * 700_000, exact, b"c"],
        small,
        [bytearray(b"x")],
    ]
    for number, pieces in enumerate(kinds):
        whole = b"".join(pieces)
        path = tmp_path / str(number)
        expected = len(whole), hashlib.sha256(whole).hexdigest()
        assert disk.write(path, [memoryview(piece) for piece in pieces]) == expected
        assert path.read_bytes() == whole
        assert disk.digest(pieces) == expected


def test_a_short_write_is_gone_on_with(tmp_path, monkeypatch) -> None:
    real = os.write

    class Short:
        def __getattr__(self, name):
            return getattr(os, name)

        def write(self, handle, data):
            return real(handle, data[: max(1, len(data) // 3)])

    monkeypatch.setattr(disk, "os", Short())
    disk.write(tmp_path / "file", [b"0123456789" * 50])
    assert (tmp_path / "file").read_bytes() == b"0123456789" * 50


def test_a_file_that_is_there_is_not_written_over(tmp_path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError):
        disk.write(tmp_path / "file", [b"theirs"])
    assert (tmp_path / "file").read_text() == "mine"


def test_many_small_pieces_are_few_calls(tmp_path, monkeypatch) -> None:
    calls = []

    class Counts:
        def __getattr__(self, name):
            return getattr(os, name)

        def write(self, handle, data):
            calls.append(len(data))
            return os.write(handle, data)

    monkeypatch.setattr(disk, "os", Counts())
    disk.write(tmp_path / "file", [b"x" * 100] * 5000)
    assert calls == [500_000]


def test_folders_are_made_one_by_one_and_a_file_in_the_way_is_an_error(tmp_path) -> None:
    disk.make_folder(tmp_path / "a" / "b" / "c")
    disk.make_folder(tmp_path / "a" / "b" / "c")
    assert (tmp_path / "a" / "b" / "c").is_dir()
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError):
        disk.make_folder(tmp_path / "file" / "b")


def test_a_folder_is_removed_by_way_of_another_name(tmp_path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_text("")
    disk.remove(tmp_path / "a", tmp_path / ".a.gone")
    assert os.listdir(tmp_path) == []


def test_the_room_that_is_left_is_told_also_for_a_folder_that_is_not_there(tmp_path) -> None:
    assert int(disk.free(tmp_path / "not" / "there")) > 0


def test_the_room_is_that_of_the_nearest_folder_that_is_there(tmp_path, monkeypatch) -> None:
    asked = []
    real = shutil.disk_usage
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda folder: (asked.append(folder), real(folder))[1])
    disk.free(tmp_path)
    disk.free(tmp_path / "a" / "b")
    assert asked == [tmp_path, tmp_path]


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts what is open by /proc")
def test_nothing_is_left_open(tmp_path) -> None:
    def pieces():
        yield b"x"
        raise LookupError

    before = len(os.listdir("/proc/self/fd"))
    disk.write(tmp_path / "file", [b"x"])
    disk.sync_folder(tmp_path)
    with pytest.raises(LookupError):
        disk.write(tmp_path / "other", pieces())
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("name", ["posix", "nt"])
def test_only_on_windows_a_folder_that_cannot_be_opened_needs_no_sync(name, tmp_path, monkeypatch) -> None:
    class Refuses:
        def __getattr__(self, attribute):
            return name if attribute == "name" else getattr(os, attribute)

        def open(self, path, flags):
            raise PermissionError(path)

    monkeypatch.setattr(disk, "os", Refuses())
    with contextlib.nullcontext() if name == "nt" else pytest.raises(PermissionError):
        disk.sync_folder(tmp_path)
