"""Windows: drawn whole, the tail included, and nothing of one that could not be."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.windows import Window, windows
from trainer.errors import ConfigError


@given(st.integers(0, 40), st.integers(1, 12))
def test_windows_hold_all_micro_batches_in_order_and_only_the_last_may_be_shorter(count, length) -> None:
    found = list(windows(range(count), length))
    assert [item for window in found for item in window] == list(range(count))
    assert all(type(window) is Window for window in found)
    assert [len(window) for window in found[:-1]] == [length] * (len(found) - 1) if found else count == 0
    assert not found or 1 <= len(found[-1]) <= length


def test_one_micro_batch_a_window_is_the_default() -> None:
    assert list(windows("abc")) == [("a",), ("b",), ("c",)]


def test_a_window_is_drawn_only_when_it_is_asked_for() -> None:
    drawn = []
    found = windows((drawn.append(index) or index for index in range(9)), 3)
    assert drawn == []
    next(found)
    assert drawn == [0, 1, 2]


@pytest.mark.parametrize("at", [0, 1, 2, 3, 5])
def test_an_error_inside_a_window_hands_out_nothing_of_it(at) -> None:
    def data():
        for index in range(9):
            if index == at:
                raise OSError("the disk is gone")
            yield index

    found: list[int] = []
    with pytest.raises(OSError, match="the disk is gone"):
        found.extend(item for window in windows(data(), 3) for item in window)
    assert found == list(range(at - at % 3))


@pytest.mark.parametrize("length", [0, -1])
def test_a_window_of_less_than_one_micro_batch_is_refused(length) -> None:
    with pytest.raises(ConfigError, match=f"accumulation_steps={length} is not possible"):
        next(windows([1], length))
