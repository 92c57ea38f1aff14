"""Training: the loop, the run directory, metrics and scores."""
