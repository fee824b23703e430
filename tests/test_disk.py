"""What a save asks of the file system. That the order survives a crash is tests/faults/test_store_operations.py."""

import hashlib
import os

import pytest

from trainer.checkpoint import disk


def test_pieces_of_any_size_come_out_in_order_with_their_length_and_hash(tmp_path) -> None:
    large = os.urandom((1 << 20) + 3)
    small = [b"ab"] * 1000
    kinds = [
        [],
        [b""],
        [b"a"],
        [b"a", b"", b"bc"],
        [large],
        [b"a", large, b"b"],
        [large, large],
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
