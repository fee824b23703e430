"""Schedules: exact values at every corner, the same on a tensor, and sentences for what is not possible."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.errors import ConfigError
from trainer.optim import Schedule, constant, cosine, linear, wsd


def values(schedule: Schedule, *counts: int) -> list[float]:
    return [float(schedule(count)) for count in counts]


def test_constant() -> None:
    assert values(constant(), 0, 1, 1000) == [1.0, 1.0, 1.0]
    assert values(constant(warmup=4), 0, 1, 2, 3, 4, 5, 99) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0]
    assert values(constant(warmup=1), 0, 1) == [1.0, 1.0]


def test_linear() -> None:
    assert values(linear(total=4), 0, 1, 2, 3, 4, 5, 400) == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0, 0.0]
    assert values(linear(total=4, end=0.5), 0, 2, 4, 9) == [1.0, 0.75, 0.5, 0.5]
    assert values(linear(total=10, warmup=2), 0, 1, 2, 6, 10, 11) == [0.5, 1.0, 1.0, 0.5, 0.0, 0.0]
    assert values(linear(total=4, end=2.0), 0, 2, 4) == [1.0, 1.5, 2.0]


def test_cosine() -> None:
    assert values(cosine(total=8), 0, 4, 8, 9) == pytest.approx([1.0, 0.5, 0.0, 0.0], abs=1e-15)
    assert values(cosine(total=8), 2) == pytest.approx([0.5 + math.sqrt(0.5) / 2], abs=1e-15)
    assert values(cosine(total=8, end=0.1), 0, 4, 8, 80) == pytest.approx([1.0, 0.55, 0.1, 0.1], abs=1e-15)
    assert values(cosine(total=12, warmup=4), 0, 3, 4, 8, 12, 13) == pytest.approx(
        [0.25, 1.0, 1.0, 0.5, 0.0, 0.0], abs=1e-15
    )


def test_wsd() -> None:
    schedule = wsd(total=10, warmup=2, decay=4)
    assert values(schedule, 0, 1, 2, 5, 6, 7, 8, 9, 10, 11) == [0.5, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    assert values(wsd(total=10, decay=2, end=0.5), 0, 8, 9, 10, 50) == [1.0, 1.0, 0.75, 0.5, 0.5]
    assert values(wsd(total=10), 0, 9, 10) == [1.0, 1.0, 0.0]
    assert values(wsd(total=10, end=0.25), 9, 10, 11) == [1.0, 0.25, 0.25]


def test_warm_up_as_long_as_the_whole() -> None:
    for make in (linear, cosine, wsd):
        assert values(make(total=4, warmup=4), 0, 3, 4, 5) == [0.25, 1.0, 0.0, 0.0]


def test_every_step_of_a_run_has_a_rate() -> None:
    """Of `total` steps none is taken at rate zero: the first sees 1 / warmup, the last one tick before the end."""
    for make in (linear, cosine, wsd):
        schedule = make(total=50, warmup=5) if make is not wsd else wsd(total=50, warmup=5, decay=10)
        assert all(float(schedule(count)) > 0 for count in range(50))


def by_name(kind: str, total: int, warmup: int, decay: int, end: float) -> Schedule:
    if kind == "constant":
        return constant(warmup)
    if kind == "wsd":
        return wsd(total, warmup, decay, end)
    return (linear if kind == "linear" else cosine)(total, warmup, end)


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(["constant", "linear", "cosine", "wsd"]),
    total=st.integers(1, 10_000_000),
    shares=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    end=st.floats(0, 2),
    count=st.integers(0, 20_000_000),
)
def test_a_tensor_gives_what_a_float_gives(
    kind: str, total: int, shares: tuple[float, float], end: float, count: int
) -> None:
    warmup = int(total * shares[0])
    decay = int((total - warmup) * shares[1])
    schedule = by_name(kind, total, warmup, decay, end)
    for at in {0, warmup - 1, warmup, total - decay, total - 1, total, count % total, count}:
        if at < 0:
            continue
        on_device = torch.tensor(at, dtype=torch.float64)
        answer = schedule(on_device)
        assert isinstance(answer, float) or (answer.dtype == torch.float64 and answer.shape == ())
        factor = schedule(at)
        assert abs(float(answer) - float(factor)) <= 1e-12
        assert 0 <= float(factor) <= max(1.0, end) + 1e-12
        assert schedule(at) == factor
        assert on_device.item() == at


@settings(max_examples=60, deadline=None)
@given(total=st.integers(2, 2000), warmup=st.integers(0, 100), kind=st.sampled_from(["linear", "cosine", "wsd"]))
def test_it_rises_to_one_and_then_falls(total: int, warmup: int, kind: str) -> None:
    warmup = min(warmup, total)
    schedule = by_name(kind, total, warmup, (total - warmup) // 2, 0.1)
    rising = [float(schedule(count)) for count in range(warmup)]
    falling = [float(schedule(count)) for count in range(warmup, total + 2)]
    assert rising == sorted(rising)
    assert falling == sorted(falling, reverse=True)
    assert not rising or rising[-1] == 1.0
    assert falling[-1] == pytest.approx(0.1)


def test_it_holds_no_state_and_cannot_be_changed() -> None:
    schedule = cosine(total=100, warmup=10)
    there = [schedule(count) for count in range(120)]
    assert [schedule(count) for count in reversed(range(120))] == there[::-1]
    with pytest.raises(AttributeError):
        schedule.clock = "rows"  # type: ignore[misc]


def test_it_says_what_it_does() -> None:
    assert repr(constant(warmup=3)) == "constant, warm-up 3 over steps"
    assert repr(linear(total=9, end=0.1)) == "linear to 0.1 at 9, warm-up 0 over steps"
    assert repr(cosine(total=9, warmup=2, clock="rows")) == "cosine to 0 at 9, warm-up 2 over rows"
    assert repr(wsd(total=9, decay=4, clock="tokens")) == "stable, then to 0 in the last 4 of 9, warm-up 0 over tokens"


@pytest.mark.parametrize("clock", ["steps", "rows", "tokens"])
def test_clocks(clock: str) -> None:
    assert constant(clock=clock).clock == linear(9, clock=clock).clock == wsd(9, clock=clock).clock == clock


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: constant(warmup=-1), r"schedule\.warmup=-1 is not possible: it must be zero or more\."),
        (lambda: linear(total=10, warmup=-2), r"schedule\.warmup=-2 is not possible"),
        (lambda: wsd(total=10, warmup=-2, decay=3), r"schedule\.warmup=-2 is not possible"),
        (lambda: wsd(total=10, warmup=2, decay=-3), r"schedule\.decay=-3 is not possible: it must be zero or more\."),
        (lambda: wsd(total=10, warmup=0, decay=-3), r"schedule\.decay=-3 is not possible: it must be zero or more\."),
        (lambda: linear(), r"schedule\.total is not given, .*set schedule\.total, or limits\.steps\."),
        (lambda: cosine(warmup=4), r"schedule\.total is not given"),
        (lambda: wsd(decay=4), r"schedule\.total is not given"),
        (lambda: linear(total=0), r"total=0 is not possible: it must be 1 or more\."),
        (lambda: cosine(total=-5), r"total=-5 is not possible"),
        (lambda: cosine(total=4, warmup=5), r"take 5 of 4 ticks: total must be as long as they are\."),
        (lambda: wsd(total=4, warmup=3, decay=2), r"take 5 of 4 ticks"),
        (lambda: linear(total=4, end=-0.1), r"schedule\.end=-0\.1 is not possible"),
        (lambda: cosine(total=4, end=float("nan")), r"schedule\.end=nan is not possible"),
        (lambda: wsd(total=4, end=float("inf")), r"schedule\.end=inf is not possible"),
        (lambda: constant(clock="epochs"), r"schedule\.clock='epochs' is not possible: .*steps, rows, tokens\."),
        (lambda: linear(total=4, clock="windows"), r"schedule\.clock='windows'"),
        (lambda: linear(total=4, warmup=0.5), r"schedule\.warmup=0\.5 is not possible: it must be a whole number\."),
        (lambda: constant(warmup="3"), r"schedule\.warmup='3' is not possible: it must be a whole number\."),
        (lambda: cosine(total="10"), r"schedule\.total='10' is not possible: it must be a whole number\."),
    ],
)
def test_what_is_not_possible(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make()
