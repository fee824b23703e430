import subprocess
import sys

import pytest
import torch

from trainer.loggers.memory import Memory

# In a process of its own: this one may hold so much that was freed that a large tensor fits into it.
LARGE = """
import torch
from trainer.loggers.memory import Memory
memory = Memory()
before = memory.read()["process"]
held = torch.ones(128 << 20, dtype=torch.uint8)
print(memory.read()["process"] - before, *memory.read())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere only the largest so far is known")
def test_a_large_tensor_shows_while_it_is_there() -> None:
    done = subprocess.run([sys.executable, "-c", LARGE], capture_output=True, text=True, check=True)
    more, *names = done.stdout.split()
    assert 120 < float(more) < 160
    assert names == ["process"]


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
