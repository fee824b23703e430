"""Sums and verdicts over ranks."""

from trainer.distributed.ranks import OneProcess, Ranks

__all__ = ["OneProcess", "Ranks"]
