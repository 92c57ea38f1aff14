"""Conversion of a user's ``nn.Module`` into its population-aware twin."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from es_flipout.errors import UserError
from es_flipout.layers.attention import PopulationAttention
from es_flipout.layers.convolution import (
    Convolutions,
    PopulationConvolution,
    PopulationTransposedConvolution,
    TransposedConvolutions,
)
from es_flipout.layers.embedding import PopulationEmbedding
from es_flipout.layers.leaf import Leaf
from es_flipout.layers.linear import PopulationBilinear, PopulationLinear
from es_flipout.layers.recurrent import PopulationCell, PopulationRecurrent

_TWINS: dict[type[nn.Module], Callable[[Any], Leaf]] = {
    nn.Linear: lambda _: PopulationLinear(),
    nn.Bilinear: lambda _: PopulationBilinear(),
    nn.Embedding: lambda _: PopulationEmbedding(),
    **dict.fromkeys(Convolutions, PopulationConvolution),
    **dict.fromkeys(TransposedConvolutions, PopulationTransposedConvolution),
    **dict.fromkeys((nn.RNN, nn.GRU, nn.LSTM), PopulationRecurrent),
    **dict.fromkeys((nn.RNNCell, nn.GRUCell, nn.LSTMCell), PopulationCell),
    nn.MultiheadAttention: PopulationAttention,
}
# Torch layers with elementwise parameters: torch's own code runs with one copy of the parameters per member.
_ENTRY_BY_ENTRY = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.PReLU)
_SUPPORTED = (*_TWINS, *_ENTRY_BY_ENTRY)
# Twins that depend on the meaning of every dimension, and therefore see one member at a time.
_NOT_ROW_WISE = (PopulationRecurrent, PopulationAttention)
# Layers without parameters that act elementwise or row by row.
_ROW_WISE = (
    nn.Identity,
    nn.Tanh,
    nn.ReLU,
    nn.ELU,
    nn.SiLU,
    nn.GELU,
    nn.Sigmoid,
    nn.LeakyReLU,
    nn.Softplus,
    nn.Hardtanh,
    nn.Mish,
)


class UnsupportedLayerError(UserError):
    """The module has parameters in a layer that cannot be perturbed; the message names the layer."""


@dataclass(frozen=True)
class Conversion:
    """A module's population-aware twin.

    Attributes:
        twin: a copy of the module whose layers with parameters are population-aware.
        leaves: these layers; for each, a mapping from parameter names in the layer to names in the module.
        bare: parameters that the module's own code uses: a mapping from names in the twin to names in the module.
        row_wise: whether the twin may be called with all rows at once; otherwise it needs ``torch.func.vmap``.
    """

    twin: nn.Module
    leaves: dict[Leaf, dict[str, str]]
    bare: dict[str, str]
    row_wise: bool


def convert(module: nn.Module) -> Conversion:
    """Convert ``module``, which is not modified, into its population-aware twin.

    Supported layers become population-aware. All other parameters (of a normalization, or a bare ``nn.Parameter`` of
    the user's own class) are used by the module's own code, with one copy per member. Tied weights stay tied.

    Raises:
        UnsupportedLayerError: a torch layer has parameters but no twin, or mixes members, or a parameter is not of a
            floating-point type.
    """
    for name, child in module.named_modules():
        _refuse_unsupported(name, child)
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    leaves: dict[Leaf, dict[str, str]] = {}
    memo: dict[int, Any] = {}
    inside: set[int] = set()  # modules inside a layer that became a leaf
    for _, child in module.named_modules():
        if type(child) not in _TWINS or id(child) in inside or not _is_plain(child):
            continue
        leaf = _TWINS[type(child)](child)
        own = {name: names[id(parameter)] for name, parameter in child.named_parameters(remove_duplicate=False)}
        memo[id(child)] = leaf
        leaves[leaf] = own
        inside |= {id(grandchild) for grandchild in child.modules()}
    # The memo already holds the twins, so the layers that they replace are not copied.
    twin = copy.deepcopy(module, memo)
    bare = {name: names[id(module.get_parameter(name))] for name, _ in twin.named_parameters()}
    return Conversion(twin, leaves, bare, not bare and _is_row_wise(twin))


def _refuse_unsupported(name: str, layer: nn.Module) -> None:
    kind = type(layer).__name__
    where = f"layer {name or '(the module itself)'!r} of type {kind}"
    if isinstance(layer, nn.modules.batchnorm._NormBase) and not _is_harmless_norm(layer):
        raise UnsupportedLayerError(
            f"{where} keeps batch statistics, which would mix the members of a population; use GroupNorm or "
            "LayerNorm instead"
        )
    parameters = list(layer.parameters(recurse=False))
    for parameter in parameters:
        if isinstance(parameter, nn.UninitializedParameter):
            raise UnsupportedLayerError(f"{where} has no size yet; call the module once before creating a population")
        if not parameter.is_floating_point():
            raise UnsupportedLayerError(
                f"{where} has a parameter of {parameter.dtype}; only floating point is supported"
            )
    if parameters and type(layer).__module__.startswith("torch.nn.modules") and type(layer) not in _SUPPORTED:
        supported = ", ".join(kind.__name__ for kind in _SUPPORTED)
        is_projection = isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear)
        if not is_projection:
            raise UnsupportedLayerError(
                f"{where} has parameters that cannot be perturbed; supported layers with parameters: {supported}, and "
                "parameters of your own modules"
            )
    if isinstance(layer, nn.MultiheadAttention) and (layer.bias_k is not None or layer.add_zero_attn):
        raise UnsupportedLayerError(f"{where} uses add_bias_kv or add_zero_attn, which are not supported")
    if isinstance(layer, nn.Embedding) and layer.max_norm is not None:
        raise UnsupportedLayerError(f"{where} uses max_norm, which changes weights in the forward and is not supported")


def _is_harmless_norm(layer: nn.Module) -> bool:
    """Return whether a layer is an instance normalization without statistics or parameters, which is harmless."""
    return isinstance(layer, nn.modules.instancenorm._InstanceNorm) and not (layer.affine or layer.track_running_stats)


def _is_plain(layer: nn.Module) -> bool:
    """Return whether a layer has no hooks, which may observe its calls or compute its weights."""
    return not (layer._forward_hooks or layer._forward_pre_hooks)


def _is_row_wise(twin: nn.Module) -> bool:
    """Return whether calling the twin with all rows is known to be equivalent to calling it member by member."""
    if any(isinstance(child, _NOT_ROW_WISE) for child in twin.modules()):
        return False
    if isinstance(twin, (Leaf, *_ROW_WISE)) or getattr(twin, "row_wise", False):
        return True
    if isinstance(twin, nn.LayerNorm):
        return not twin.elementwise_affine
    return type(twin) is nn.Sequential and all(_is_row_wise(child) for child in twin)


def stays_still(module: nn.Module, parameter: Tensor) -> int | None:
    """Return the padding index of an embedding's weight, a row that is not perturbed; None if there is none."""
    for child in module.modules():
        if isinstance(child, nn.Embedding) and child.weight is parameter and child.padding_idx is not None:
            return child.padding_idx
    return None
