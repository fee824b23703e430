"""How a checkpoint is stored: what went in comes out, the old file or the new one, and nothing is ever unpickled."""

import json
import math
import os
import pickle
import stat
import subprocess
import sys
import zipfile

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from trainer.checkpoint import store
from trainer.errors import CheckpointError


def bits(tensor: torch.Tensor) -> bytes:
    whole = tensor.resolve_conj().resolve_neg().contiguous()
    return whole.flatten().view(torch.uint8).numpy().tobytes() if whole.numel() else b""


def equal(left, right) -> bool:
    if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
        return left.dtype == right.dtype and left.shape == right.shape and bits(left) == bits(right)
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return list(left) == list(right) and all(equal(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(equal(a, b) for a, b in zip(left, right, strict=True))
    if isinstance(left, float):
        return left.hex() == right.hex()
    return left == right


def test_every_kind_of_state_comes_out_as_it_went_in(tmp_path) -> None:
    shared = torch.randn(4)
    state = {
        "zero_dim": torch.tensor(3.5),
        "bf16": torch.randn(3, 2).bfloat16(),
        "float8": torch.randn(4).to(torch.float8_e4m3fn),
        "int64": torch.tensor([1 << 62, -1]),
        "bool": torch.tensor([True, False]),
        "complex64": torch.randn(2, dtype=torch.complex64),
        "imaginary": torch.randn(2, dtype=torch.complex64).conj().imag,
        "complex128": torch.randn(2, dtype=torch.complex128).conj(),
        "empty": torch.empty(0, 5),
        "transposed": torch.arange(6.0).reshape(2, 3).T,
        "strided": torch.arange(10)[::3],
        "expanded": torch.ones(1, 2).expand(3, 2),
        "of a parameter": torch.nn.Parameter(torch.ones(2)).detach(),
        "not finite": torch.tensor([math.nan, math.inf, -math.inf, -0.0]),
        "shared": [shared, shared, shared[1:3]],
        "numbers": (1, 1 << 80, -0.0, 0.1, math.nan, math.inf, -math.inf, True, None),
        "empty ones": [{}, [], ()],
        "texts": ["", "grün 🌱 \u2028", 'a"b\\c\n'],
        7: {0: torch.ones(1), "0": torch.zeros(1)},
        "a/b": torch.ones(1),
        "a": {"b": torch.zeros(1)},
        "a/b'": torch.full((1,), 2.0),
        "tensor": {"mapping": {"tensor": "list"}, "float": "nan"},
        "grün.🌱": torch.ones(1),
    }
    store.save(tmp_path / "state", state)
    assert equal(store.load(tmp_path / "state"), state)
    assert os.listdir(tmp_path) == ["state"]


_LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
    st.integers(0, 3).map(lambda size: torch.arange(size, dtype=torch.float64)),
)  # fmt: skip
_KEYS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=3),
    st.integers(-3, 3),
    st.sampled_from(["a", "a/b", "b"]),
)
_STATES = st.recursive(
    _LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3) | st.lists(inner, max_size=2).map(tuple) | st.dictionaries(_KEYS, inner, max_size=3)
    ),
    max_leaves=8,
)


@given(st.dictionaries(_KEYS, _STATES, max_size=4))
@settings(max_examples=80, deadline=None)
def test_any_nesting_comes_out_as_it_went_in(tmp_path_factory, state) -> None:
    path = tmp_path_factory.mktemp("any") / "state"
    store.save(path, state)
    assert equal(store.load(path), state)


def test_what_was_loaded_is_not_the_file(tmp_path) -> None:
    store.save(tmp_path / "state", {"a": torch.ones(1000)})
    loaded = store.load(tmp_path / "state")["a"]
    loaded.add_(1)
    with (tmp_path / "state").open("r+b") as file:
        file.truncate(0)
    assert loaded.sum() == 2000


