"""What autograd raises inside a step, as a sentence, with torch's own error behind it."""

import pytest
import torch
from torch import Tensor, nn

from trainer import GradientError, Step
from trainer.gradient.explain import explain, explained
from trainer.optim import Manual


class Caching(nn.Module):
    """Keeps a table from its first forward, as models with positions do."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(2, 2)
        self.table: Tensor | None = None

    def forward(self, inputs: Tensor) -> Tensor:
        if self.table is None:
            self.table = torch.ones(2) * 2
        return self.line(inputs) * self.table


@pytest.mark.parametrize("nested", [False, True])
def test_a_cached_inference_tensor_is_named(nested: bool) -> None:
    model = nn.Sequential(nn.Linear(2, 2), Caching()) if nested else Caching()
    with torch.inference_mode():
        model(torch.ones(3, 2))
    step = Step(model, lambda m, x: m(x).mean(), Manual(model.parameters()))
    name = "'1.table'" if nested else "'table'"
    with pytest.raises(
        GradientError, match=f"^{name} keeps a tensor that was made under inference mode.*no_grad"
    ) as found:
        step([torch.ones(3, 2)])
    assert "Inference tensors cannot be saved" in str(found.value.__cause__)
    (model[1] if nested else model).table = None
    assert not step([torch.ones(3, 2)]).skipped


def test_an_inference_tensor_that_nobody_known_holds() -> None:
    with torch.inference_mode():
        hidden = [torch.ones(2)]
    model = nn.Linear(2, 2)
    step = Step(model, lambda m, x: (m(x) * hidden[0]).sum(), Manual(model.parameters()))
    with pytest.raises(GradientError, match="^something in the model or the objective keeps a tensor"):
        step([torch.ones(3, 2)])


def test_a_graph_that_was_walked_already() -> None:
    model = nn.Linear(2, 1)

    def objective(m: nn.Linear, x: Tensor) -> Tensor:
        loss = m(x).square().mean()
        loss.backward()
        return loss

    with pytest.raises(GradientError, match="the objective called backward itself, or .* leave backward to the step"):
        Step(model, objective, Manual(model.parameters()))([torch.ones(3, 2)])


def test_an_error_of_the_users_own_stays_what_it_is() -> None:
    error = RuntimeError("mine")
    assert explained(error, None) is error
    explain(error, None)
    model = nn.Linear(2, 1)
    with pytest.raises(RuntimeError, match="mat1 and mat2") as found:
        Step(model, lambda m, x: m(x).mean(), Manual(model.parameters()))([torch.ones(3, 5)])
    assert found.value.__cause__ is None


def test_an_error_in_backward_keeps_its_own_class() -> None:
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, value: Tensor) -> Tensor:
            return value.clone()

        @staticmethod
        def backward(ctx: object, gradient: Tensor) -> Tensor:
            raise LookupError("mine")

    model = nn.Linear(2, 1)
    step = Step(model, lambda m, x: Broken.apply(m(x)).mean(), Manual(model.parameters()))
    with pytest.raises(LookupError, match="mine"):
        step([torch.ones(3, 2)])
    assert step._open is None
