"""How a checkpoint is stored: what went in comes out, all of it or nothing, and nothing is ever unpickled."""

import math
import os
import stat
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import forged
from safetensors.torch import load_file, save

import trainer
from trainer.checkpoint import disk, manifest, store
from trainer.checkpoint.nested import snapshot
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
    for path in (tmp_path / "state").iterdir():
        path.write_bytes(b"")
    assert loaded.sum() == 2000


def test_the_parts_of_a_state_have_files_of_their_own_that_the_library_reads(tmp_path) -> None:
    state = {
        "model": {"0.weight": torch.arange(6.0).reshape(2, 3), "n": torch.tensor(3)},
        "optimizers": [{"state": {0: {"exp_avg": torch.ones(2)}}, "lr": 0.1}],
        "rng": {"torch": torch.arange(3, dtype=torch.uint8)},
        "ranks": [{"own": torch.zeros(1)}, {"own": torch.ones(1), "n": 1}, {}],
    }
    store.save(tmp_path / "state", state)
    assert equal(store.load(tmp_path / "state"), state)
    assert sorted(path.name for path in (tmp_path / "state").iterdir()) == [
        "manifest.json", "model.safetensors", "optimizers.safetensors", "rank-00000.safetensors",
        "rank-00001.safetensors", "rest.safetensors", "state.json",
    ]  # fmt: skip
    model = load_file(tmp_path / "state" / "model.safetensors")
    assert sorted(model) == ["0.weight", "n"]
    assert all(equal(tensor, state["model"][name]) for name, tensor in model.items())
    assert equal(load_file(tmp_path / "state" / "rank-00001.safetensors"), {"own": torch.ones(1)})


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


# All or nothing.


def test_folders_are_made_and_what_is_there_is_never_overwritten(tmp_path) -> None:
    path = tmp_path / "not" / "there" / "state"
    store.save(path, {"a": 1})
    with pytest.raises(CheckpointError, match="state could not be written .*state is there already"):
        store.save(path, {"a": 2})
    assert store.load(path) == {"a": 1}
    assert os.listdir(path.parent) == ["state"]
    (tmp_path / "file").write_text("text")
    for taken in (tmp_path / "file", tmp_path / "file" / "state"):
        with pytest.raises(CheckpointError, match="could not be written"):
            store.save(taken, {"a": 1})
    assert (tmp_path / "file").read_text() == "text"
    assert sorted(os.listdir(tmp_path)) == ["file", "not"]


def test_what_a_label_says_is_in_the_manifest(tmp_path) -> None:
    label = store.Label(7, {"steps": 3, "micro_batches": 12}, ("loss", 0.25), world=2)
    store.save(tmp_path / "state", {"a": torch.ones(3)}, label)
    found = manifest.read(tmp_path / "state")
    assert (found.number, found.clocks, found.best, found.world) == (7, label.clocks, ("loss", 0.25), 2)
    assert found.version == trainer.__version__
    store.save(tmp_path / "bare", {"a": torch.ones(3)})
    bare = manifest.read(tmp_path / "bare")
    assert (bare.number, bare.clocks, bare.best, bare.world) == (0, {}, None, 1)
    assert found.size == sum(
        path.stat().st_size for path in (tmp_path / "state").iterdir() if path.name != manifest.NAME
    )


def test_the_same_state_is_told_from_another(tmp_path) -> None:
    state = {"model": {"w": torch.arange(5.0)}, "n": 1}
    store.save(tmp_path / "state", state)
    written = manifest.read(tmp_path / "state")
    assert store.is_same(snapshot(state), written)
    for other in (
        {"model": {"w": torch.arange(5.0).add_(1e-7)}, "n": 1},
        {"model": {"w": torch.arange(5.0)}, "n": 2},
        {"model": {"w": torch.arange(5.0)}, "n": 1, "rest": torch.ones(1)},
        {"n": 1},
    ):
        assert not store.is_same(snapshot(other), written)


