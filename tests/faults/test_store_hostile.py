"""Checkpoints made by an enemy, with every hash right: refused in one sentence, and nothing of theirs is run."""

import io
import json
import os
import pickle
import sys
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from runs import forged
from safetensors.torch import save
from tally import Tally, scratch

from trainer import CheckpointError
from trainer.checkpoint import finished, folder, manifest, store

GOOD = json.dumps({"mapping": [["a", {"tensor": "a"}], ["model", {"mapping": [["w", {"tensor": "w"}]]}]]}).encode()
REST = save({"a": torch.ones(3)})
MODEL = save({"w": torch.ones(3)})
FILES = {"state.json": GOOD, "rest.safetensors": REST, "model.safetensors": MODEL}


class Evil:
    """Makes the canary file where it is unpickled."""

    def __init__(self, canary: Path, how: str) -> None:
        self._canary, self._how = canary, how

    def __reduce__(self):
        if self._how == "system":
            return os.system, (f"touch {self._canary}",)
        if self._how == "loader":  # a load inside the load
            return pickle.loads, (pickle.dumps(Evil(self._canary, "system")),)
        return exec, (f"open({str(self._canary)!r}, 'w').close()",)


def with_file(name: str, content: bytes) -> Callable[[Path, Path], None]:
    return lambda path, canary: forged(path, {**FILES, name: content})


def pickled(name: str, how: str, torchs: bool) -> Callable[[Path, Path], None]:
    def make(path: Path, canary: Path) -> None:
        buffer = io.BytesIO()
        evil = {"model": {"w": torch.ones(3), "evil": Evil(canary, how)}}
        torch.save(evil, buffer) if torchs else pickle.dump(evil, buffer)
        forged(path, {**FILES, name: buffer.getvalue()})

    return make


def named(name: str) -> Callable[[Path, Path], None]:
    """The manifest calls the model's file by another name, which leads somewhere."""
    return lambda path, canary: forged(path, FILES, {"model.safetensors": name})


def in_place_of(name: str, make: Callable[[Path], None]) -> Callable[[Path, Path], None]:
    """Something that is no plain file in the place of one."""

    def act(path: Path, canary: Path) -> None:
        forged(path, FILES)
        content = (path / name).read_bytes()
        (path / name).unlink()
        (path.parent / "elsewhere").write_bytes(content)
        make(path / name)

    return act


def header(text: bytes | str, length: int | None = None, body: bytes = b"") -> bytes:
    text = text.encode() if isinstance(text, str) else text
    return (len(text) if length is None else length).to_bytes(8, "little") + text + body


def tensor(**changes) -> str:
    return json.dumps({"w": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]} | changes})


def structure(value: str) -> bytes:
    """state.json with a value made by hand beside the good ones."""
    return GOOD[:-2] + b', ["more", ' + value.encode() + b"]]}"


def zip_bomb() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", bytes(1 << 26))
    return buffer.getvalue()


