"""The order of rows: a pure function of seed, epoch and position."""

import itertools
import random

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.order import mixed, order
from trainer.rng import seed_all


@given(st.integers(0, 1 << 62), st.integers(0, 1000), st.integers(1, 60), st.data())
@settings(max_examples=60, deadline=None)
def test_the_order_from_a_position_is_the_tail_of_the_epochs_order(seed, epoch, rows, data) -> None:
    position = data.draw(st.integers(0, rows))
    whole = order(seed, epoch, 0, rows)
    assert whole.dtype is torch.int64
    assert sorted(whole.tolist()) == list(range(rows))
    assert torch.equal(order(seed, epoch, position, rows), whole[position:])


def test_every_epoch_and_every_seed_has_an_order_of_its_own() -> None:
    found = {tuple(order(seed, epoch, 0, 50).tolist()) for seed in range(12) for epoch in range(12)}
    assert len(found) == 144


def test_without_shuffle_the_order_is_the_datas() -> None:
    for epoch, position in itertools.product((0, 3), (0, 4, 10)):
        assert order(1, epoch, position, 10, shuffle=False).tolist() == list(range(position, 10))


def test_no_global_generator_is_touched_or_looked_at() -> None:
    def draw() -> tuple[float, ...]:
        return random.random(), numpy.random.rand(), torch.rand(1).item()

    seed_all(3)
    expected = draw()
    seed_all(3)
    first = order(5, 1, 0, 20)
    assert draw() == expected
    assert torch.equal(order(5, 1, 0, 20), first)


def test_every_place_is_taken_by_every_row_about_equally_often() -> None:
    counts = torch.zeros(5, 5)
    for epoch in range(2000):
        counts[torch.arange(5), order(0, epoch, 0, 5)] += 1
    # 400 each is expected, with a standard deviation of 18.
    assert counts.min() > 310
    assert counts.max() < 490


def test_mixed_parts_neighbours_and_fits_into_63_bits() -> None:
    seeds = [mixed(a, b) for a in range(40) for b in range(40)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 1 << 63 for seed in seeds)
    assert mixed(1, 2) != mixed(2, 1)
    assert mixed(1) != mixed(1, 0)
    ones = sum(bin(mixed(0, a) ^ mixed(0, a + 1)).count("1") for a in range(200)) / 200
    assert ones == pytest.approx(31.5, abs=1.5)
    assert mixed(1 << 64) == mixed(0)
    assert mixed(-1) == mixed((1 << 64) - 1)
