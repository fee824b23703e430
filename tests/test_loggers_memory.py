import sys

import pytest
import torch

from trainer.loggers.memory import Memory


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere only the largest so far is known")
def test_a_large_tensor_shows_while_it_is_there() -> None:
    memory = Memory()
    try:
        before = memory.read()["process"]
        held = torch.ones(128 << 20, dtype=torch.uint8)  # larger than what malloc serves from memory it has already
        with_it = memory.read()["process"]
        del held
        assert 120 < with_it - before < 160
        assert list(memory.read()) == ["process"]
    finally:
        memory.close()


def test_something_is_known_of_every_system_but_windows() -> None:
    memory = Memory()
    assert sys.platform == "win32" or all(1 < amount < 1 << 20 for amount in memory.read().values())
    assert sys.platform == "win32" or memory.read()
    memory.close()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_what_torch_has_allocated_on_a_gpu() -> None:
    memory = Memory("cuda:0")
    before = memory.read()["cuda_allocated"]
    held = torch.ones(32 << 20, dtype=torch.uint8, device="cuda:0")
    found = memory.read()
    assert found["cuda_allocated"] - before == pytest.approx(32, abs=1)
    del held
    after = memory.read()
    assert after["cuda_allocated"] == before
    assert after["cuda_peak"] >= found["cuda_allocated"]
    memory.close()
