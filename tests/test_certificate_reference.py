"""The reference: by itself, and equal to the row by row sum that the tests have of their own."""

import ast
from pathlib import Path

import pytest
import torch
from reference import cut, farthest, mlp, rows, squared_error, window_gradient
from torch.nn import functional

from trainer import Cotangents, Sum
from trainer.certificate import batches, reference
from trainer.certificate.reference import Asked


def test_it_imports_nothing_of_the_step_and_of_the_room_of_gradients() -> None:
    for module in (reference, batches):
        for node in ast.walk(ast.parse(Path(module.__file__).read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
            for name in names:
                ours = name.startswith("trainer.") and not name.startswith("trainer.certificate")
                assert not ours, f"{module.__name__} imports {name}"


def mean(model, batch):
    return squared_error(model, *batch)


def total(model, batch):
    return Sum(mean(model, batch) * len(batch[0]), len(batch[0]))


def two_terms(model, batch):
    return {"half": mean(model, batch), "other": total(model, batch)}


def outputs(model, batch):
    made = (model(batch[0]) - batch[1]).square().mean(1)
    return Cotangents(made, torch.ones_like(made), len(made))


@pytest.mark.parametrize("reduction", ["mean", "sum", "micro_batches"])
@pytest.mark.parametrize("objective", [mean, total, two_terms, outputs])
def test_every_answer_under_every_reduction_is_the_sum_over_rows(objective, reduction) -> None:
    model, window = mlp(), cut(rows(9), (4, 3, 2))
    asked = Asked(reduction, {"half": 0.25, "other": 0.75})
    found = reference.gradient(model, objective, window, dict(model.named_parameters()), asked)
    assert farthest(found.gradient, window_gradient(model, window, reduction)) < 1e-12


def test_the_objectives_own_weight_is_taken_and_what_weighs_nothing_is_left_out() -> None:
    class Some:
        def __call__(self, model, batch):
            kept = batch[1][:, 0] > 1
            return functional.mse_loss(model(batch[0])[kept], batch[1][kept])

        def weight(self, batch):
            return int((batch[1][:, 0] > 1).sum())

    model, (inputs, targets) = mlp(), rows(9)
    targets[4:7] = 0.0
    parts = cut((inputs, targets), (4, 3, 2))
    named = dict(model.named_parameters())
    found = reference.gradient(model, Some(), parts, named, Asked(), keep_parts=True)
    whole = reference.gradient(model, Some(), [(inputs, targets)], named, Asked())
    assert found.weights[1] == {"loss": 0.0} and not found.parts[1].get("0.weight", torch.zeros(1)).any()
    assert farthest(found.gradient, whole.gradient) < 1e-12
