"""Conversion of any module to a copy with weight noise in its supported layers."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, TypeVar, cast

from torch import Generator, nn

from es_flipout.errors import UserError
from es_flipout.nn.conv import FlipoutConv1d, FlipoutConv2d, FlipoutConv3d
from es_flipout.nn.layer import Estimator, NoisyLayer
from es_flipout.nn.linear import FlipoutLinear
from es_flipout.nn.noise import Noise
from es_flipout.nn.recurrent import FlipoutGRU, FlipoutLSTM, FlipoutRNN

TWINS: dict[type[nn.Module], type[NoisyLayer]] = {
    nn.Linear: FlipoutLinear,
    nn.Conv1d: FlipoutConv1d,
    nn.Conv2d: FlipoutConv2d,
    nn.Conv3d: FlipoutConv3d,
    nn.LSTM: FlipoutLSTM,
    nn.GRU: FlipoutGRU,
    nn.RNN: FlipoutRNN,
}

Module = TypeVar("Module", bound=nn.Module)


def flipout(
    module: Module,
    noise: Noise,
    estimator: Estimator = "flipout",
    *,
    keep: Iterable[str | type[nn.Module]] = (),
    recurrent_only: bool = False,
    generator: Generator | None = None,
) -> Module:
    """Copy ``module`` with weight noise in training mode in its Linear, Conv1d/2d/3d, LSTM, GRU and RNN layers.

    Weights, tied weights, hooks, mode and state-dict names are kept. Embeddings, and layers whose parameters are all
    vectors (norms, PReLU), stay deterministic. Any other layer with weights but without a twin is an error unless it is
    in ``keep``.

    Args:
        module: the module to convert; it is not modified.
        noise: distribution of the weights.
        estimator: flipout, shared, independent, or local_reparameterization if all layers are Linear.
        keep: names (as in ``named_modules``) or classes of layers that stay deterministic, including everything inside
            them.
        recurrent_only: in recurrent layers, only the hidden-to-hidden matrices are noisy.
        generator: random number generator of all layers; it is not copied.

    Raises:
        UserError: a layer has no twin and is not kept, a name in ``keep`` does not exist, or the estimator does not
            support a layer or the noise.
    """
    kept_names = {entry for entry in keep if isinstance(entry, str)}
    kept_types = tuple(entry for entry in keep if not isinstance(entry, str))
    if unknown := kept_names - {name for name, _ in module.named_modules(remove_duplicate=False)}:
        raise UserError(f"no layer of the module is named {', '.join(sorted(unknown))} (keep=...)")
    twins: dict[nn.Module, nn.Module] = {}  # a layer that is used twice gets one twin

    def converted(layer: nn.Module, name: str) -> nn.Module:
        if name in kept_names or isinstance(layer, kept_types):
            return layer
        if layer not in twins:
            twins[layer] = _twin(layer, name) if type(layer) in TWINS else inside(layer, name)
        return twins[layer]

    def inside(layer: nn.Module, name: str) -> nn.Module:
        own = dict(layer.named_parameters(recurse=False))
        embedding = isinstance(layer, (nn.Embedding, nn.EmbeddingBag, nn.LayerNorm, nn.RMSNorm))
        if not embedding and any(parameter.ndim > 1 for parameter in own.values()):
            raise UserError(
                f"no weight noise for {name or 'the module itself'} ({type(layer).__name__}): "
                f"to keep it deterministic, set keep=[{name or type(layer).__name__!r}]"
            )
        for child_name, child in layer.named_children():
            layer._modules[child_name] = converted(child, f"{name}.{child_name}".lstrip("."))
        return layer

    def _twin(layer: nn.Module, name: str) -> NoisyLayer:
        try:
            return as_flipout(layer, noise, estimator, generator, recurrent_only)
        except UserError as error:
            raise UserError(f"{name or 'module'}: {error}") from None

    return cast("Module", converted(copy.deepcopy(module), ""))


def as_flipout(
    layer: nn.Module, noise: Noise, estimator: Estimator, generator: Generator | None, recurrent_only: bool
) -> NoisyLayer:
    """Return the noisy twin of one layer, which shares its parameters."""
    twin: Any = TWINS[type(layer)].__new__(TWINS[type(layer)])
    twin.__dict__.update(layer.__dict__)
    twin._parameters = layer._parameters.copy()
    if isinstance(layer, nn.RNNBase):
        twin.recurrent_only = recurrent_only
    twin.add_noise(noise, estimator, generator)
    return twin
