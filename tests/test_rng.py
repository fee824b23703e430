"""Generators: captured, kept in a checkpoint, put back, and rewound where a window is given up."""

import random

import numpy
import pytest
import torch

from trainer import rng
from trainer.checkpoint import store
from trainer.errors import CheckpointError


def draw() -> tuple[float, ...]:
    # The normal draws leave a second number waiting inside each generator.
    return (
        torch.rand(1).item(),
        torch.randn(3)[0].item(),
        random.random(),
        random.gauss(0, 1),
        numpy.random.rand(),
        numpy.random.standard_normal(),
    )


def test_what_is_drawn_after_a_checkpoint_is_what_was_drawn_after_it_was_saved(tmp_path) -> None:
    rng.seed_all(5)
    draw()
    store.save(tmp_path / "state", {"rng": rng.capture()})
    expected = [draw(), draw()]
    rng.seed_all(6)
    rng.restore(store.load(tmp_path / "state")["rng"])
    assert [draw(), draw()] == expected


def test_a_seed_determines_all_generators() -> None:
    rng.seed_all(1 << 40)
    first = draw()
    rng.seed_all(1 << 40)
    assert draw() == first
    rng.seed_all((1 << 40) + 1)
    assert all(a != b for a, b in zip(draw(), first, strict=True))


def test_capturing_draws_nothing() -> None:
    rng.seed_all(2)
    first = draw()
    rng.seed_all(2)
    rng.capture()
    assert draw() == first


def test_preserved_leaves_no_trace_also_after_an_error() -> None:
    rng.seed_all(3)
    draw()
    state = rng.capture()
    expected = draw()
    rng.restore(state)

    def fail() -> None:
        with rng.preserved():
            draw()
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert draw() == expected


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("torch", torch.zeros(7, dtype=torch.uint8)),
        ("python", None),
        ("python", {"version": 3, "words": torch.zeros(2), "gauss": None}),
    ],
)
def test_a_damaged_state_is_refused(part, value) -> None:
    state = rng.capture()
    with pytest.raises(CheckpointError, match="the saved state of the random generators is none"):
        rng.restore({**state, part: value})
    rng.restore(state)


def test_rewind_takes_back_what_was_drawn_since_the_mark() -> None:
    rewind = rng.Rewind()
    draw()
    rewind.mark()
    first = draw()
    rewind.back()
    assert draw() == first


@pytest.mark.parametrize("used", ["torch", "python", "numpy"])
def test_rewind_holds_only_the_generators_that_are_drawn_from(used) -> None:
    draws = {"torch": lambda: torch.rand(1).item(), "python": random.random, "numpy": numpy.random.rand}
    rewind = rng.Rewind()
    rewind.mark()
    draws[used]()
    rewind.look()
    rewind.mark()
    first = {name: one() for name, one in draws.items()}
    rewind.back()
    assert {name for name, one in draws.items() if one() == first[name]} == {used}


def test_rewind_holds_nothing_where_nothing_is_drawn_and_finds_out_when_that_changes() -> None:
    rewind = rng.Rewind()
    rewind.mark()
    rewind.look()
    rewind.mark()
    assert rewind._held == {}
    torch.rand(1)
    rewind.look()
    rewind.mark()
    assert list(rewind._held) == ["torch"]


def test_rewind_compares_ever_more_seldom() -> None:
    rewind = rng.Rewind()
    compared = []
    for call in range(1, 33):
        torch.rand(1)
        before = rewind._looked
        rewind.look()
        if rewind._looked is not before:
            compared.append(call)
    assert compared == [1, 2, 4, 8, 16, 32]


@pytest.mark.gpu
def test_the_generators_of_devices_too(tmp_path) -> None:
    torch.rand(1, device="cuda")
    store.save(tmp_path / "state", {"rng": rng.capture()})
    first = torch.rand(4, device="cuda")
    rng.restore(store.load(tmp_path / "state")["rng"])
    assert torch.equal(torch.rand(4, device="cuda"), first)
