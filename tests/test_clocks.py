"""Clocks: what was drawn, and what of it was taken, on the host and on a device alike."""

import json

import pytest
import torch

from trainer.gradient.clocks import DRAWN, TAKEN, Clocks


def test_drawn_and_taken_are_counted_apart() -> None:
    clocks = Clocks()
    clocks.draw(3)
    clocks.take(12, 40)
    clocks.draw(2)  # a skip
    assert clocks.as_dict() == {"micro_batches": 5, "windows": 2, "epochs": 0, "steps": 1, "rows": 12, "tokens": 40}
    assert (*DRAWN, *TAKEN) == tuple(clocks.as_dict())


def test_counts_on_a_device_are_the_counts_on_the_host() -> None:
    host, device = Clocks(), Clocks()
    snapshots = []
    for window, taken in enumerate([1, 1, 0, 1, 0]):
        for clocks in (host, device):
            clocks.draw(2)
        if taken:
            host.take(10 + window, 3)
        device.take_if(torch.tensor(float(taken)), 10 + window, 3)
        snapshots.append((device.snapshot(), host.snapshot()))
    assert device.steps == 0  # nothing was read
    assert device.most("steps") == 5
    assert device.most("windows") == 5
    assert device.taken_on("rows", torch.device("cpu")).item() == host.rows
    for lazy, plain in snapshots:
        assert lazy() == plain() == lazy()
    assert device.as_dict() == host.as_dict()
    assert device.most("steps") == 3


def test_the_state_goes_through_json_and_replaces_what_was_counted() -> None:
    clocks = Clocks()
    clocks.draw(4)
    clocks.take_if(torch.tensor(1.0), 8, 0)
    state = json.loads(json.dumps(clocks.state_dict()))
    other = Clocks()
    other.take_if(torch.tensor(1.0), 100, 100)
    other.load_state_dict(state)
    assert other.as_dict() == state
    assert other.most("rows") == 8
    with pytest.raises(KeyError):
        other.load_state_dict({"steps": 1})
