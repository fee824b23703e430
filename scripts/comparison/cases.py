"""The ten problems."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from comparison.judges import clipped, finite, frozen, named, rates, steps
from comparison.problem import Problem, Watch


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()


class Tagger(nn.Module):
    """Class scores (rows, classes, places) for each place of a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.head = nn.Linear(6, 4)
        self.double()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.embedding(inputs)).transpose(1, 2)


class FrozenNorm(nn.Module):
    """A net whose BatchNorm its author keeps in eval mode, with the statistics of other data."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.net = mlp()
        self.double()
        self.norm.running_mean.fill_(0.5)
        self.norm.running_var.fill_(3.0)
        self.norm.requires_grad_(False).eval()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(self.norm(inputs))


class Forgotten(nn.Module):
    """A net with a layer that its forward forgets to call."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()
        self.second_head = nn.Linear(5, 2).double()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(inputs)


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=19, n_positions=8, n_embd=8, n_layer=1, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    return GPT2LMHeadModel(config).double()


def ignored(targets: Tensor, lengths: list[int]) -> Tensor:
    """The targets with all but the first so many of each row left out (-100)."""
    places = torch.arange(targets.shape[1])
    return targets.where(places < torch.tensor(lengths)[:, None], -100)


def with_a_nan(inputs: Tensor, row: int) -> Tensor:
    inputs = inputs.clone()
    inputs[row, 0] = math.nan
    return inputs


def regression(rows: int, **changes: Any) -> Problem:
    return Problem(**{"net": mlp, "inputs": normal(rows, 3, seed=1), "targets": normal(rows, 2, seed=2) + 1} | changes)


def tagging(lengths: list[int], **changes: Any) -> Problem:
    drawn = torch.Generator().manual_seed(3)
    inputs = torch.randint(11, (len(lengths), 8), generator=drawn)
    targets = torch.randint(4, (len(lengths), 8), generator=drawn)
    return Problem(
        **{"net": Tagger, "inputs": inputs, "targets": ignored(targets, lengths), "loss": F.cross_entropy} | changes
    )


def language(lengths: list[int]) -> Problem:
    tokens = torch.randint(19, (len(lengths), 8), generator=torch.Generator().manual_seed(4))
    return Problem(gpt2, tokens, ignored(tokens, lengths), own_loss=True, batch_size=2)


@dataclass
class Case:
    name: str
    about: str
    problem: Callable[[], Problem]
    judge: Callable[[Problem, Watch], str] = steps
    killed_at: int | None = None
    """The forward at which the process is killed, after which a new one goes on from the last checkpoint."""


LENGTHS = [8, 8, 7, 8, 2, 1, 3, 2]
CASES = [
    Case(
        "tail",
        "5 micro-batches of 4 rows, windows of 2: an epoch's last window holds one; two epochs",
        lambda: regression(20, epochs=2),
    ),
    Case("ragged batch", "10 rows in micro-batches of 4, 4 and 2, one window", lambda: regression(10, accumulation=3)),
    Case("token weights", "cross-entropy over 31 targets in one micro-batch, 8 in the other", lambda: tagging(LENGTHS)),
    Case("own loss", "transformers' GPT2LMHeadModel, which shifts its labels itself", lambda: language([8, 8, 3, 2])),
    Case(
        "schedule",
        "lr / (1 + steps) over 4 windows of 2: the error of the learning rate",
        lambda: regression(32, factor=lambda count: 1 / (1 + count)),
        rates,
    ),
    Case(
        "NaN",
        "one NaN in one row of the second window",
        lambda: regression(32, inputs=with_a_nan(normal(32, 3, seed=1), 9)),
        finite,
    ),
    Case(
        "frozen norm",
        "a BatchNorm that was put into eval mode before training",
        lambda: regression(16, net=FrozenNorm),
        frozen,
    ),
    Case(
        "no gradient",
        "a layer that forward forgets to call: is it named?",
        lambda: regression(8, net=Forgotten),
        named,
    ),
    Case(
        "clip",
        "float32, finite gradients near 1e25 whose norm overflows, clipped to a norm of 1",
        lambda: Problem(
            lambda: mlp().float(),
            normal(8, 3, seed=1, dtype=torch.float32),
            normal(8, 2, seed=2, dtype=torch.float32),
            loss=lambda outputs, targets: F.mse_loss(outputs, targets) * 1e25,
            clip=1.0,
        ),
        clipped,
    ),
    Case(
        "resume",
        "12 micro-batches an epoch, killed at the eighth, a checkpoint at every step: how far the end is from the end "
        "of the run that was not killed, over the way that this went",
        lambda: regression(48, epochs=2),
        killed_at=7,
    ),
]