@pytest.mark.parametrize(
    ("state", "sentence"),
    [
        ({"a": [object()]}, r"the state at 'a/0' is object: a checkpoint holds tensors, numbers and texts only"),
        ({"a": {"b": {1, 2}}}, r"the state at 'a/b' is set"),
        ({"a": {1.5: 0}}, r"the state at 'a' has keys that are neither texts nor numbers"),
        ({"a": {True: 0}}, r"the state at 'a' has keys"),
        ({"a": print}, r"the state at 'a' is builtin_function_or_method"),
    ],
)
def test_what_cannot_be_saved_is_named_and_nothing_is_written(tmp_path, state, sentence) -> None:
    with pytest.raises(CheckpointError, match=sentence):
        store.save(tmp_path / "state", state)
    assert os.listdir(tmp_path) == []


def test_a_sparse_tensor_is_refused_with_a_sentence(tmp_path) -> None:
    with pytest.raises(CheckpointError, match="the state at 'a' is a tensor of layout sparse_coo"):
        store.save(tmp_path / "state", {"a": torch.eye(3).to_sparse()})
    assert os.listdir(tmp_path) == []


# Atomic.


def test_a_new_file_takes_the_place_of_the_old_one_and_folders_are_made(tmp_path) -> None:
    path = tmp_path / "not" / "there" / "state"
    for value in (1, 2):
        store.save(path, {"a": torch.full((1000 * value,), value)})
        assert store.load(path)["a"].sum() == 1000 * value * value
    assert os.listdir(path.parent) == ["state"]


