import pytest
import torch
from runs import MSE, QUIET, rows
from torch import nn

from trainer import ConfigError, Trainer
from trainer.loggers.together import Together
from trainer.optim import sgd


class Looks:
    """A logger of a user's own that looks at gradients, and hears of steps."""

    def __init__(self) -> None:
        self.heard: list[str] = []
        self.gradients: list[dict[str, torch.Tensor]] = []

    def look(self, parameters, report) -> None:
        self.heard.append(f"look {report.clocks['steps']}")
        self.gradients.append({name: parameter.grad.clone() for name, parameter in parameters.items()})

    def step(self, report, seconds) -> None:
        self.heard.append(f"step {report.clocks['steps']}")


@pytest.mark.parametrize("clip_norm", [None, 0.25])
def test_a_logger_may_look_at_the_gradient_that_the_step_was_taken_with(clip_norm) -> None:
    looks = Looks()
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    data = rows(6)
    loss = nn.functional.mse_loss(model(data[0]), data[1])
    expected = dict(zip(("weight", "bias"), torch.autograd.grad(loss, tuple(model.parameters())), strict=True))
    if clip_norm is not None:
        norm = torch.cat([gradient.flatten() for gradient in expected.values()]).norm()
        assert norm > clip_norm
        expected = {name: gradient * clip_norm / norm for name, gradient in expected.items()}
    settings = {**QUIET, "batch_size": 6, "shuffle": False, "steps": 3, "log_every": 2, "clip_norm": clip_norm}
    Trainer(model, MSE, sgd(model.parameters(), lr=0.1), data=data, loggers=[looks], **settings).fit()
    assert looks.heard == ["look 1", "step 1", "look 2", "step 2", "look 3", "step 3"]
    assert set(looks.gradients[0]) == {"weight", "bias"}
    for name, gradient in looks.gradients[0].items():
        assert torch.allclose(gradient, expected[name], rtol=1e-5, atol=1e-7)


def test_a_logger_that_hears_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="the logger object listens to nothing: give it one of start, step"):
        Together([object()])
