"""From the words of the command line to a Trainer: composed by Hydra, checked, and built through one door."""
