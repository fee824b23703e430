"""Tensors as the bytes of a safetensors file, without a copy of them; the reading is the library's."""

import json
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from trainer.errors import CheckpointError

# https://github.com/huggingface/safetensors#format
_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2: "F8_E5M2", torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
}  # fmt: skip


def pieces(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """The file, piece by piece: its header, then each tensor (contiguous, on the CPU) where it lies in memory."""
    # The widest first: each tensor then begins at a multiple of its own width.
    ordered = sorted(tensors.items(), key=lambda item: -item[1].element_size())
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    place = 0
    for name, tensor in ordered:
        size = size_of(tensor)
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [place, place + size],
        }
        place += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for _, tensor in ordered:
        if tensor.numel():
            yield memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def size_of(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def check_type(tensor: Tensor, where: Callable[[], str]) -> None:
    """Raises CheckpointError for a tensor that the format has no name for."""
    if tensor.dtype not in _NAMES:
        raise CheckpointError(
            f"{where()} is {str(tensor.dtype).removeprefix('torch.')}, which a checkpoint cannot hold."
        )
