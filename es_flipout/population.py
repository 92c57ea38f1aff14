"""The sampler: a mean module, a perturbation family and a generation make a population of perturbed modules.

Letters: ``P`` members, ``n`` rows (chosen members), ``B`` rows of a block.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from es_flipout.layers import convert
from es_flipout.perturbations import Family, LinearPerturbation, Members, Rows
from es_flipout.randomness import Address

_MOST_ROWS = 1024
_FEWEST_ROWS = 128
_BLOCK_NUMBERS = 65536  # activations of one layer that stay in a core's cache, with what else a layer needs


def row_block_for(module: nn.Module, rows: int) -> int:
    """Rows of one forward: as many as there are, in a power of two, as long as the widest layer stays in the cache."""
    widest = max((max(p.shape) for p in module.parameters() if p.ndim > 1), default=1)
    most = min(max(_BLOCK_NUMBERS // widest, _FEWEST_ROWS), _MOST_ROWS)
    return min(1 << (most.bit_length() - 1), 1 << max(rows - 1, 0).bit_length())


class Population:
    """``P`` perturbed copies of one module, none of them materialised.

    Attributes:
        size: ``P`` (of this share).
        seed, generation: with a member's number they determine its perturbation.
        row_block: forwards are computed in blocks of exactly this many rows (the last one padded), because a BLAS may
            round a row differently when the batch has another shape; by default see :func:`row_block_for`.
    """

    def __init__(
        self,
        module: nn.Module,
        family: Family,
        members: Members,
        sigma: float,
        seed: int,
        generation: int,
        row_block: int | None = None,
    ) -> None:
        self.size = members.size
        self.members = members
        self.seed = seed
        self.generation = generation
        self.sigma = sigma
        self.row_block = row_block if row_block is not None else row_block_for(module, members.size)
        self._module = module
        self._twin, self._leaves = convert(module)
        self._perturbations: dict[str, LinearPerturbation[Any]] = {}
        for layer, name in enumerate(self._leaves):
            linear = module.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            # Copies: the population stays what it was when the strategy moves the mean.
            weight = linear.weight.detach().clone()
            bias = None if linear.bias is None else linear.bias.detach().clone()
            address = Address(seed, generation, layer)
            self._perturbations[name] = family.linear(weight, bias, sigma, members, address)

    @property
    def device(self) -> torch.device:
        """Where the weights live and inputs are expected."""
        return self.members.device

    def __len__(self) -> int:
        return self.size

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """Forward of all members: ``(P, ..., in)`` to ``(P, ..., out)``, row ``n`` through member ``n``.

        Raises:
            ValueError: the leading dimension of ``x`` is not ``P``.
        """
        if x.ndim < 2 or x.shape[0] != self.size:
            raise ValueError(f"input must have shape (P, ..., in) with P = {self.size}, got {tuple(x.shape)}")
        outputs = []
        for start in range(0, self.size, self.row_block):
            members = torch.arange(start, min(start + self.row_block, self.size), device=self.device)
            outputs.append(self.select(members)(x[start : start + self.row_block]))
        return torch.cat(outputs)

    def select(self, members: Tensor) -> Selection:
        """A forward for the given members, ``(n,)`` int64 in [0, P), in the given order."""
        return Selection(self, members)

    def member(self, n: int) -> nn.Module:
        """A copy of the module with the dense weights of member ``n``.

        Raises:
            IndexError: ``n`` is not in [0, P).
        """
        if not 0 <= n < self.size:
            raise IndexError(f"member must be in [0, {self.size}), got {n}")
        module = copy.deepcopy(self._module)
        with torch.no_grad():
            for name, perturbation in self._perturbations.items():
                linear = module.get_submodule(name)
                assert isinstance(linear, nn.Linear)
                weight, bias = perturbation.member(n)
                linear.weight.copy_(weight)
                if bias is not None:
                    linear.bias.copy_(bias)
        return module

    def weighted_sum(self, u: Tensor) -> dict[str, Tensor]:
        """Sum over the members of ``u`` ``(P,)`` times their perturbations in units of sigma, by parameter name.

        Raises:
            ValueError: ``u`` has another shape.
        """
        if u.shape != (self.size,):
            raise ValueError(f"weights must have shape ({self.size},), got {tuple(u.shape)}")
        sums: dict[str, Tensor] = {}
        for name, perturbation in self._perturbations.items():
            prefix = f"{name}." if name else ""
            weight, bias = perturbation.weighted_sum(u)
            sums[f"{prefix}weight"] = weight
            if bias is not None:
                sums[f"{prefix}bias"] = bias
        return sums


class Selection:
    """Forward of ``n`` chosen members, whose signs and biases are laid out row by row; rows can be given other members."""

    def __init__(self, population: Population, members: Tensor) -> None:
        self._population = population
        self._size = len(members)
        self._blocks: list[dict[str, Rows]] = []
        for part in members.split(population.row_block):
            # Padding repeats the last member: its rows are computed and dropped.
            padded = torch.cat([part, part[-1:].expand(population.row_block - len(part))])
            self._blocks.append(self._lay_out(padded))

    def _lay_out(self, members: Tensor) -> dict[str, Rows]:
        return {name: p.select(members) for name, p in self._population._perturbations.items()}

    def replace(self, rows: Tensor, members: Tensor) -> None:
        """From now on row ``rows[i]`` is member ``members[i]``; both ``(k,)`` int64."""
        block_of, place = rows // self._population.row_block, rows % self._population.row_block
        for block in block_of.unique().tolist():
            chosen = block_of == block
            for name, new in self._lay_out(members[chosen]).items():
                self._blocks[block][name].put(place[chosen], new)

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """``(n, ..., in)`` to ``(n, ..., out)``.

        Raises:
            ValueError: ``x`` has another number of rows.
        """
        if len(x) != self._size:
            raise ValueError(f"input must have {self._size} rows, got {len(x)}")
        return _in_blocks(self._forward_block, x, self._population.row_block)

    def _forward_block(self, block: int, x: Tensor) -> Tensor:
        population, rows = self._population, self._blocks[block]
        for name, leaf in population._leaves.items():
            leaf.place.perturbation, leaf.place.rows = population._perturbations[name], rows[name]
        return population._twin(x)


class Unperturbed:
    """A population of ``size`` members that are all the same module: to score the mean policy in many episodes at once."""

    def __init__(self, module: nn.Module, size: int, row_block: int | None = None) -> None:
        self.module = module
        self.size = size
        self.row_block = row_block if row_block is not None else row_block_for(module, size)
        self.device = next(module.parameters()).device

    def select(self, members: Tensor) -> Unperturbed:
        """Every row is the module."""
        return self

    def replace(self, rows: Tensor, members: Tensor) -> None:
        """Nothing changes: every row is the module."""

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """``(n, ..., in)`` to ``(n, ..., out)``."""
        return _in_blocks(lambda block, part: self.module(part), x, self.row_block)


def _in_blocks(forward: Callable[[int, Tensor], Tensor], x: Tensor, row_block: int) -> Tensor:
    """Rows through ``forward(block, rows)`` in blocks of exactly ``row_block``; the last is padded, and cut again."""
    if len(x) == row_block:
        return forward(0, x)
    outputs = []
    for block, part in enumerate(x.split(row_block)):
        missing = row_block - len(part)
        if missing:
            part = torch.cat([part, part.new_zeros(missing, *part.shape[1:])])
        y = forward(block, part)
        outputs.append(y[: row_block - missing] if missing else y)
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)
