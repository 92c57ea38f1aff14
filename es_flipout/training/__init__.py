"""Training: the loop, its run directory, metrics and scores."""
