"""The gradients in a saved state; that a run goes on from them bit for bit is tested in test_step_state.py."""

import pytest
import torch
from torch import Tensor

from trainer.errors import CheckpointError
from trainer.gradient import saved


def parameters() -> dict[str, Tensor]:
    return {name: torch.ones(2, requires_grad=True) for name in ("used", "unused")}


@pytest.mark.parametrize(
    ("zero_grad", "is_open", "kept"),
    [
        ("set_to_none", True, "copy"),
        ("zeros", True, "copy"),
        ("never", True, "copy"),
        ("set_to_none", False, "nothing"),
        ("zeros", False, "name"),
        ("never", False, "copy"),
    ],
)
def test_only_what_is_needed_is_saved(zero_grad: str, is_open: bool, kept: str) -> None:
    gradients = {"used": torch.tensor([3.0, 4.0])}
    found = saved.save(gradients, zero_grad, is_open)
    gradients["used"].zero_()
    assert found.keys() == (set() if kept == "nothing" else {"used"})
    if kept != "nothing":
        assert (found["used"] is None) if kept == "name" else (found["used"].tolist() == [3, 4])
    here = parameters()
    loaded = dict(zip(here, (gradient for _, gradient in saved.load(found, here)), strict=True))
    assert loaded["unused"] is None
    expected = {"copy": [3, 4], "name": [0, 0], "nothing": None}[kept]
    assert loaded["used"] is None if expected is None else loaded["used"].tolist() == expected


def test_what_was_set_aside_is_saved_by_name() -> None:
    here = parameters()
    aside = [(here["used"], torch.tensor([1.0, 2.0])), (here["unused"], None)]
    found = saved.save_aside(aside, here)
    aside[0][1].zero_()
    assert {name: gradient.tolist() for name, gradient in found.items()} == {"used": [1, 2]}


def test_what_does_not_fit_is_refused() -> None:
    saved.check_fit({"used": torch.ones(2), "unused": None}, parameters())
    with pytest.raises(CheckpointError, match="'usd' has no parameter here: did you mean 'used'"):
        saved.check_fit({"usd": None}, parameters())
    with pytest.raises(CheckpointError, match=r"'used' has shape \(3,\), the parameter here \(2,\)"):
        saved.check_fit({"used": torch.ones(3)}, parameters())