CASES: dict[str, Callable[[Path, Path], None]] = {
    "a pickle for the model": pickled("model.safetensors", "exec", torchs=False),
    "a pickle for the structure": pickled("state.json", "system", torchs=False),
    "a torch file for the model": pickled("model.safetensors", "system", torchs=True),
    "a torch file for the rest": pickled("rest.safetensors", "exec", torchs=True),
    "a loader inside a loader": pickled("model.safetensors", "loader", torchs=True),
    "a zip bomb for the model": with_file("model.safetensors", zip_bomb()),
    "a zip bomb for the structure": with_file("state.json", zip_bomb()),
    "a name that goes up": named("../model.safetensors"),
    "a name from the root": named("/etc/passwd"),
    "a name of Windows": named("..\\model.safetensors"),
    "a name with a drive": named("C:\\model.safetensors"),
    "a name with a zero byte": named("model.safetensors\0.txt"),
    "a name of the manifest": named("manifest.json"),
    "a name with a newline": named("model.safetensors\n"),
    "a link for the model": in_place_of("model.safetensors", lambda path: path.symlink_to("../elsewhere")),
    "a link for the structure": in_place_of("state.json", lambda path: path.symlink_to("/etc/passwd")),
    "a link for the manifest": in_place_of("manifest.json", lambda path: path.symlink_to("../elsewhere")),
    "a pipe for the model": in_place_of("model.safetensors", lambda path: os.mkfifo(path)),
    "a folder for the model": in_place_of("model.safetensors", lambda path: path.mkdir()),
    "a header of 2^63 bytes": with_file("model.safetensors", header(tensor(), 1 << 63, bytes(12))),
    "a header of 2^40 bytes": with_file("model.safetensors", header(tensor(), 1 << 40, bytes(12))),
    "a header behind the end": with_file("model.safetensors", header(tensor(), 4096, bytes(12))),
    "a header nested 100,000 deep": with_file("model.safetensors", header("[" * 100_000)),
    "a tensor of 2^62 numbers": with_file("model.safetensors", header(tensor(shape=[1 << 62, 4]), None, bytes(12))),
    "a tensor behind its file": with_file("model.safetensors", header(tensor(data_offsets=[0, 1 << 40]), None, b"")),
    "a tensor before its file": with_file("model.safetensors", header(tensor(data_offsets=[-12, 0]), None, bytes(12))),
    "two tensors in one place": with_file(
        "model.safetensors", header(tensor()[:-1] + ", " + tensor()[1:].replace('"w"', '"v"'), None, bytes(12))
    ),
    "a type that nobody knows": with_file("model.safetensors", header(tensor(dtype="OBJECT"), None, bytes(12))),
    "a structure nested 100,000 deep": with_file("state.json", structure('{"list": [' * 100_000 + "]}" * 100_000)),
    "a structure that names code": with_file("state.json", structure('{"eval": "os.system(\'true\')"}')),
    "a structure with a key twice": with_file("state.json", structure('{"list": [], "list": [1]}')),
    "a number of a million digits": with_file("state.json", structure("9" * 1_000_000)),
    "a manifest of 5 MB": lambda path, canary: forged(path, FILES, {"state.json": "x" * 5_000_000}),
}  # fmt: skip


def trials(count: int, seed: int) -> Tally:
    """Each case is loaded as a run that goes on would, and as a start (init=)."""
    tally = Tally()
    for name, make in list(CASES.items())[:count]:
        with scratch() as there:
            path, canary = there / "run" / folder.CHECKPOINTS / "step-000001", there / "canary"
            make(path, canary)
            for load in (lambda: store.load(path), lambda: finished.load_start(path, torch.nn.Module())):  # noqa: B023
                wrong = refused(load, str(path))
                if wrong or canary.exists():
                    tally.note("loaded", f"{name}: {wrong or 'the canary is there'}")
                    break
            else:
                tally.note("refused")
    return tally


def refused(load: Callable[[], object], path: str) -> str | None:
    """What is wrong where a load is not refused with one sentence that names a file, within ten seconds."""
    found: list[str | None] = ["it hangs"]

    def act() -> None:
        try:
            load()
        except CheckpointError as error:
            found[0] = None if path in str(error) and len(str(error)) < 600 else f"said {str(error)[:600]}"
        except BaseException as error:
            found[0] = f"{type(error).__name__}: {error}"
        else:
            found[0] = "it was loaded"

    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    thread.join(10)
    return found[0]


@pytest.mark.skipif(sys.platform == "win32", reason="links and pipes")
def test_what_an_enemy_made_is_refused_and_nothing_of_it_is_run() -> None:
    assert len(CASES) == 33
    tally = trials(len(CASES), seed=1)
    assert not tally.broken, str(tally)


def test_the_canary_sings_where_a_pickle_is_loaded(tmp_path) -> None:
    """The control: what is in those files would have run."""
    for number, name in enumerate(("a pickle for the model", "a torch file for the model", "a loader inside a loader")):
        path, canary = tmp_path / str(number), tmp_path / f"canary-{number}"
        CASES[name](path, canary)
        content = (path / "model.safetensors").read_bytes()
        if content.startswith(b"PK"):
            torch.load(io.BytesIO(content), weights_only=False)
        else:
            pickle.loads(content)
        assert canary.exists(), name


def test_the_same_forger_makes_a_checkpoint_that_is_loaded(tmp_path) -> None:
    """The control: it is for what is in them that the others are refused."""
    forged(tmp_path / "good", FILES)
    assert store.load(tmp_path / "good")["model"]["w"].tolist() == [1.0] * 3
    assert manifest.read(tmp_path / "good").clocks == {"steps": 1}


def test_a_config_in_a_checkpoint_is_data_and_never_called(tmp_path) -> None:
    canary = tmp_path / "canary"
    config = {"optimizer": {"_target_": "os.system", "command": f"touch {canary}"}}
    store.save(tmp_path / "state", {"config": config})
    assert store.load(tmp_path / "state")["config"] == config
    assert not canary.exists()
