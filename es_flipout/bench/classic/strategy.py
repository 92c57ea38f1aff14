"""The classic strategy: every member's noise is a window of one long table (Salimans et al. 2017, section 2.1).

Letters: ``P`` members, ``D`` parameters.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from torch import Tensor, nn
from typing_extensions import override

from es_flipout.bench.classic.noise_table import noise_table, table_size
from es_flipout.layers import Conversion
from es_flipout.perturbations import Dense, Members, Perturbation
from es_flipout.perturbations.independent import Independent, IndependentRows
from es_flipout.randomness import Address, Stream, integers
from es_flipout.strategy.evolution_strategy import EvolutionStrategy
from es_flipout.strategy.population import Population

_GATHERED = 1 << 22  # at most this many numbers of windows are gathered at a time


class TablePopulation(Population):
    """A population whose members' noise comes from the noise table, one window for all parameters of a member.

    It can be played like any other population, as the tests do; a classic worker computes the same members from
    :attr:`offsets` and :attr:`signs` alone.

    Attributes:
        offsets: ``(P,)`` int64, start of a member's window; antithetic partners have the same.
        signs: ``(P,)`` float32, +1 or -1.
        mean: ``(D,)`` float32, all parameters, flattened and concatenated.
    """

    @override
    def _draw(self, conversion: Conversion, family: object, at: Address) -> dict[str, Perturbation[Any]]:
        parameters = {name: p.detach() for name, p in self._module.named_parameters()}
        self.mean = flat_parameters(self._module)
        everyone = torch.arange(self.size)
        source_of = self.members.source_of(everyone)
        drawn = integers(at, Stream.WEIGHT, self.members.sources)[:, 0]
        size = table_size(len(self.mean))
        # Scale 2^31 equally likely integers to the offsets at which a window fits.
        sources = (drawn * (size - len(self.mean) + 1) >> 31).numpy()
        self.offsets = sources[source_of.numpy()]
        self.signs = self.members.sign_of(everyone).to(torch.float32).numpy()
        table = noise_table(size)
        perturbations: dict[str, Perturbation[Any]] = {}
        start = 0
        for name, mean in parameters.items():
            windows = sliding_window_view(table[start : size - len(self.mean) + start + mean.numel()], mean.numel())
            perturbations[name] = _TableWindow(mean, self.sigma, self.members, windows, sources)
            start += mean.numel()
        return perturbations


class _TableWindow(Independent):
    """A parameter whose noise is a part of each member's window; it is gathered on demand and never kept.

    Args:
        windows: ``(offsets, size)``, the parameter's part of the window at every offset.
        offsets: ``(num_sources,)``.
    """

    def __init__(
        self, mean: Tensor, sigma: float, members: Members, windows: NDArray[np.float32], offsets: NDArray[np.int64]
    ) -> None:
        Perturbation.__init__(self, mean, sigma, members, Address(0))
        self._windows = windows
        self._offsets = offsets

    def _noise_of(self, sources: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(self._windows[self._offsets[sources]]).view(-1, *self.mean.shape)

    @override
    def select(self, members: Tensor) -> IndependentRows:
        scale = self.sigma * self.members.sign_of(members).to(self.mean.dtype)
        noise = self._noise_of(self.members.source_of(members).numpy())
        return IndependentRows(torch.addcmul(self.mean, noise, scale.view(-1, *(1,) * self.mean.ndim)))

    @override
    def noise(self, member: int) -> Tensor:
        index = torch.tensor([member])
        return self._noise_of(self.members.source_of(index).numpy())[0] * self.members.sign_of(index)[0]

    @override
    def weighted_sum(self, u: Tensor) -> Tensor:
        v = self.members.fold(u).to(self.mean.dtype).numpy()
        total = np.zeros(self.mean.numel(), np.float32)
        step = max(_GATHERED // max(self.mean.numel(), 1), 1)
        for start in range(0, len(v), step):
            total += v[start : start + step] @ self._windows[self._offsets[start : start + step]]
        return torch.from_numpy(total).view_as(self.mean)


class ClassicStrategy(EvolutionStrategy):
    """An :class:`EvolutionStrategy` with noise from a table; its perturbation family is not used."""

    @override
    def ask(self, draw: bool = True) -> TablePopulation:
        """See :meth:`EvolutionStrategy.ask`."""
        members = Members(self.population_size, self.antithetic, self.device, self.population_size)
        address = Address(self.seed, self.generation)
        self._asked = population = TablePopulation(self._mean, Dense(), members, self.sigma, address, self.forward)
        return population


def flat_parameters(module: nn.Module) -> NDArray[np.float32]:
    """Return all parameters of a module, flattened and concatenated, ``(D,)`` float32."""
    return torch.cat([p.detach().flatten() for p in module.parameters()]).cpu().numpy()
