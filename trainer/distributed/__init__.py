"""One process or many: sums and verdicts over ranks."""

from trainer.distributed.many import ManyProcesses
from trainer.distributed.ranks import OneProcess, Ranks

__all__ = ["ManyProcesses", "OneProcess", "Ranks"]
