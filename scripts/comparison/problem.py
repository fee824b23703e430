"""A small training task, its reference in float64, and the note of what an optimizer's steps did."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, TensorDataset

LR = 2.0**-6


@dataclass
class Problem:
    """One small training task, the same for every trainer."""

    net: Callable[[], nn.Module]
    inputs: Tensor
    targets: Tensor
    loss: Callable[[Tensor, Tensor], Tensor] = F.mse_loss
    batch_size: int = 4
    accumulation: int = 2
    epochs: int = 1
    clip: float | None = None
    factor: Callable[[int], float] | None = None
    own_loss: bool = False
    """Whether the model returns its loss itself, from `input_ids` and `labels`, as those of transformers do."""
    folder: Path | None = None
    """Where a checkpoint is written after every step."""
    resume: bool = False
    """Whether the run goes on from the last checkpoint in `folder`."""

    def built(self) -> nn.Module:
        torch.manual_seed(0)
        return self.net()

    def mean(self, net: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        if self.own_loss:
            return net(input_ids=inputs, labels=targets).loss
        return self.loss(net(inputs), targets)

    def reference_mean(self, net: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        """The same mean in float64 throughout: transformers takes its losses in float32."""
        if self.own_loss:
            logits = net(input_ids=inputs).logits[:, :-1]
            return F.cross_entropy(logits.transpose(1, 2), targets[:, 1:])
        return self.loss(net(inputs), targets)

    def loader(self) -> DataLoader:
        return DataLoader(TensorDataset(self.inputs, self.targets), batch_size=self.batch_size)

    def optimizer(self, net: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(net.parameters(), lr=LR)

    def schedule(self, optimizer: torch.optim.Optimizer) -> LambdaLR:
        return LambdaLR(optimizer, self.factor or (lambda count: 1.0))

    def windows(self) -> list[list[int]]:
        """The micro-batches of each step: within an epoch so many at a time, the last window with what is left."""
        length = math.ceil(len(self.inputs) / self.batch_size)
        every = range(length * self.epochs)
        epochs = [every[start : start + length] for start in every[::length]]
        return [
            list(epoch[at : at + self.accumulation]) for epoch in epochs for at in range(0, length, self.accumulation)
        ]

    def reference(self, parameters: dict[str, Tensor], window: list[int]) -> dict[str, Tensor]:
        """The window's gradient: its rows as one batch, float64, one backward."""
        net = self.built().double()
        net.load_state_dict(parameters, strict=False)
        length = math.ceil(len(self.inputs) / self.batch_size)
        rows = torch.arange(len(self.inputs)).split(self.batch_size)
        chosen = torch.cat([rows[micro_batch % length] for micro_batch in window])
        inputs = self.inputs[chosen]
        inputs = inputs.double() if inputs.is_floating_point() else inputs
        targets = self.targets[chosen]
        targets = targets.double() if targets.is_floating_point() else targets
        self.reference_mean(net, inputs, targets).backward()
        found = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
        if self.clip is not None:
            norm = math.sqrt(sum(float(g.square().sum()) for g in found.values()))
            found = {name: g * min(1.0, self.clip / norm) for name, g in found.items()}
        return found


@dataclass
class Taken:
    """A step of the optimizer as it happened."""

    before: dict[str, Tensor]
    lr: float
    after: dict[str, Tensor] = field(default_factory=dict)
    last: int = -1
    """The last micro-batch that went forward before it, counted from the run's first."""


class Watch:
    """Notes what the optimizer's steps do, through the hooks that torch gives to everybody."""

    def __init__(self, net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.net = net
        self.taken: list[Taken] = []
        self.forwards = 0
        self.said = ""
        net.register_forward_pre_hook(self._forward)
        optimizer.register_step_pre_hook(self._before)
        optimizer.register_step_post_hook(self._after)

    def _forward(self, net: nn.Module, inputs: Any) -> None:
        self.forwards += torch.is_grad_enabled()

    def _parameters(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.net.named_parameters()}

    def _before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self.taken.append(Taken(self._parameters(), float(optimizer.param_groups[0]["lr"])))

    def _after(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        # Some run the last forward inside optimizer.step(closure): it is counted here.
        self.taken[-1].after = self._parameters()
        self.taken[-1].last = self.forwards - 1
