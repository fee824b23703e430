"""The recipe digits, cut into micro-batches and checkpointed, against the same rows in one piece."""

import pytest
import torch
from trainer.recipes import digits

from trainer import Trainer, supervised
from trainer.optim import adamw, parameter_groups

CUT = {"batch_size": 16, "accumulation_steps": 4, "activation_checkpointing": "segments"}
WHOLE = {"batch_size": 64}


def trained(precision: str, one_ulp: bool = False, **cut: object) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = digits.mlp()
    if one_ulp:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.nextafter(parameter, torch.full_like(parameter, torch.inf)))
    if precision == "fp64":
        model.double()
    train, _ = digits.images()
    optimizer = adamw(parameter_groups(model, [{"match": ["biases"], "weight_decay": 0.0}]), lr=2e-3)
    settings = {"precision": precision, "seed": 0, "epochs": 3, "console": False, **cut}
    Trainer(model, supervised(torch.nn.CrossEntropyLoss()), optimizer, data=train, **settings).fit()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def test_in_float64_the_cut_does_not_matter() -> None:
    assert distance(trained("fp64", **CUT), trained("fp64", **WHOLE)) <= 1e-9


def test_in_float32_the_cut_matters_no_more_than_one_ulp_of_the_start() -> None:
    whole = trained("fp32", **WHOLE)
    by_rounding = distance(trained("fp32", one_ulp=True, **WHOLE), whole)
    assert distance(trained("fp32", **CUT), whole) <= by_rounding


def test_the_control_a_textbook_division_is_far_away() -> None:
    """1437 rows leave a tail of 29: the mean of means weighs its micro-batches of 16 and 13 rows alike."""
    textbook = trained("fp64", **CUT, reduction="micro_batches")
    assert distance(textbook, trained("fp64", **WHOLE)) > 1e-6


@pytest.mark.parametrize("clip", [{"clip_norm": 0.1}, {"clip_value": 0.01}])
def test_clipping_sees_the_whole_window(clip: dict[str, float]) -> None:
    assert distance(trained("fp64", **CUT, **clip), trained("fp64", **WHOLE, **clip)) <= 1e-9
