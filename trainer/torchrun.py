"""What torchrun says in the environment: this process's rank and how many there are. No torch here."""

import os
from collections.abc import Mapping

from trainer.errors import ConfigError

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def rank_here(environment: Mapping[str, str] = os.environ) -> int | None:
    """This process's rank; None where it has none."""
    rank = environment.get("RANK", "")
    return int(rank) if rank.isdigit() and "WORLD_SIZE" in environment else None


def world_here(environment: Mapping[str, str] = os.environ) -> int:
    """How many ranks there are."""
    size = environment.get("WORLD_SIZE", "")
    return int(size) if size.isdigit() and rank_here(environment) is not None else 1


def is_first(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this is the process that speaks and writes."""
    return not rank_here(environment)


def prefix(environment: Mapping[str, str] = os.environ) -> str:
    """What an error begins with: its rank, where there are several."""
    return f"rank {rank_here(environment)}: " if world_here(environment) > 1 else ""


def command(verb: str = "train", environment: Mapping[str, str] = os.environ) -> str:
    """How a verb is started on as many ranks as there are on this machine (two where that is not said)."""
    return f"torchrun --nproc-per-node {environment.get('LOCAL_WORLD_SIZE', '2')} -m trainer {verb}"


def check(distributed: str, typed: str, environment: Mapping[str, str] = os.environ) -> None:
    """Raises ConfigError where the environment and the setting do not go together; `typed` is what to type."""
    missing = [name for name in _VARIABLES if name not in environment]
    if distributed == "ddp" and missing:
        raise ConfigError(f"distributed=ddp needs torchrun to start its ranks ({missing[0]} is not set): write {typed}")
    if distributed == "none" and world_here(environment) > 1:
        raise ConfigError(
            f"there are {world_here(environment)} ranks, and with distributed=none each would train alone, all into "
            "one folder: add distributed=ddp."
        )
