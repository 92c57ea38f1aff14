"""Rollouts: who plays the episodes of a generation, and where."""
