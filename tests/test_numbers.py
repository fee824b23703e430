"""Tensors as the bytes of a safetensors file: the library reads what we write, and we copy nothing."""

import pytest
import torch
from safetensors.torch import load

from trainer import CheckpointError
from trainer.checkpoint import numbers


def test_the_library_reads_every_type_and_each_begins_at_a_multiple_of_its_width() -> None:
    tensors = {}
    for dtype in numbers._NAMES:
        raw = torch.arange(1, 1 + 3 * dtype.itemsize, dtype=torch.uint8)
        tensors[str(dtype)] = (raw % 2).bool()[:3] if dtype is torch.bool else raw.view(dtype)
    tensors |= {"empty": torch.empty(0, 5), "one": torch.tensor(1.5), "grün/🌱": torch.ones(2, 3)}
    content = b"".join(numbers.pieces(tensors))
    found = load(content)
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        assert torch.equal(found[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name
    length = int.from_bytes(content[:8], "little")
    assert length % 8 == 0
    for _, tensor in tensors.items():
        raw = tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        assert not raw or content.index(raw, 8 + length) >= 0


def test_no_tensor_is_copied() -> None:
    tensor = torch.zeros(1000)
    _, body = numbers.pieces({"a": tensor})
    tensor.fill_(1)
    assert bytes(body[:4]) == b"\x00\x00\x80\x3f"
    assert numbers.size_of(tensor) == 4000


def test_a_type_without_a_name_is_refused() -> None:
    numbers.check_type(torch.ones(1), lambda: "here")
    with pytest.raises(CheckpointError, match="here is complex64, which a checkpoint cannot hold"):
        numbers.check_type(torch.ones(1, dtype=torch.complex64), lambda: "here")
