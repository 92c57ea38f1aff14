"""The sampler: a population of perturbed modules, from a mean module, a perturbation family and a generation.

Letters: ``P`` members, ``n`` rows (selected members).
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map, tree_map_only

from es_flipout.kernels import KernelChoice, Precision, check_precision, chosen
from es_flipout.layers import Conversion, convert, stays_still
from es_flipout.perturbations import Family, Fixed, Independent, Members, Perturbation
from es_flipout.policies.networks import initial_state
from es_flipout.randomness import Address
from es_flipout.strategy.row_block import row_block_for, tensors_in
from es_flipout.strategy.selection import Perturbed, Selection
from es_flipout.strategy.unperturbed import load_module_

if TYPE_CHECKING:
    from es_flipout.strategy.fused import FusedSelection, Network

_CALL_NUMBERS = 1 << 22


@dataclass(frozen=True)
class ForwardSettings:
    """How the forward of a population is computed.

    Attributes:
        row_block: number of rows per forward, fixed because a BLAS may round a row differently in a batch of another
            shape; None for :func:`es_flipout.strategy.row_block.row_block_for` on the CPU, and for all rows at once
            elsewhere.
        kernels: ``torch``, ``triton``, or ``auto`` for Triton on CUDA if supported; see
            :func:`es_flipout.kernels.chosen`.
        precision: precision of the matrix products in the Triton kernels.
    """

    row_block: int | None = None
    kernels: KernelChoice = "auto"
    precision: Precision = "ieee"

    def __post_init__(self) -> None:
        check_precision(self.precision)


DEFAULT_FORWARD = ForwardSettings()


class Population:
    """``P`` perturbed copies of one module, none of them materialized.

    Attributes:
        size: ``P`` (of this shard).
        seed, generation: together with a member's number, these determine its perturbation.
        row_block: forwards are computed in blocks of exactly this many rows (the last one padded); None for all rows at
            once. Kernels need no blocks, because they compute every row separately.
    """

    def __init__(
        self,
        module: nn.Module,
        family: Family,
        members: Members,
        sigma: float,
        address: Address,
        forward: ForwardSettings = DEFAULT_FORWARD,
        draw: bool = True,
    ) -> None:
        """Draw the noise of the members.

        Args:
            module: the mean; it is copied.
            family: the perturbation family.
            members: the members.
            sigma: standard deviation of the perturbations.
            address: seed and generation of the noise.
            forward: how forwards are computed.
            draw: whether to draw the noise now; otherwise on its first use.

        Raises:
            UserError: the module has an unsupported layer, or the requested kernels cannot be used.
        """
        self.size = members.size
        self.members = members
        self.seed, self.generation = address.seed, address.generation
        self.sigma = sigma
        self.row_block = forward.row_block
        if self.row_block is None and members.device.type == "cpu":
            self.row_block = row_block_for(module, members.size)
        # Copied, so that the population does not change when the strategy updates the mean.
        self._module = copy.deepcopy(module)
        self._forward = forward
        self._family, self._address = family, address
        if draw:
            self.draw()

    def draw(self) -> None:
        """Draw the noise now, unless it is drawn."""
        _ = self._perturbed, self._network

    @cached_property
    def _perturbed(self) -> Perturbed:
        conversion = convert(self._module)
        return Perturbed(conversion, self._draw(conversion, self._family, self._address))

    @cached_property
    def _network(self) -> Network | None:
        """Return the whole module as a chain of kernels, if it is one."""
        first = next(self._module.parameters())
        if not chosen(self._forward.kernels, self.device, first.dtype):
            return None
        from es_flipout.strategy.fused import fuse  # imports Triton, an optional dependency

        return fuse(self._module, self.perturbations)

    def _draw(self, conversion: Conversion, family: Family, at: Address) -> dict[str, Perturbation[Any]]:
        """Draw the perturbation of every parameter, by its name in the module."""
        used_by_layers = {name for own in conversion.leaves.values() for name in own.values()}
        perturbations: dict[str, Perturbation[Any]] = {}
        counts: dict[tuple[str, bool], int] = {}  # numbers of matrices and of other parameters per owner
        owners: dict[str, int] = {}
        for name, parameter in self._module.named_parameters():
            owner = name.rpartition(".")[0]
            number = owners.setdefault(owner, len(owners))
            is_matrix = parameter.ndim > 1 and name in used_by_layers
            count = counts[owner, is_matrix] = counts.get((owner, is_matrix), -1) + 1
            address = dataclasses.replace(at, layer=number | count << 16)
            mean = parameter.detach()
            if not parameter.requires_grad:
                perturbations[name] = Fixed(mean, self.sigma, self.members, address)
            elif is_matrix:
                still = stays_still(self._module, parameter)
                use_kernels = chosen(self._forward.kernels, self.device, mean.dtype)
                precision = self._forward.precision if use_kernels else None
                perturbations[name] = family.matrix(mean, self.sigma, self.members, address, still, precision)
            else:
                perturbations[name] = Independent(mean, self.sigma, self.members, address)
        return perturbations

    @property
    def perturbations(self) -> Mapping[str, Perturbation[Any]]:
        """The perturbation of every parameter, by its name in the module."""
        return self._perturbed.perturbations

    @property
    def device(self) -> torch.device:
        """Device of the weights and inputs."""
        return self.members.device

    def __len__(self) -> int:
        return self.size

    @torch.no_grad()
    def __call__(self, *inputs: Any) -> Any:
        """Compute the forward of all members: ``member(n)(input[n])`` for every ``n``.

        Args:
            inputs: the inputs of the module's forward; every tensor, including those in lists, tuples and dictionaries,
                has an additional first dimension of size ``P``. Use ``tensor.expand(P, ...)`` for inputs that all
                members share.

        Returns:
            The output of the module's forward; every tensor has an additional first dimension of size ``P``:
            ``(P, ..., in)`` to ``(P, ..., out)`` for a module of linear layers.

        Raises:
            ValueError: the first dimension of an input is not ``P``.
            UserError: the module's forward cannot be computed for all members at once.
        """
        numbers = 1
        for x in tensors_in(inputs):
            if x.ndim < 1 or x.shape[0] != self.size:
                raise ValueError(f"input must have shape (P, ..., in) with P = {self.size}, got {tuple(x.shape)}")
            numbers = max(numbers, x[0].numel())
        if self._network is not None:
            (x,) = inputs
            return self._network(x, torch.arange(self.size, device=self.device))
        # As many rows as in a rollout, but at most a few million numbers in the inputs.
        row_block = min(self.row_block or self.size, 1 << (max(_CALL_NUMBERS // numbers, 1).bit_length() - 1))
        outputs = []
        for start in range(0, self.size, row_block):
            members = torch.arange(start, min(start + row_block, self.size), device=self.device)
            part = tree_map_only(Tensor, lambda x, at=start: x[at : at + row_block], inputs)
            outputs.append(Selection(self._perturbed, members, row_block)(*part))
        return outputs[0] if len(outputs) == 1 else tree_map(lambda *parts: torch.cat(parts), *outputs)

    def select(self, members: Tensor) -> Selection | FusedSelection:
        """Return the forward of the given members, ``(n,)`` int64 in [0, P), in the given order."""
        if self._network is not None:
            from es_flipout.strategy.fused import FusedSelection

            return FusedSelection(self._network, members)
        return Selection(self._perturbed, members, self.row_block or len(members))

    def initial_state(self, rows: int) -> Tensor | None:
        """See :func:`es_flipout.policies.networks.initial_state`."""
        return initial_state(self._module, rows, self.device)

    @property
    def layout(self) -> Hashable:
        """A key that is equal for populations between which :meth:`load_` can copy."""
        tensors = [
            (name, type(perturbation), attribute, value.shape, value.dtype)
            for name, perturbation in self.perturbations.items()
            for attribute, value in perturbation.buffers().items()
        ]
        members = dataclasses.replace(self.members, first=0)  # the noise is copied, so all shards of a size are alike
        return members, self.row_block, self._forward.precision, str(self._module), tuple(tensors)

    def fixed_copy(self) -> Population:
        """Return a copy whose tensors never move in memory; :meth:`load_` overwrites them in place."""
        own = copy.deepcopy(self)
        for perturbation in own.perturbations.values():
            perturbation.keep_sigma_in_memory()
        return own

    @torch.no_grad()
    def load_(self, other: Population) -> None:
        """Copy all values of ``other``, which has the same :attr:`layout`, into this :meth:`fixed_copy`, in place."""
        load_module_(self._perturbed.conversion.twin, other._perturbed.conversion.twin)
        for name, perturbation in self.perturbations.items():
            perturbation.load_(other.perturbations[name])

    def mean_state(self) -> dict[str, Tensor]:
        """Return the state dict of the unperturbed module."""
        return self._module.state_dict()

    def member(self, n: int) -> nn.Module:
        """Return a copy of the module with the dense weights of member ``n``.

        Raises:
            IndexError: ``n`` is not in [0, P).
        """
        if not 0 <= n < self.size:
            raise IndexError(f"member must be in [0, {self.size}), got {n}")
        module = copy.deepcopy(self._module)
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                parameter.copy_(self.perturbations[name].member(n))
        return module

    def weighted_sum(self, u: Tensor) -> dict[str, Tensor]:
        """Sum ``u`` ``(P,)`` times the perturbations, in units of sigma, over the members; by parameter name.

        Raises:
            ValueError: ``u`` has the wrong shape.
        """
        if u.shape != (self.size,):
            raise ValueError(f"weights must have shape ({self.size},), got {tuple(u.shape)}")
        return {name: perturbation.weighted_sum(u) for name, perturbation in self.perturbations.items()}
