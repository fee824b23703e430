"""The process group of a run: taken as it is, or made of what torchrun says and taken down again."""

import atexit
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from trainer import torchrun
from trainer.distributed.lost import last_words
from trainer.distributed.many import ManyProcesses
from trainer.distributed.ranks import OneProcess, Ranks
from trainer.errors import ConfigError, LostRankError, TrainerError


def ranks_for(distributed: str, device: str, timeout: float) -> Ranks:
    """The ranks that a run has, in the default process group; where there is none, it is made.

    With gloo for what lies on the CPU, and nccl for CUDA devices where the run has them: each rank then gets the device
    of its number on its machine. A group that was made here is taken down when the process ends, if not before.

    Args:
        distributed, device, timeout: as in the settings.

    Raises ConfigError where torchrun or the device is not there, TrainerError where the other ranks do not come.
    """
    if distributed == "none":
        return OneProcess()
    if not dist.is_initialized():
        torchrun.check(distributed, f"{torchrun.command('').removesuffix(' -m trainer ')} YOUR_SCRIPT.py")
        _make(device, timeout)
        atexit.register(leave)
    return ManyProcesses()


@contextmanager
def joined(distributed: str, device: str, timeout: float) -> Iterator[Ranks]:
    """The same, taken down at the end. A rank that ends by an error tells the others why."""
    there = dist.is_available() and dist.is_initialized()
    ranks = ranks_for(distributed, device, timeout)
    try:
        yield ranks
    except Exception as error:
        if ranks.world_size > 1 and not isinstance(error, LostRankError):
            last_words(ranks.rank, f"{type(error).__name__}: {' '.join(str(error).split())[:500]}")
        raise
    finally:
        if not there:
            leave()


def leave() -> None:
    """Take down the process group, if there is one."""
    atexit.unregister(leave)
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def _make(device: str, timeout: float) -> None:
    if device == "mps":
        raise ConfigError("distributed=ddp computes on CPUs or CUDA devices: set device=cpu.")
    on_cuda = torch.cuda.is_available() and (device == "auto" or device.startswith("cuda"))
    if on_cuda:
        local, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= count:
            raise ConfigError(
                f"rank {torchrun.rank_here()} is number {local} on its machine, counted from 0, and torch sees {count} "
                "CUDA devices there: start as many ranks as there are devices, or set device=cpu."
            )
        torch.cuda.set_device(local)
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_cuda else "gloo", timeout=timedelta(seconds=timeout))
    except (RuntimeError, ValueError) as error:
        raise TrainerError(
            f"the ranks did not find one another within {timeout:g} s ({' '.join(str(error).split())[:200]}): look at "
            "what the others said."
        ) from error