FULL = """
import resource, sys
from pathlib import Path
import torch
from trainer.checkpoint import store
from trainer.errors import CheckpointError
path = Path(sys.argv[1])
store.save(path, {"a": torch.ones(100)})
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
try:
    store.save(path, {"a": torch.zeros(1_000_000)})
except CheckpointError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit on a file's size")
def test_a_disk_that_is_full_leaves_the_old_file_and_no_other(tmp_path) -> None:
    path = tmp_path / "state"
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(path)], capture_output=True, text=True, timeout=60, check=True
    )
    assert f"{path} could not be written" in done.stdout
    assert "it needs 4000000 bytes" in done.stdout
    assert f"{path} could not be written (" in done.stdout
    assert "What was saved before is untouched." in done.stdout
    assert torch.equal(store.load(path)["a"], torch.ones(100))
    assert os.listdir(tmp_path) == ["state"]


def test_a_write_that_is_interrupted_leaves_the_old_file_and_no_other(tmp_path) -> None:
    path = tmp_path / "state"
    store.save(path, {"a": 1})

    def write(name: str) -> None:
        with open(name, "wb") as file:
            file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.replace(path, write, 4)
    assert store.load(path) == {"a": 1}
    assert os.listdir(tmp_path) == ["state"]


def test_a_folder_that_is_a_file_is_a_sentence(tmp_path) -> None:
    (tmp_path / "file").write_text("text")
    with pytest.raises(CheckpointError, match=r"file/state could not be written"):
        store.save(tmp_path / "file" / "state", {"a": 1})
    assert (tmp_path / "file").read_text() == "text"


def test_a_folder_in_the_files_place_is_a_sentence(tmp_path) -> None:
    (tmp_path / "state" / "inner").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="could not be written"):
        store.save(tmp_path / "state", {"a": 1})
    assert os.listdir(tmp_path) == ["state"]


def test_a_folder_that_vanishes_while_writing_is_a_sentence(tmp_path) -> None:
    folder = tmp_path / "folder"

    def write(name: str) -> None:
        os.unlink(name)
        folder.rmdir()
        open(name, "wb").close()

    with pytest.raises(CheckpointError, match="could not be written"):
        store.replace(folder / "state", write, 4)
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no umask")
@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_a_file_has_the_permissions_that_the_umask_leaves(tmp_path, mask) -> None:
    before = os.umask(mask)
    try:
        store.save(tmp_path / "state", {"a": torch.ones(1)})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o666 & ~mask


# Damaged, hostile, something else.


@pytest.fixture
def whole(tmp_path) -> bytes:
    store.save(tmp_path / "whole", {"a": torch.arange(50.0), "b": [1, 2.5, "text"], "c": {"d": torch.ones(2)}})
    return (tmp_path / "whole").read_bytes()


def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path, whole) -> None:
    path = tmp_path / "short"
    for end in [*range(0, 24), *range(24, len(whole), 7), len(whole) - 1]:
        path.write_bytes(whole[:end])
        with pytest.raises(CheckpointError, match="short cannot be read as a checkpoint"):
            store.load(path)


def test_a_changed_header_is_refused_or_harmless(tmp_path, whole) -> None:
    path = tmp_path / "changed"
    length = int.from_bytes(whole[:8], "little")
    for place in range(0, 8 + length, 2):
        for other in (0, 255, ord('"')):
            path.write_bytes(whole[:place] + bytes([other]) + whole[place + 1 :])
            try:
                store.load(path)
            except CheckpointError as error:
                assert "changed" in str(error)


class Evil:
    """Writes a file where it is unpickled."""

    def __init__(self, proof) -> None:
        self.proof = proof

    def __reduce__(self):
        return (exec, (f"open({str(self.proof)!r}, 'w').close()",))


def foreign(kind: str, path, proof) -> None:
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Evil(proof)))
    elif kind == "torch":
        torch.save({"model": Evil(proof)}, path)
    elif kind == "zip":
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("state", "{}")
    elif kind == "folder":
        path.mkdir()
    else:
        path.write_bytes({"empty": b"", "text": b"a" * 300, "noise": bytes(range(256)) * 4, "long": b"\xff" * 8}[kind])


@pytest.mark.parametrize("kind", ["empty", "text", "noise", "long", "pickle", "torch", "zip", "folder"])
def test_what_is_something_else_is_refused_and_never_unpickled(tmp_path, kind) -> None:
    path, proof = tmp_path / "foreign", tmp_path / "proof"
    foreign(kind, path, proof)
    with pytest.raises(CheckpointError, match="foreign cannot be read as a checkpoint"):
        store.load(path)
    with pytest.raises(CheckpointError, match="foreign cannot be read"):
        store.is_checkpoint(path)
    assert not proof.exists()


def test_a_file_that_is_not_there(tmp_path) -> None:
    with pytest.raises(CheckpointError, match="nothing is not there: name a checkpoint that exists"):
        store.load(tmp_path / "nothing")


def test_safetensors_of_somebody_else_are_told_apart(tmp_path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "bare", metadata={"format": "pt"})
    assert not store.is_checkpoint(tmp_path / "bare")
    with pytest.raises(CheckpointError, match="bare is no checkpoint of this trainer: it holds tensors without"):
        store.load(tmp_path / "bare")
    store.save(tmp_path / "own", {})
    assert store.is_checkpoint(tmp_path / "own")


STATES = [
    "3", "null", "{}", '{"tensor": "missing"}', '{"tensor": ["a"]}', '{"mapping": 3}', '{"mapping": [1, 2]}',
    '{"mapping": [[["a"], 1]]}', '{"mapping": [["a", {"float": "x"}]]}', '{"mapping": [["a", {"eval": "1"}]]}',
    '{"mapping": [["a", {"complex": "a"}]]}', '{"mapping": [["a", {"list": 1, "tuple": 2}]]}', '{"tuple": null}',
    '{"list": [' * 20_000 + "]}" * 20_000,
]  # fmt: skip
HEADERS = ["", "nonsense", "[]", "1", "null", "{}", '{"format": 1}', "[" * 100_000]
HEADERS += ['{"format": 1, "state": %s}' % state for state in STATES]  # noqa: UP031 (they are full of braces)
HEADERS += ['{"format": 2, "state": {"mapping": []}}', '{"format": "1", "state": {"mapping": []}}']


@pytest.mark.parametrize("header", HEADERS, ids=range(len(HEADERS)))
def test_a_header_made_by_hand_is_refused(tmp_path, header) -> None:
    save_file({"a": torch.ones(3)}, tmp_path / "made", metadata={"trainer": header})
    with pytest.raises(CheckpointError, match="made"):
        store.load(tmp_path / "made")


def test_the_structure_is_json_in_the_header_and_the_numbers_are_in_the_body(tmp_path, whole) -> None:
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    assert {"a", "c/d"} <= set(header)
    document = json.loads(header["__metadata__"]["trainer"])
    assert document["format"] == store.FORMAT
