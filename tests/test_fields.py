"""A checkpoint as a flat list of fields, read without torch."""

import json
import math
import subprocess
import sys

import pytest
import torch
from runs import forged, found, trainer_of
from safetensors.torch import save

from trainer import CheckpointError
from trainer.checkpoint import fields, manifest, numbers, store
from trainer.checkpoint.fields import Numbers


def read(path) -> dict:
    return fields.fields(path, manifest.read(path))


def test_every_value_has_its_place(tmp_path) -> None:
    state = {
        "config": {"a": [1, {"b": "text"}]},
        "rng": {"torch": torch.tensor([7, 8], dtype=torch.uint8)},
        "model": {"0.weight": torch.arange(6.0).reshape(2, 3), "c": torch.tensor([1 + 2j])},
        "optimizers": [{"state": {0: {"step": torch.tensor(3.0)}}, "lr": (0.1, math.nan)}],
        "step": {"clocks": {"steps": 3}, "open": None, "skips": 0},
        "run": {"best": None},
        "ranks": [{"n": 1}, {"n": torch.ones(1)}],
    }
    store.save(tmp_path / "state", state)
    found = read(tmp_path / "state")
    assert list(found) == [
        "step/clocks/steps", "run/best", "step/open", "step/skips", "model/0.weight", "model/c",
        "optimizers/0/state/0/step", "optimizers/0/lr/0", "optimizers/0/lr/1",
        "config/a/0", "config/a/1/b", "rng/torch", "ranks/0/n", "ranks/1/n",
    ]  # fmt: skip
    weight = found["model/0.weight"]
    assert (weight.dtype, weight.shape, len(weight), weight.at(4), str(weight)) == ("F32", (2, 3), 6, 4.0, "F32 2×3")
    assert found["rng/torch"].at(1) == 8 and found["config/a/1/b"] == "text" and found["step/open"] is None
    assert found["optimizers/0/state/0/step"].at(0) == 3.0 and str(found["optimizers/0/state/0/step"]) == "F32 scalar"
    assert math.isnan(found["optimizers/0/lr/1"])
    assert found["model/c"].shape == (1, 2) and found["ranks/1/n"].at(0) == 1.0


def test_numbers_of_every_type_are_shown_as_they_are() -> None:
    for dtype, name in numbers._NAMES.items():
        tensor = torch.tensor([1, 0, 1]).to(dtype)
        one = fields.numbers(b"".join(numbers.pieces({"a": tensor})), "here")["a"]
        if name.startswith("F8"):
            assert one.at(0).startswith("0x") and one.at(0) != one.at(1)
        else:
            assert [one.at(index) for index in range(3)] == tensor.tolist()
    bf16 = fields.numbers(save({"a": torch.tensor([1.5, -3.25]).bfloat16()}), "here")["a"]
    assert [bf16.at(0), bf16.at(1)] == [1.5, -3.25]


def test_the_first_number_that_differs() -> None:
    left = torch.zeros(100_000)
    for index in (0, 1, 16_383, 16_384, 99_999):
        right = left.clone()
        right[index:] = 1e-30
        one, other = (Numbers("F32", (100_000,), memoryview(x.numpy()).cast("B")) for x in (left, right))
        assert one.first_difference(other) == index
        assert one.first_difference(one) is None


@pytest.mark.parametrize(
    "content",
    [
        b"", b"\xff" * 8, b"\x10" + bytes(7) + b"{}", (2).to_bytes(8, "little") + b"[]",
        (36).to_bytes(8, "little") + b'{"a":{"dtype":"F32","shape":[9999]}}',
        (58).to_bytes(8, "little") + b'{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,120]   }}',
    ],
)  # fmt: skip
def test_what_is_no_safetensors_file_is_refused(content, tmp_path) -> None:
    with pytest.raises(CheckpointError, match="here"):
        fields.numbers(content, "here")


@pytest.mark.parametrize("text", ["[]", '{"mapping": [["a", {"tensor": "b"}]]}', '{"mapping": [["a", {"eval": 1}]]}'])
def test_a_structure_made_by_hand_is_refused(text, tmp_path) -> None:
    forged(tmp_path / "made", {"state.json": text.encode(), "rest.safetensors": save({"a": torch.ones(1)})})
    with pytest.raises(CheckpointError, match=r"state\.json does not hold what it should"):
        read(tmp_path / "made")


def test_values_are_shown_short() -> None:
    assert [fields.shown(value) for value in (None, True, 0.1, "grün")] == ["null", "true", "0.1", '"grün"']
    assert len(fields.shown("x" * 100)) == 60


def test_it_needs_no_torch_and_agrees_with_what_torch_reads(tmp_path) -> None:
    trainer_of("adamw", folder=tmp_path, steps=3).fit()
    path = found(tmp_path)
    code = (
        "import json, sys\n"
        "from pathlib import Path\n"
        "from trainer.checkpoint import compare, fields, look, manifest\n"
        "path = Path(sys.argv[1])\n"
        "look.look(path), look.look(path.parents[1]), compare.compare(path, path)\n"
        "read = fields.fields(path, manifest.read(path))\n"
        "print(json.dumps([[n for n in ('torch', 'numpy', 'hydra', 'pydantic') if n in sys.modules],\n"
        "    {n: [v.at(i) for i in range(len(v))] for n, v in read.items() if n.startswith('model/')}]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True, timeout=60
    )
    heavy, model = json.loads(done.stdout)
    assert heavy == []
    assert model == {f"model/{name}": t.reshape(-1).tolist() for name, t in store.load(path)["model"].items()}
