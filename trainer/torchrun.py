"""What torchrun says in the environment: this process's rank and how many there are; and torchrun itself, with the exit
codes of this package:

    python -m trainer.torchrun --nproc-per-node 2 -m trainer train recipe=digits distributed=ddp run=mine

torchrun ends with 1 whatever its ranks ended with (https://docs.pytorch.org/docs/stable/elastic/errors.html), so that a
queue cannot tell a run that was stopped, 75, from one that failed. No torch is imported until it is started so.
"""

import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from trainer.errors import ConfigError, Stopped

_STOPPED = "TRAINER_STOPPED"
"""Names the file in which a rank says to its launcher that the run was stopped and is saved."""
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


def tell_launcher(environment: Mapping[str, str] = os.environ) -> None:
    """The run was stopped, and its state is saved: `launch`, where that has started this rank, ends with 75."""
    if name := environment.get(_STOPPED):
        Path(name).touch()


def launch(words: Sequence[str]) -> int:
    """Start ranks as torchrun does with these words. Returns the exit code: 0, 75 where the run was stopped and can be
    taken up again, else that of the rank that failed first (128 and the signal's number where one ended it)."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main

    with tempfile.TemporaryDirectory() as folder:
        stopped = Path(folder) / "stopped"
        os.environ[_STOPPED] = str(stopped)
        try:
            main(list(words))
            return 0
        except (ChildFailedError, SignalException) as error:
            if stopped.exists():
                return Stopped.exit_code
            if isinstance(error, SignalException):
                return 128 + int(error.sigval)
            code = error.get_first_failure()[1].exitcode
            return code if code > 0 else 128 - code


if __name__ == "__main__":
    sys.exit(launch(sys.argv[1:]))
