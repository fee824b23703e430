"""What scripts/compare measures: the problems, the trainers that are given them, and what is said of a run."""
