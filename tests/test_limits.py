"""Limits: the first that is reached, the last window known before it is over, and a clock that cannot jump."""

import time

import pytest
from runs import trainer_of

from trainer import ConfigError
from trainer.gradient.clocks import Clocks
from trainer.limits import Limits
from trainer.settings import LimitSettings


def limits(clocks: Clocks, **settings) -> Limits:
    made = Limits(clocks)
    made.start(LimitSettings(**settings), trainer_of("momentum", steps=1).state)
    return made


@pytest.mark.parametrize(
    ("settings", "clocks", "at_end", "ends", "reached"),
    [
        ({"steps": 3}, {"steps": 2}, True, False, None),
        ({"steps": 3}, {"steps": 3}, False, True, "3 steps done"),
        ({"epochs": 2}, {"epochs": 1}, False, False, None),
        ({"epochs": 2}, {"epochs": 1}, True, True, None),  # its last window is over, the epoch is not counted yet
        ({"epochs": 2}, {"epochs": 0}, True, False, None),
        ({"epochs": 2}, {"epochs": 2}, True, True, "2 epochs done"),
        ({"epochs": 2, "steps": 5}, {"epochs": 1, "steps": 5}, False, True, "5 steps done"),
        ({"rows": 7}, {"rows": 8}, False, True, "7 rows done"),
    ],
)
def test_the_last_window_is_known_before_what_comes_after_it(settings, clocks, at_end, ends, reached) -> None:
    made = limits(Clocks(**clocks), **settings)
    assert made.ends(lambda: at_end) is ends
    assert made.reached() == reached


def test_whether_the_epoch_is_at_its_end_is_asked_in_the_last_one_only() -> None:
    asked = []
    clocks = Clocks()
    made = limits(clocks, epochs=3)
    for clocks.epochs in range(3):
        made.ends(lambda: bool(asked.append(clocks.epochs)))
    assert asked == [2]


def test_setting_the_machines_clock_neither_ends_a_run_nor_keeps_it_alive(monkeypatch) -> None:
    made = limits(Clocks(), time=0.2)
    for jump in (1e9, -1e9):
        monkeypatch.setattr(time, "time", lambda jump=jump: jump)
        assert made.reached() is None
    time.sleep(0.25)
    assert made.reached() == "0.2 seconds are over"
    assert made.seconds >= 0.2


def test_without_a_limit_it_would_never_end() -> None:
    with pytest.raises(ConfigError, match="no limit is set, so the run would never end"):
        limits(Clocks(), patience=3)
