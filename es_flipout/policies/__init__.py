"""Policies: networks, and the observation normalization and action maps that turn them into agents."""

from es_flipout.policies.action_map import ActionMap
from es_flipout.policies.networks import MLP, ConvNet, Linear, Recurrent

__all__ = ["MLP", "ActionMap", "ConvNet", "Linear", "Recurrent"]
