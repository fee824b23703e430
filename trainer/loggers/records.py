"""TensorBoard's record format: length, checksum of the length, data, checksum of the data.

TensorBoard's own writer runs its checksum in Python, byte by byte: 107 µs for the 320 bytes of a step, and importing
it takes 150 ms. The same bytes come from here in under a tenth of that, as a checksum is linear: each byte adds a
number that depends on its value and on how many bytes follow it, so that one NumPy gather and one xor give all.
"""

from functools import cache, lru_cache

import numpy as np
from numpy.typing import NDArray

# CRC-32C (Castagnoli), bits reversed.
_POLYNOMIAL = 0x82F63B78
_BLOCK = 512
_ONES = 0xFFFFFFFF
_xor_all = np.bitwise_xor.reduce


def record(data: bytes) -> bytes:
    """One record that holds `data`."""
    return _head(len(data)) + data + _masked(crc32c(data)).to_bytes(4, "little")


def crc32c(data: bytes) -> int:
    """The CRC-32C of the bytes, as an unsigned number of 32 bits."""
    shares, rows = _tables()
    crc = _ONES
    for start in range(0, len(data), _BLOCK):
        size = min(_BLOCK, len(data) - start)
        block = np.frombuffer(data, np.uint8, size, start)
        crc = _over_zeros(crc, size) ^ int(_xor_all(shares.take(rows[_BLOCK - size :] + block)))
    return crc ^ _ONES


@lru_cache(maxsize=1024)
def _over_zeros(crc: int, size: int) -> int:
    """The checksum so far, after so many bytes of zero: what the bytes themselves add comes on top of it."""
    first = _tables()[0][:256].tolist()
    for _ in range(size):
        crc = first[crc & 0xFF] ^ (crc >> 8)
    return crc


@cache
def _tables() -> tuple[NDArray[np.uint32], NDArray[np.intp]]:
    """What each byte adds, at [bytes that follow it * 256 + its value], and the rows of a whole block in its order."""
    first: NDArray[np.uint32] = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        first = (first >> np.uint32(1)) ^ (first & np.uint32(1)) * np.uint32(_POLYNOMIAL)
    shares: list[NDArray[np.uint32]] = [first]
    for _ in range(_BLOCK - 1):
        shares.append(first[shares[-1] & np.uint32(0xFF)] ^ (shares[-1] >> np.uint32(8)))
    return np.concatenate(shares), np.arange(_BLOCK - 1, -1, -1, dtype=np.intp) * 256


@cache
def _head(length: int) -> bytes:
    size = length.to_bytes(8, "little")
    return size + _masked(crc32c(size)).to_bytes(4, "little")


def _masked(crc: int) -> int:
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & _ONES
