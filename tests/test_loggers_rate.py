import logged
import pytest

from trainer.loggers.rate import Rate


def test_evaluation_is_left_out_and_each_measure_begins_where_the_last_ended() -> None:
    rate = Rate(logged.clocks(100))
    assert rate.measure(logged.clocks(110), 2.0) == pytest.approx((5.0, 320.0))
    rate.pause(3.0)
    assert rate.measure(logged.clocks(120), 6.0) == pytest.approx((10.0, 640.0))
    assert rate.measure(logged.clocks(125), 7.0) == pytest.approx((5.0, 320.0))


def test_no_time_gives_no_rate_and_loses_no_steps() -> None:
    rate = Rate({})
    assert rate.measure(logged.clocks(1), 0.0) is None
    assert rate.measure(logged.clocks(2), 1.0) == pytest.approx((2.0, 128.0))
