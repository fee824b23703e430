"""What forward keeps for backward."""

from trainer.activations.segments import Segments, segments_for

__all__ = ["Segments", "segments_for"]