def test_a_write_that_is_interrupted_leaves_nothing(tmp_path, monkeypatch) -> None:
    write, calls = disk.write, []

    def interrupted(path, pieces):
        calls.append(path.name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return write(path, pieces)

    monkeypatch.setattr(disk, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        store.save(tmp_path / "state", {"model": {"w": torch.ones(2)}, "a": torch.ones(1)})
    assert len(calls) == 3
    assert os.listdir(tmp_path) == []


def test_a_file_takes_the_place_of_the_old_one_when_it_is_whole(tmp_path) -> None:
    path = tmp_path / "made" / "model.safetensors"
    for value in (1.0, 2.0):
        store.replace(path, {"w": torch.full((3,), value)})
        assert load_file(path)["w"].tolist() == [value] * 3
    assert os.listdir(path.parent) == [path.name]
    path.unlink()
    path.mkdir()
    with pytest.raises(
        CheckpointError, match=r"model.safetensors could not be written .* it needs 12 bytes, \d+ are free"
    ):
        store.replace(path, {"w": torch.ones(3)})
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no umask")
@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_files_have_the_permissions_that_the_umask_leaves(tmp_path, mask) -> None:
    before = os.umask(mask)
    try:
        store.save(tmp_path / "state", {"a": torch.ones(1)})
        store.replace(tmp_path / "model", {"a": torch.ones(1)})
    finally:
        os.umask(before)
    for path in [tmp_path / "model", *(tmp_path / "state").iterdir()]:
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask
    assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o777 & ~mask


# Something else.


@pytest.mark.parametrize("kind", ["file", "nothing", "empty folder", "run"])
def test_what_is_no_checkpoint_is_told(tmp_path, kind) -> None:
    path = tmp_path / "it"
    if kind == "file":
        path.write_text("text")
    elif kind != "nothing":
        path.mkdir()
        if kind == "run":
            (path / "model.safetensors").write_text("")
    sentence = {"file": "it is a file: a checkpoint is a folder", "nothing": "it is not there: name a checkpoint that"}
    with pytest.raises(CheckpointError, match=sentence.get(kind, "it is no checkpoint: it has no manifest.json")):
        store.load(path)


def test_a_rank_reads_its_own_file_and_none_of_another_rank(tmp_path) -> None:
    own = [{"draws": torch.full((2,), float(rank))} for rank in range(3)]
    state = {"model": {"w": torch.ones(2)}, "steps": 3, "ranks": own}
    store.save(tmp_path / "it", state)
    for rank in range(3):
        left = [one if at == rank else {} for at, one in enumerate(own)]
        assert equal(store.load(tmp_path / "it", rank), state | {"ranks": left})
    damaged = tmp_path / "it" / "rank-00001.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"!")
    assert equal(store.load(tmp_path / "it", 0)["ranks"][0], own[0])
    for rank in (1, None):
        with pytest.raises(CheckpointError, match="rank-00001.safetensors"):
            store.load(tmp_path / "it", rank)


STATES = [
    "", "nonsense", "[]", "1", "null", "{}", '{"mapping": 3}', '{"mapping": [1, 2]}', '{"mapping": [["a"]]}',
    '{"mapping": [["a", {"tensor": "missing"}]]}', '{"mapping": [["a", {"tensor": ["a"]}]]}',
    '{"mapping": [[["a"], 1]]}', '{"mapping": [["a", {"float": "x"}]]}', '{"mapping": [["a", {"eval": "1"}]]}',
    '{"mapping": [["a", {"complex": "a"}]]}', '{"mapping": [["a", {"list": 1, "tuple": 2}]]}',
    '{"mapping": [["a", [1]]]}', '{"mapping": [["a", {"tuple": null}]]}', '{"mapping": [["ranks", 3]]}',
    '{"mapping": [["ranks", {"list": [{"tensor": "a"}]}]]}', '{"mapping": [["model", {"tensor": "a"}]]}',
    '{"mapping": []}', '{"mapping": [], "mapping": []}', '{"mapping": [["a", NaN]]}', '{"mapping": [["a", 1e999]]}',
    '{"mapping": [["a", {"tensor": "a"}], ["b", {"tensor": "a"}]]}', '{"mapping": [["a", ' + '{"list": [' * 20_000,
    '{"mapping": [["a", ' + '{"list": [' * 900 + "]}" * 900 + "]]}",
]  # fmt: skip


@pytest.mark.parametrize("text", STATES, ids=range(len(STATES)))
def test_a_structure_made_by_hand_is_refused_though_its_hash_is_right(tmp_path, text) -> None:
    forged(tmp_path / "made", {"state.json": text.encode(), "rest.safetensors": save({"a": torch.ones(3)})})
    with pytest.raises(CheckpointError, match="made"):
        store.load(tmp_path / "made")
