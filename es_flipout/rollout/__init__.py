"""Rollouts: players, which play the episodes of a generation on the host or on a device."""
