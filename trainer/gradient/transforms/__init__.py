"""Gradient transforms: what may change a window's gradient between the verdict on it and the clip of the toggles.

A transform is a callable over (named gradients, report); `trainer.gradient.transforms.chain` says what it may do.
"""

from trainer.gradient.transforms.centralise import centralise
from trainer.gradient.transforms.clips import clip_by_norm, clip_by_value
from trainer.gradient.transforms.freeze import freeze, thaw
from trainer.gradient.transforms.noise import noise

__all__ = ["centralise", "clip_by_norm", "clip_by_value", "freeze", "noise", "thaw"]
