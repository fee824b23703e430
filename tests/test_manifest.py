"""The manifest: every byte of it counts, and it is judged before it is believed."""

import hashlib
import json
import os
import sys

import pytest
from runs import forged

from trainer import CheckpointError
from trainer.checkpoint import manifest
from trainer.checkpoint.manifest import Entry, Manifest

WHOLE = Manifest(
    number=3,
    clocks={"steps": 5, "rows": 40},
    best=("loss", 0.1),
    files={"state.json": Entry(2, "a" * 64), "model.safetensors": Entry(7, "0" * 64)},
    world=2,
    version="1.2",
    time="2026-01-01T00:00:00+00:00",
)


def put(folder, content: bytes) -> None:
    folder.mkdir(exist_ok=True)
    (folder / manifest.NAME).write_bytes(content)


def test_what_is_written_is_read_and_is_json_for_people(tmp_path) -> None:
    put(tmp_path, WHOLE.encoded())
    assert manifest.read(tmp_path) == WHOLE
    assert WHOLE.size == 9
    document = json.loads(WHOLE.encoded())
    assert document["format"] == manifest.FORMAT and document["files"]["state.json"]["bytes"] == 2
    body = WHOLE.encoded().split(b',\n "sha256": "' + document["sha256"].encode())[0]
    assert hashlib.sha256(body).hexdigest() == document["sha256"]


def test_every_bit_of_it_counts(tmp_path) -> None:
    content = WHOLE.encoded()
    for place in range(len(content)):
        put(tmp_path, content[:place] + bytes([content[place] ^ (1 << place % 8)]) + content[place + 1 :])
        with pytest.raises(CheckpointError, match=r"manifest.json is damaged: its bytes are not those"):
            manifest.read(tmp_path)
    for end in range(0, len(content), 5):
        put(tmp_path, content[:end])
        with pytest.raises(CheckpointError, match=r"manifest.json is damaged"):
            manifest.read(tmp_path)
    put(tmp_path, content + b"\n")
    with pytest.raises(CheckpointError, match=r"manifest.json is damaged"):
        manifest.read(tmp_path)


def signed(change) -> bytes:
    """A manifest with another content and the right hash."""
    document = json.loads(WHOLE.encoded())
    del document["sha256"]
    change(document)
    body = json.dumps(document, indent=1).encode()[: -len(b"\n}")]
    return body + b',\n "sha256": "' + hashlib.sha256(body).hexdigest().encode() + b'"\n}\n'


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda d: d.update(format=3), "has format 3; this version reads format 2"),
        (lambda d: d.pop("format"), "has format None"),
        (lambda d: d.update(number=True), "True is out of place"),
        (lambda d: d.update(number="3"), "'3' is out of place"),
        (lambda d: d.update(clocks=[]), r"\[\] is out of place"),
        (lambda d: d["clocks"].update(steps=1.5), "1.5 is out of place"),
        (lambda d: d.update(best=3), "is no manifest that this version writes"),
        (lambda d: d["best"].pop("value"), "'value'"),
        (lambda d: d.pop("world"), "'world'"),
        (lambda d: d["files"].pop("state.json"), "it names no state.json"),
        (lambda d: d["files"].update({"../x.safetensors": {"bytes": 1, "sha256": "0" * 64}}), "it names a file"),
        (lambda d: d["files"]["state.json"].update(bytes=-1), "what it says of state.json cannot be"),
        (lambda d: d["files"]["state.json"].update(sha256="0" * 63), "what it says of state.json cannot be"),
        (lambda d: d["files"].update({"state.json": 3}), "is no manifest"),
    ],
)
def test_one_with_the_right_hash_and_a_wrong_content_is_refused(change, sentence, tmp_path) -> None:
    put(tmp_path, signed(change))
    with pytest.raises(CheckpointError, match=f"manifest.json .*{sentence}"):
        manifest.read(tmp_path)


def test_one_that_is_too_large_is_not_read(tmp_path) -> None:
    put(tmp_path, b" " * (1 << 22) + b"  ")
    with pytest.raises(CheckpointError, match="more than any manifest"):
        manifest.read(tmp_path)


def test_files_are_checked_against_it_by_name(tmp_path) -> None:
    forged(tmp_path / "c", {"state.json": b"{}", "model.safetensors": b"1234567"})
    folder, whole = tmp_path / "c", manifest.read(tmp_path / "c")
    manifest.check(folder, whole)
    assert manifest.content(folder, whole, "model.safetensors") == b"1234567"
    for content, sentence in (
        (b"1234568", r"model\.safetensors is damaged: its bytes are not those"),
        (b"123456", r"model\.safetensors is damaged: it has 6 bytes where 7 were written"),
        (b"12345678", "it has 8 bytes where 7 were written"),
        (None, r"model\.safetensors is missing: the checkpoint is not whole"),
    ):
        path = folder / "model.safetensors"
        path.unlink() if content is None else path.write_bytes(content)
        with pytest.raises(CheckpointError, match=sentence):
            manifest.check(folder, whole)
        with pytest.raises(CheckpointError, match=sentence):
            manifest.content(folder, whole, "model.safetensors")
        assert manifest.content(folder, whole, "state.json") == b"{}"


@pytest.mark.skipif(sys.platform == "win32" or not hasattr(os, "geteuid"), reason="links and pipes")
def test_only_plain_files_are_read(tmp_path) -> None:
    for make in (
        lambda path: path.symlink_to(tmp_path / "other"),
        lambda path: os.mkfifo(path),
        lambda path: path.mkdir(),
    ):
        path = tmp_path / "it"
        make(path)
        with pytest.raises(CheckpointError, match="it is not a plain file: a checkpoint has no links, pipes"):
            manifest.opened(path)
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
