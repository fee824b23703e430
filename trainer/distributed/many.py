"""Many processes: the ranks of a process group of torch's."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

from trainer.distributed.lost import lost
from trainer.distributed.ranks import Arrived
from trainer.errors import ConfigError

T = TypeVar("T")


class ManyProcesses:
    """The ranks of a process group that somebody else made and will take down.

    Every rank makes one, at the same place of its program: where the group cannot carry numbers of the CPU (nccl
    alone), a second one with gloo is made beside it.

    Args:
        group: of torch.distributed; None: the default one.

    Raises ConfigError where there is no process group.
    """

    def __init__(self, group: "dist.ProcessGroup | None" = None) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise ConfigError(
                "there is no process group: call torch.distributed.init_process_group() before, or let "
                "Trainer(..., distributed='ddp') make one under torchrun."
            )
        self.rank = dist.get_rank(group)
        self.world_size = dist.get_world_size(group)
        self._group = group
        self._host = group
        if "cpu:" not in str(dist.get_backend_config(group)):
            members = dist.get_process_group_ranks(group or dist.group.WORLD)
            self._host = dist.new_group(members, backend="gloo")

    def sum_later(self, numbers: Tensor) -> Arrived:
        """Start Σ over ranks, in place; the call of what it returns ends it. A sparse tensor must be coalesced.

        Raises TrainerError, then or now, where another rank is gone or does not answer in time.
        """
        group = self._host if numbers.device.type == "cpu" else self._group
        work = self._ask(lambda: dist.all_reduce(numbers, group=group, async_op=True))

        def arrived() -> None:
            self._ask(work.wait)

        return arrived

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in the order of ranks. Raises TrainerError as `sum_later` does."""
        found: list[Any] = [None] * self.world_size
        self._ask(lambda: dist.all_gather_object(found, value, group=self._host))
        return found

    def to_first(self, value: Any) -> list[Any]:
        """Every rank's value on the first rank, nothing on the others. Raises TrainerError as `sum_later` does."""
        found: list[Any] | None = [None] * self.world_size if self.rank == 0 else None
        self._ask(lambda: dist.gather_object(value, found, group=self._host, group_dst=0))
        return found or []

    def _ask(self, question: Callable[[], T]) -> T:
        try:
            return question()
        except RuntimeError as error:
            raise lost(error, self.rank, self.world_size) from error
