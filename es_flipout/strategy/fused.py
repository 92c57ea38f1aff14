"""Chains of linear layers, computed by the kernels; small networks in one launch.

Any other module is called layer by layer (:class:`es_flipout.strategy.selection.Selection`), and only its linear layers
use kernels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from es_flipout.kernels import Activation, MemberNoise
from es_flipout.kernels.linear import FlipoutLayer, linear
from es_flipout.kernels.mlp import fits, mlp
from es_flipout.perturbations import Fixed, Independent, Perturbation
from es_flipout.perturbations.flipout import FlipoutPerturbation
from es_flipout.policies.networks import MLP, Linear, activation_name


class Network:
    """The layers of all members."""

    def __init__(self, layers: list[FlipoutLayer], weight: FlipoutPerturbation) -> None:
        self.layers = layers
        self.in_one_kernel = fits(layers)
        self._weight = weight  # any of them: members, sigma and precision are the same for all

    @torch.no_grad()
    def __call__(self, x: Tensor, members: Tensor) -> Tensor:
        """Apply member ``members[i]`` to row ``i`` of ``x``: ``(n, ..., in)`` to ``(n, ..., out)``."""
        flat = x.reshape(-1, x.shape[-1])
        weight = self._weight
        noise = MemberNoise(members, weight.members.per_source, weight.sigma, weight.precision)
        if self.in_one_kernel:
            flat = mlp(flat, self.layers, noise)
        else:
            for layer in self.layers:
                flat = linear(flat, layer, noise)
        return flat.view(*x.shape[:-1], -1)


class FusedSelection:
    """Like :class:`es_flipout.strategy.selection.Selection`, for a :class:`Network`; never waits for the device."""

    def __init__(self, network: Network, members: Tensor) -> None:
        self._network = network
        self._members = members.clone()

    def replace(self, rows: Tensor, members: Tensor) -> None:
        """Assign member ``members[i]`` to row ``rows[i]``; both ``(k,)`` int64."""
        self._members[rows] = members

    def replace_where(self, mask: Tensor, members: Tensor) -> None:
        """Assign member ``members[i]`` to row ``i`` where ``mask`` is true; both ``(n,)``."""
        self._members.copy_(torch.where(mask, members, self._members))

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Map one input ``(n, ..., in)`` to ``(n, ..., out)``.

        Raises:
            ValueError: the input has the wrong number of rows.
        """
        (x,) = inputs
        if len(x) != len(self._members):
            raise ValueError(f"input must have {len(self._members)} rows, got {len(x)}")
        return self._network(x, self._members)


def fuse(module: nn.Module, perturbations: Mapping[str, Perturbation[Any]]) -> Network | None:
    """Return the network of a module that is a chain of flipout layers whose perturbations use kernels, otherwise None.

    Args:
        module: the mean.
        perturbations: the perturbation of every parameter, by its name in the module.
    """
    chain = _chain(module)
    if not chain or any(part._forward_hooks or part._forward_pre_hooks for part in module.modules()):
        return None
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    layers: list[FlipoutLayer] = []
    first: FlipoutPerturbation | None = None
    for linear_layer, activation in chain:
        weight = perturbations[names[id(linear_layer.weight)]]
        if not isinstance(weight, FlipoutPerturbation) or weight.layer is None:
            return None
        mean, noise = None, None
        if linear_layer.bias is not None:
            bias = perturbations[names[id(linear_layer.bias)]]
            if not isinstance(bias, Fixed | Independent) or bias.mean.dtype != torch.float32:
                return None
            mean, noise = bias.mean, bias.stored if isinstance(bias, Independent) else None
        layers.append(dataclasses.replace(weight.layer, bias=mean, bias_noise=noise, activation=activation))
        first = first or weight
    assert first is not None
    return Network(layers, first)


def _chain(module: nn.Module) -> list[tuple[nn.Linear, Activation]] | None:
    """Return linear layers, each with the activation of its output; None if the module is not such a chain."""
    if type(module) is Linear:
        return [(module.layer, "none")]
    if type(module) is MLP:
        *hidden, last = [layer for layer in module.layers if isinstance(layer, nn.Linear)]
        return [*((layer, activation_name(module.activation)) for layer in hidden), (last, "none")]
    parts = list(module) if type(module) is nn.Sequential else [module]
    chain: list[tuple[nn.Linear, Activation]] = []
    for part in parts:
        activation = _activation(part)
        if type(part) is nn.Linear:
            chain.append((part, "none"))
        elif activation is not None and chain and chain[-1][1] == "none":
            chain[-1] = (chain[-1][0], activation)
        else:
            return None
    return chain


def _activation(layer: nn.Module) -> Activation | None:
    if (isinstance(layer, nn.ELU) and layer.alpha != 1.0) or (
        isinstance(layer, nn.GELU) and layer.approximate != "none"
    ):
        return None
    names: dict[type[nn.Module], Activation] = {
        nn.Tanh: "tanh", nn.ReLU: "relu", nn.ELU: "elu", nn.SiLU: "silu", nn.GELU: "gelu",
    }  # fmt: skip
    return names.get(type(layer))
