"""What every test has: one thread, so that sums have one order, and tests marked gpu skipped where there is no CUDA."""

import pytest
import torch

torch.set_num_threads(1)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
