"""Checkpoints: the saved state of a run."""
