"""Optimizers, parameter groups and schedules, and how a finished gradient reaches the parameters."""

from trainer.optim.builders import adamw, sgd
from trainer.optim.groups import parameter_groups
from trainer.optim.manual import Manual
from trainer.optim.schedules import Schedule, constant, cosine, linear, wsd

__all__ = ["Manual", "Schedule", "adamw", "constant", "cosine", "linear", "parameter_groups", "sgd", "wsd"]
