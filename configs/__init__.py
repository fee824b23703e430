"""The values of every key, as Hydra groups."""
