"""A state taken apart and copied at one instant. That any nesting comes out as it went in is tests/test_store.py."""

import json

import torch
from torch import nn

from trainer.checkpoint import nested


def test_a_snapshot_stays_as_it_is_whatever_is_trained_meanwhile() -> None:
    parameter = nn.Parameter(torch.ones(3))
    history = [1, 2]
    state = {"model": {"w": parameter, "view": parameter[1:]}, "run": {"history": history, "t": torch.zeros(())}}
    taken = nested.snapshot(state)
    before = {name: b"".join(bytes(piece) for piece in make()) for name, make in taken.files().items()}
    with torch.no_grad():
        parameter.fill_(5)
    history.append(3)
    state["run"]["t"] += 1
    assert {name: b"".join(bytes(piece) for piece in make()) for name, make in taken.files().items()} == before
    assert taken.tensors["model"]["w"].tolist() == [1, 1, 1] and not taken.tensors["model"]["w"].requires_grad


def test_what_is_on_a_device_or_shares_memory_is_a_copy_of_its_own() -> None:
    shared = torch.arange(4.0)
    taken = nested.snapshot({"model": {"a": shared, "b": shared, "c": shared[::2], "d": shared.expand(2, 4)}})
    places = {tensor.untyped_storage().data_ptr() for tensor in taken.tensors["model"].values()}
    assert len(places) == 4
    assert all(tensor.is_contiguous() for tensor in taken.tensors["model"].values())
    assert taken.size == 4 * (4 + 4 + 2 + 8)


def test_its_files_and_what_is_in_them() -> None:
    taken = nested.snapshot({"model": {"w": torch.ones(1)}, "optimizers": [], "ranks": [{"a": torch.ones(1)}], "n": 1})
    assert list(taken.files()) == ["state.json", "model.safetensors", "rank-00000.safetensors"]
    (text,) = taken.files()["state.json"]()
    assert json.loads(text) == {
        "mapping": [
            ["model", {"mapping": [["w", {"tensor": "w"}]]}],
            ["optimizers", {"list": []}],
            ["ranks", {"list": [{"mapping": [["a", {"tensor": "a"}]]}]}],
            ["n", 1],
        ]
    }
