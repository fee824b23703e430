"""What happens every so often, looked at after each window without a device read."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.due import Due
from trainer.gradient.clocks import Clocks


def marks(due: Due, clocks: Clocks, windows: int, rows: int = 10) -> list[int]:
    due.start(clocks)
    found = []
    for _ in range(windows):
        clocks.draw(1)
        clocks.take(rows, 0)
        if due(clocks):
            found.append(clocks.windows)
    return found


def test_it_is_true_at_every_multiple_and_at_no_other_time() -> None:
    assert marks(Due(3, "steps"), Clocks(), 10) == [3, 6, 9]
    assert marks(Due(1, "windows"), Clocks(), 3) == [1, 2, 3]


def test_at_once_counts_the_very_first_tick_and_keeps_the_multiples() -> None:
    assert marks(Due(3, "steps", at_once=True), Clocks(), 10) == [1, 3, 6, 9]
    assert marks(Due(3, "steps", at_once=True), Clocks(steps=4, windows=4), 10) == [6, 9, 12]


def test_a_clock_in_strides_is_true_once_for_every_stride_that_passes_a_multiple() -> None:
    assert marks(Due(25, "rows"), Clocks(), 10) == [3, 5, 8, 10]
    assert marks(Due(7, "rows"), Clocks(), 4) == [1, 2, 3, 4]


@given(st.integers(1, 9), st.integers(0, 30), st.integers(1, 30))
def test_a_run_that_goes_on_has_the_marks_of_one_that_never_stopped(every, stop, more) -> None:
    whole = marks(Due(every, "rows"), Clocks(), stop + more, rows=4)
    clocks = Clocks()
    assert marks(Due(every, "rows"), clocks, stop, rows=4) + marks(Due(every, "rows"), clocks, more, rows=4) == whole


def test_never_is_none() -> None:
    assert marks(Due(None, "steps"), Clocks(), 5) == []
    due = Due(2, "steps")
    assert not due(Clocks(steps=8)), "not started"


def test_a_skipped_window_is_no_step() -> None:
    clocks, due = Clocks(), Due(2, "steps")
    due.start(clocks)
    for taken in (True, False, False, True):
        clocks.draw(1)
        if taken:
            clocks.take(1, 0)
        assert due(clocks) is (clocks.windows == 4)


def test_nothing_is_read_before_the_clock_can_have_come_to_the_mark() -> None:
    class Counted(Clocks):
        reads = 0

        def read(self):
            Counted.reads += 1
            return super().read()

    clocks, due = Counted(), Due(3, "steps")
    due.start(clocks)
    Counted.reads = 0
    # Verdicts stay on a device: here a tensor of the CPU stands for one.
    for verdict, reads, true in ((1.0, 0, False), (0.0, 0, False), (1.0, 1, False), (1.0, 2, True)):
        clocks.draw(1)
        clocks.take_if(torch.tensor(verdict), 4, 0)
        assert due(clocks) is true
        assert Counted.reads == reads
    assert (clocks.steps, clocks.rows) == (3, 12)


def test_it_is_near_before_every_window_that_is_due_and_for_steps_before_no_other() -> None:
    for clock, at_most in (("steps", 5), ("windows", 5), ("rows", 12), ("epochs", 4)):
        due, clocks = Due(25 if clock == "rows" else 3, clock, at_once=True), Clocks()
        due.start(clocks)
        near = 0
        for window in range(12):
            was_near = due.is_near(clocks)
            near += was_near
            clocks.draw(1)
            clocks.take(10, 0)
            is_due = due(clocks)
            assert was_near or not is_due
            clocks.epochs = window + 1
        assert near <= at_most, clock
    assert not Due(None, "rows").is_near(Clocks())
