"""Conversion of a user's ``nn.Module`` into its population-aware twin."""

from __future__ import annotations

import copy

from torch import nn

from es_flipout.errors import UserError
from es_flipout.layers.linear import PopulationLinear


class UnsupportedLayerError(UserError):
    """The module holds parameters in a layer that cannot be perturbed; the message names the layer."""


def convert(module: nn.Module) -> tuple[nn.Module, dict[str, PopulationLinear]]:
    """A copy of ``module`` without parameters whose ``nn.Linear`` leaves are population-aware.

    Args:
        module: any module whose parameters all belong to ``nn.Linear`` leaves.

    Returns:
        The copy, and its population-aware leaves by their dotted name in ``module``.

    Raises:
        UnsupportedLayerError: another leaf has parameters, two leaves share one, or a layer mixes rows.
    """
    for name, child in module.named_modules():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            raise UnsupportedLayerError(
                f"layer {name!r} of type {type(child).__name__} mixes the rows of a batch, and so the members of a "
                "population; use LayerNorm in its place"
            )
    linears = {name: child for name, child in module.named_modules() if type(child) is nn.Linear}
    owners: dict[int, str] = {}
    for name, child in module.named_modules():
        parameters = list(child.parameters(recurse=False))
        if parameters and name not in linears:
            raise UnsupportedLayerError(
                f"layer {name or '(the module itself)'!r} of type {type(child).__name__} has parameters and cannot be "
                "perturbed; supported layers with parameters: Linear"
            )
        for parameter in parameters:
            if id(parameter) in owners:
                raise UnsupportedLayerError(
                    f"layers {owners[id(parameter)]!r} and {name!r} share a parameter; tied weights are not supported"
                )
            owners[id(parameter)] = name
    leaves = {name: PopulationLinear() for name in linears}
    # Copying with the twins already in the memo leaves every weight behind.
    twin = copy.deepcopy(module, memo={id(linears[name]): leaf for name, leaf in leaves.items()})
    return twin, leaves
