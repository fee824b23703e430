"""Digests tell any difference, and the first one is named on all ranks alike."""

import pytest
import torch
from ranks import over_ranks

from trainer.distributed import ManyProcesses, OneProcess
from trainer.distributed.alike import digest, first_difference, first_unlike


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.complex64, torch.int16])
@pytest.mark.parametrize("count", [1, 3, 8, 1000, (1 << 19) + 5])
def test_a_digest_sees_one_bit_and_two_numbers_that_change_places(dtype, count) -> None:
    torch.manual_seed(0)
    tensor = (torch.randn(count) * 100).to(dtype)
    before = digest(tensor)
    assert before.shape == () and torch.equal(before, digest(tensor.clone()))
    for place in {0, count // 2, count - 1}:
        other = tensor.clone()
        bits = torch.view_as_real(other) if dtype.is_complex else other
        raw = bits.view(-1).view(torch.uint8)
        raw[place * tensor.element_size()] ^= 1
        assert not torch.equal(before, digest(other))
    if count > 1:
        swapped = tensor.clone()
        swapped[0], swapped[-1] = tensor[-1], tensor[0]
        assert torch.equal(tensor[0], tensor[-1]) or not torch.equal(before, digest(swapped))


def test_a_digest_does_not_depend_on_where_the_numbers_lie() -> None:
    base = torch.randn(41)
    part = base[1:].view(5, 8)
    assert torch.equal(digest(part), digest(part.clone()))
    assert torch.equal(digest(part.t().contiguous().t()), digest(part))
    assert not torch.equal(digest(torch.tensor([0.0])), digest(torch.tensor([-0.0])))


def differ(rank, world):
    ranks = ManyProcesses()
    tensors = {name: torch.arange(6.0) for name in ("a", "b", "c")}
    same = first_difference(ranks, tensors)
    if rank == 1:
        tensors["b"][4] += 1e-6
        tensors["c"][0] = 7
    values = {"one": 1, "two": [rank], "three": rank}
    return same, first_difference(ranks, tensors), first_unlike(ranks, {"one": 1}), first_unlike(ranks, values)


def test_the_first_difference_is_named_on_every_rank() -> None:
    left, right = over_ranks(differ)
    assert left == right == (None, ("b", [1]), None, ("two", [[0], [1]]))


def test_one_process_is_alike() -> None:
    assert first_difference(OneProcess(), {"a": torch.ones(3)}) is None
    assert first_difference(OneProcess(), {}) is None
