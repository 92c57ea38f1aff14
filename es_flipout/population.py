"""The sampler: a mean module, a perturbation family and a generation make a population of perturbed modules.

Letters: ``P`` members, ``n`` rows (chosen members), ``B`` rows of a block.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from es_flipout.errors import UserError
from es_flipout.kernels import KernelChoice, Precision, check_precision, chosen
from es_flipout.layers import Conversion, Weight, convert, stays_still
from es_flipout.perturbations import Family, Fixed, Independent, Members, Perturbation
from es_flipout.policies import initial_state
from es_flipout.randomness import Address

if TYPE_CHECKING:
    from es_flipout.fused import FusedSelection, Network

_MOST_ROWS = 1024
_FEWEST_ROWS = 128
_FEWEST_LIKE = 16  # fewer rows have kernels of their own in every BLAS
_CALL_NUMBERS = 1 << 22
_BLOCK_NUMBERS = 65536  # activations of one layer that stay in a core's cache, with what else a layer needs


def row_block_for(module: nn.Module, rows: int) -> int:
    """Rows of one forward: as many as there are, in a power of two, as long as the widest layer stays in the cache."""
    widest = max((max(p.shape) for p in module.parameters() if p.ndim > 1), default=1)
    most = min(max(_BLOCK_NUMBERS // widest, _FEWEST_ROWS), _MOST_ROWS)
    return min(1 << (most.bit_length() - 1), 1 << max(rows - 1, 0).bit_length())


def row_block_like(module: nn.Module, family: Family, obs_dim: int, rows: int, reference: int) -> int:
    """Rows of a policy's forward when there are only ``rows``: the fewest that give the bits of blocks of ``reference`` rows.

    Which bits a BLAS gives a row depends on the shapes alone, so a trial with random numbers finds out: if another order of
    rounding were at work, it would show in some of the thousands of outputs.

    Args:
        module: a policy.
        family: of its perturbations.
        obs_dim: size of an observation.
        rows: that are needed at a time.
        reference: rows of a block elsewhere.
    """
    block = min(max(1 << max(rows - 1, 0).bit_length(), _FEWEST_LIKE), reference)
    members = Members(reference + reference % 2, True, torch.device("cpu"), reference + reference % 2)
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(reference, obs_dim, generator=generator)]
    state = initial_state(module, reference, members.device)
    if state is not None:
        inputs.append(torch.randn(state.shape, generator=generator))

    def outputs(block: int) -> list[Tensor]:
        population = Population(module, family, members, 0.1, 0, 0, block)
        return _tensors((population.select(torch.arange(reference))(*inputs),))

    expected = outputs(reference)
    while block < reference:
        if all(torch.equal(a, b) for a, b in zip(outputs(block), expected, strict=True)):
            return block
        block *= 2
    return reference


class Population:
    """``P`` perturbed copies of one module, none of them materialised.

    Attributes:
        size: ``P`` (of this share).
        seed, generation: with a member's number they determine its perturbation.
        row_block: forwards are computed in blocks of exactly this many rows (the last one padded), because a BLAS may
            round a row differently when the batch has another shape; by default see :func:`row_block_for`. The kernels
            need no blocks: they compute every row by itself.

    Args:
        kernels: ``torch``, ``triton``, or ``auto``: Triton on CUDA, where it can be used; see :func:`es_flipout.kernels.chosen`.
        precision: of the products in the Triton kernels.
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
        kernels: KernelChoice = "auto",
        precision: Precision = "ieee",
    ) -> None:
        self.size = members.size
        self.members = members
        self.seed = seed
        self.generation = generation
        self.sigma = sigma
        self.row_block = row_block if row_block is not None else row_block_for(module, members.size)
        # A copy: the population stays what it was when the strategy moves the mean.
        self._module = copy.deepcopy(module)
        self._conversion = convert(self._module)
        self._kernels: KernelChoice = kernels
        self._precision: Precision = check_precision(precision)
        self._perturbations = self._perturbed(family)
        self._network = self._fused()

    def _fused(self) -> Network | None:
        """The whole module as a chain of kernels, where it is one."""
        first = next(self._module.parameters())
        if not chosen(self._kernels, self.device, first.dtype):
            return None
        from es_flipout.fused import fuse  # imports Triton, which not every machine has

        return fuse(self._module, self._perturbations)

    def _perturbed(self, family: Family) -> dict[str, Perturbation[Any]]:
        """The perturbation of every parameter, by its name in the module."""
        used_by_layers = {name for own in self._conversion.leaves.values() for name in own.values()}
        perturbations: dict[str, Perturbation[Any]] = {}
        counts: dict[tuple[str, bool], int] = {}  # of an owner's matrices and of its other parameters
        owners: dict[str, int] = {}
        for name, parameter in self._module.named_parameters():
            owner = name.rpartition(".")[0]
            number = owners.setdefault(owner, len(owners))
            is_matrix = parameter.ndim > 1 and name in used_by_layers
            count = counts[owner, is_matrix] = counts.get((owner, is_matrix), -1) + 1
            address = Address(self.seed, self.generation, number | count << 16)
            mean = parameter.detach()
            if not parameter.requires_grad:
                perturbations[name] = Fixed(mean, self.sigma, self.members, address)
            elif is_matrix:
                still = stays_still(self._module, parameter)
                use_kernels = chosen(self._kernels, self.device, mean.dtype)
                precision = self._precision if use_kernels else None
                perturbations[name] = family.matrix(mean, self.sigma, self.members, address, still, precision)
            else:
                perturbations[name] = Independent(mean, self.sigma, self.members, address)
        return perturbations

    @property
    def device(self) -> torch.device:
        """Where the weights live and inputs are expected."""
        return self.members.device

    def __len__(self) -> int:
        return self.size

    @torch.no_grad()
    def __call__(self, *inputs: Any) -> Any:
        """Forward of all members: row ``n`` of every input through member ``n``, as ``member(n)(input[n])``.

        Args:
            inputs: what the module's forward takes; every tensor, also in lists, tuples and dictionaries, has a first
                dimension of ``P`` more than the module expects. Use ``tensor.expand(P, ...)`` for what all members share.

        Returns:
            What the module's forward returns, every tensor with a first dimension of ``P``: ``(P, ..., in)`` to
            ``(P, ..., out)`` for a module of linear layers.

        Raises:
            ValueError: the leading dimension of an input is not ``P``.
            UserError: the module's forward does what cannot be computed for all members at once.
        """
        numbers = 1
        for x in _tensors(inputs):
            if x.ndim < 1 or x.shape[0] != self.size:
                raise ValueError(f"input must have shape (P, ..., in) with P = {self.size}, got {tuple(x.shape)}")
            numbers = max(numbers, x[0].numel())
        if self._network is not None:
            (x,) = inputs
            return self._network(x, torch.arange(self.size, device=self.device))
        # As many rows as a rollout has, but no more than the inputs of a few million numbers.
        row_block = min(self.row_block, 1 << (max(_CALL_NUMBERS // numbers, 1).bit_length() - 1))
        outputs = []
        for start in range(0, self.size, row_block):
            members = torch.arange(start, min(start + row_block, self.size), device=self.device)
            part = tree_map_only(Tensor, lambda x, at=start: x[at : at + row_block], inputs)
            outputs.append(Selection(self, members, row_block)(*part))
        return outputs[0] if len(outputs) == 1 else tree_map(lambda *parts: torch.cat(parts), *outputs)

    def select(self, members: Tensor) -> Selection | FusedSelection:
        """A forward for the given members, ``(n,)`` int64 in [0, P), in the given order."""
        if self._network is not None:
            from es_flipout.fused import FusedSelection

            return FusedSelection(self._network, members)
        return Selection(self, members, self.row_block)

    def initial_state(self, rows: int) -> Tensor | None:
        """See :func:`es_flipout.policies.initial_state`."""
        return initial_state(self._module, rows, self.device)

    @property
    def layout(self) -> Hashable:
        """Equal for populations that can take over each other's numbers, see :meth:`load_`."""
        tensors = [
            (name, type(perturbation), attribute, value.shape, value.dtype)
            for name, perturbation in self._perturbations.items()
            for attribute, value in vars(perturbation).items()
            if isinstance(value, Tensor) and value.ndim
        ]
        return self.members, self.row_block, self._precision, str(self._module), tuple(tensors)

    def fixed_copy(self) -> Population:
        """A copy that no computation with it ever moves in memory: :meth:`load_` gives it other numbers in place."""
        own = copy.deepcopy(self)
        for perturbation in own._perturbations.values():
            perturbation.keep_sigma_in_memory()
        return own

    @torch.no_grad()
    def load_(self, other: Population) -> None:
        """Take over all numbers of ``other``, of the same :attr:`layout`, in place; ``self`` is a :meth:`fixed_copy`."""
        _load_module(self._conversion.twin, other._conversion.twin)
        for name, perturbation in self._perturbations.items():
            perturbation.load_(other._perturbations[name])

    def mean_state(self) -> dict[str, Tensor]:
        """The unperturbed module's state dict."""
        return self._module.state_dict()

    def member(self, n: int) -> nn.Module:
        """A copy of the module with the dense weights of member ``n``.

        Raises:
            IndexError: ``n`` is not in [0, P).
        """
        if not 0 <= n < self.size:
            raise IndexError(f"member must be in [0, {self.size}), got {n}")
        module = copy.deepcopy(self._module)
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                parameter.copy_(self._perturbations[name].member(n))
        return module

    def weighted_sum(self, u: Tensor) -> dict[str, Tensor]:
        """Sum over the members of ``u`` ``(P,)`` times their perturbations in units of sigma, by parameter name.

        Raises:
            ValueError: ``u`` has another shape.
        """
        if u.shape != (self.size,):
            raise ValueError(f"weights must have shape ({self.size},), got {tuple(u.shape)}")
        return {name: perturbation.weighted_sum(u) for name, perturbation in self._perturbations.items()}


class Selection:
    """Forward of ``n`` chosen members, whose signs and biases are laid out row by row; rows can be given other members."""

    def __init__(self, population: Population, members: Tensor, row_block: int) -> None:
        self._population = population
        self._size = len(members)
        self._row_block = row_block
        self._conversion = population._conversion
        self._blocks = []
        for part in members.split(row_block):
            # Padding repeats the last member: its rows are computed and dropped.
            padded = torch.cat([part, part[-1:].expand(row_block - len(part))])
            self._blocks.append(_Block(population, padded))

    def replace(self, rows: Tensor, members: Tensor) -> None:
        """From now on row ``rows[i]`` is member ``members[i]``; both ``(k,)`` int64."""
        block_of, place = rows // self._row_block, rows % self._row_block
        for block in block_of.unique().tolist():
            chosen = block_of == block
            self._blocks[block].put(place[chosen], members[chosen])

    def replace_where(self, mask: Tensor, members: Tensor) -> None:
        """From now on row ``i`` is member ``members[i]`` where ``mask`` holds; both ``(n,)``. Shapes depend on nothing."""
        block = self._row_block
        for number, rows in enumerate(self._blocks):
            here = slice(number * block, (number + 1) * block)
            rows.put_where(_padded(mask[here], block), _padded(members[here], block))

    @torch.no_grad()
    def __call__(self, *inputs: Any) -> Any:
        """As :meth:`Population.__call__` with the chosen members: ``(n, ..., in)`` to ``(n, ..., out)``.

        Raises:
            ValueError: an input has another number of rows.
        """
        for x in _tensors(inputs):
            if len(x) != self._size:
                raise ValueError(f"input must have {self._size} rows, got {len(x)}")
        return _in_blocks(self._forward_block, inputs, self._size, self._row_block)

    def _forward_block(self, block: int, inputs: tuple[Any, ...]) -> Any:
        here, conversion = self._blocks[block], self._conversion
        if conversion.row_wise:
            for leaf, weights in here.leaves:
                leaf.place.weights = weights
            return conversion.twin(*inputs)
        return _member_by_member(conversion, here, inputs)


class _Block:
    """What the layers need of the members in the rows of one block.

    Attributes:
        leaves: every layer of the twin, with its weights.
        size: the number of rows.
    """

    def __init__(self, population: Population, members: Tensor) -> None:
        self.size = len(members)
        self._weights = {name: Weight(p, p.select(members)) for name, p in population._perturbations.items()}
        self.leaves = [
            (leaf, {own: self._weights[name] for own, name in names.items()})
            for leaf, names in population._conversion.leaves.items()
        ]

    def put(self, rows: Tensor, members: Tensor) -> None:
        """Give the rows ``(k,)`` to other members ``(k,)``."""
        for perturbation, own in self._weights.values():
            own.put(rows, perturbation.select(members))

    def put_where(self, mask: Tensor, members: Tensor) -> None:
        """Give the rows where ``mask`` holds to ``members``, both ``(n,)``."""
        for perturbation, own in self._weights.values():
            own.put_where(mask, perturbation.select(members))

    def values(self, name: str) -> Tensor:
        """A parameter of the members in the rows, ``(n, *shape)``."""
        return self._weights[name].values()


def _member_by_member(conversion: Conversion, block: _Block, inputs: tuple[Any, ...]) -> Any:
    """The forward of a module whose own code has to see one member at a time, for all members at once."""
    bare = {name: block.values(parameter) for name, parameter in conversion.bare.items()}

    def forward(bare: dict[str, Tensor], token: Tensor, inputs: tuple[Any, ...]) -> Any:
        for leaf, weights in block.leaves:
            leaf.place.weights, leaf.place.token = weights, token
        return functional_call(conversion.twin, bare, inputs)

    try:
        token = torch.empty(block.size, device="meta")
        in_dims = tree_map(lambda x: 0 if isinstance(x, Tensor) else None, inputs)
        return vmap(forward, in_dims=(0, 0, in_dims), randomness="different")(bare, token, inputs)
    except RuntimeError as error:
        if "vmap" not in str(error):
            raise
        raise UserError(
            "the forward of the module cannot be computed for all members at once (torch.func.vmap: "
            f"{' '.join(str(error).split())})"
        ) from error
    finally:
        for leaf, _ in block.leaves:
            leaf.place.token = None


class Unperturbed:
    """A population of ``size`` members that are all the same module: to score the mean policy in many episodes at once."""

    def __init__(self, module: nn.Module, size: int, row_block: int | None = None) -> None:
        self.module = module
        self.size = size
        self.row_block = row_block if row_block is not None else row_block_for(module, size)
        self.device = next(module.parameters()).device

    def initial_state(self, rows: int) -> Tensor | None:
        """See :func:`es_flipout.policies.initial_state`."""
        return initial_state(self.module, rows, self.device)

    def select(self, members: Tensor) -> Unperturbed:
        """Every row is the module."""
        return self

    def replace(self, rows: Tensor, members: Tensor) -> None:
        """Nothing changes: every row is the module."""

    def replace_where(self, mask: Tensor, members: Tensor) -> None:
        """Nothing changes: every row is the module."""

    @property
    def layout(self) -> Hashable:
        """See :attr:`Population.layout`."""
        shapes = [(name, value.shape, value.dtype) for name, value in self.module.state_dict().items()]
        return self.size, self.row_block, str(self.module), tuple(shapes)

    def fixed_copy(self) -> Unperturbed:
        """See :meth:`Population.fixed_copy`."""
        return Unperturbed(copy.deepcopy(self.module), self.size, self.row_block)

    @torch.no_grad()
    def load_(self, other: Unperturbed) -> None:
        """See :meth:`Population.load_`."""
        _load_module(self.module, other.module)

    @torch.no_grad()
    def __call__(self, *inputs: Any) -> Any:
        """``(n, ..., in)`` to ``(n, ..., out)``."""
        rows = len(_tensors(inputs)[0])
        return _in_blocks(lambda block, part: self.module(*part), inputs, rows, self.row_block)


def _in_blocks(
    forward: Callable[[int, tuple[Any, ...]], Any], inputs: tuple[Any, ...], rows: int, row_block: int
) -> Any:
    """Rows through ``forward(block, inputs)`` in blocks of exactly ``row_block``; the last is padded, and cut again."""
    if rows == row_block:
        return forward(0, inputs)
    outputs = []
    for block, start in enumerate(range(0, rows, row_block)):
        part = tree_map_only(Tensor, lambda x, at=start: _padded(x[at : at + row_block], row_block), inputs)
        kept = min(row_block, rows - start)
        outputs.append(tree_map_only(Tensor, lambda y, kept=kept: y[:kept], forward(block, part)))
    return outputs[0] if len(outputs) == 1 else tree_map(lambda *parts: torch.cat(parts), *outputs)


def _load_module(own: nn.Module, other: nn.Module) -> None:
    """Copy the parameters and buffers of a module of the same class, in place."""
    theirs = dict((*other.named_parameters(), *other.named_buffers()))
    for name, tensor in (*own.named_parameters(), *own.named_buffers()):
        tensor.copy_(theirs[name])


def _padded(x: Tensor, rows: int) -> Tensor:
    missing = rows - len(x)
    return torch.cat([x, x.new_zeros(missing, *x.shape[1:])]) if missing else x


def _tensors(inputs: tuple[Any, ...]) -> list[Tensor]:
    """All tensors among the inputs."""
    if len(inputs) == 1 and isinstance(inputs[0], Tensor):
        return [inputs[0]]
    return [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
