"""The certificate of two processes: the whole window is that of both, and a rank that counts otherwise is named."""

import torch
from ranks import over_ranks
from torch import Tensor, nn
from torch.nn import functional

from trainer import Step, Sum, certify
from trainer.certificate.entry import certify_step
from trainer.distributed.many import ManyProcesses
from trainer.optim import sgd


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))


def window(rank: int) -> list[tuple[Tensor, Tensor]]:
    drawn = torch.Generator().manual_seed(rank)
    sizes = ((3, 4), (5,))[rank]
    return [(torch.randn(n, 6, generator=drawn), torch.randn(n, 2, generator=drawn)) for n in sizes]


class Weighed:
    """A mean over rows that its rank may count otherwise."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Sum:
        total = functional.mse_loss(model(batch[0]), batch[1], reduction="none").mean(1).sum()
        return Sum(total * self.factor, len(batch[0]) * self.factor)


def certified(rank: int, world: int, factors: tuple[float, float] = (1.0, 1.0), seeds: tuple[int, int] = (0, 0)):
    made = certify(net(seeds[rank]), Weighed(factors[rank]), None, window(rank), ranks=ManyProcesses())
    return made.as_dict()


def test_two_ranks_with_windows_of_other_lengths_pass() -> None:
    for made in over_ranks(certified):
        assert made["passed"], made
        assert made["micro_batches"] == 3 and made["error"] < 1e-6 and made["cut_error"] < 1e-12


def without_rows(rank: int, world: int):
    made = certify(net(), Weighed(1.0), None, window(0), ranks=ManyProcesses()) if not rank else None
    if made is None:
        model = net()
        step = Step(model, Weighed(1.0), sgd(model.parameters(), lr=0.1), ranks=ManyProcesses())
        made = certify_step(step, [], {})
    return made.as_dict()


def test_a_rank_without_a_micro_batch_takes_part() -> None:
    for made in over_ranks(without_rows):
        assert made["passed"] and made["micro_batches"] == 2, made


def test_a_rank_that_counts_its_rows_otherwise_is_named_by_both() -> None:
    for made in over_ranks(certified, factors=(1.0, 3.0)):
        assert not made["passed"]
        (finding,) = made["findings"]
        assert (finding["kind"], finding["setting"], finding["module"]) == ("ranks", "distributed", "objective")
        assert finding["reason"].startswith(
            "rank 1 counts the window's micro-batches 9, 12, 15 where rank 0 counts 3, 4"
        )


def test_a_rank_with_other_parameters_is_named() -> None:
    for made in over_ranks(certified, seeds=(0, 1)):
        (finding,) = made["findings"]
        assert finding["kind"] == "ranks" and finding["reason"].startswith("the parameter '0.weight' of rank 1")
