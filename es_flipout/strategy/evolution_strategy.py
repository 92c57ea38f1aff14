"""The evolution strategy: ask for a population, tell its fitness."""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from torch import Tensor, nn

from es_flipout.errors import UserError
from es_flipout.kernels import KernelChoice, Precision, chosen
from es_flipout.layers import convert
from es_flipout.perturbations import Family, Members, family_named
from es_flipout.randomness import Address
from es_flipout.strategy.estimator import WeightedSum, estimate_gradient
from es_flipout.strategy.optimizers import make_optimizer
from es_flipout.strategy.population import ForwardSettings, Population
from es_flipout.strategy.shaping import Shaping, shape


class EvolutionStrategy:
    """An evolution strategy for any objective and any ``nn.Module`` of supported layers.

    Example::

        strategy = EvolutionStrategy(module, population_size=256, sigma=0.05, learning_rate=0.02)
        for _ in range(100):
            population = strategy.ask()
            returns = objective(population)  # (P,), higher is better
            strategy.tell(returns)

    Args:
        module: the mean policy; it is copied, and the caller's module is not modified. Parameters that do not require a
            gradient are not changed.
        population_size: ``P``.
        sigma: standard deviation of the perturbations; the attribute may be changed between generations.
        perturbation: ``"flipout"``, ``"low_rank"``, ``"dense"``, or a family with settings such as
            ``Flipout(bases=8)``.
        learning_rate: step size; the attribute may be changed between generations.
        optimizer: ``"adam"``, ``"sgd"`` or ``"clipup"``.
        momentum: momentum of the optimizer (beta1 of Adam).
        weight_decay: every step shrinks the weights by a factor of ``1 - learning_rate * weight_decay`` (decoupled, as
            in AdamW); biases are not decayed.
        antithetic: evaluate every perturbation together with its negative.
        seed: determines all random numbers of the strategy.
        device: device to compute on; by default that of the module.
        row_block: see :class:`es_flipout.strategy.population.ForwardSettings`, as for the next two.
        kernels: ``"auto"``, ``"torch"`` or ``"triton"``.
        precision: precision of the matrix products in the Triton kernels.
        shaping: weights of the members, ``"ranks"`` or ``"differences"``; see :mod:`es_flipout.strategy.shaping`.

    Raises:
        UserError: an argument is out of range, or the module has an unsupported layer (named in the message).
    """

    def __init__(
        self,
        module: nn.Module,
        population_size: int,
        sigma: float,
        perturbation: str | Family = "flipout",
        learning_rate: float = 0.02,
        optimizer: Literal["adam", "sgd", "clipup"] = "adam",
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        antithetic: bool = True,
        seed: int = 0,
        device: torch.device | str | None = None,
        row_block: int | None = None,
        kernels: KernelChoice = "auto",
        precision: Precision = "ieee",
        shaping: Shaping = "ranks",
    ) -> None:
        if population_size < 2 or (antithetic and population_size % 2):
            need = "an even number of at least 2 (antithetic pairs)" if antithetic else "at least 2"
            raise UserError(f"population size must be {need}, got {population_size}")
        if shaping not in ("ranks", "differences"):
            raise UserError(f"shaping must be ranks or differences, got {shaping!r}")
        if shaping == "differences" and not antithetic:
            raise UserError("shaping differences requires antithetic pairs")
        if not sigma > 0:
            raise UserError(f"sigma must be greater than 0, got {sigma}")
        if not 0 <= seed < 2**64:
            raise UserError(f"seed must be in [0, 2**64), got {seed}")
        if row_block is not None and row_block < 1:
            raise UserError(f"row block must be at least 1, got {row_block}")
        self._mean = copy.deepcopy(module)
        if device is not None:
            self._mean.to(device)
        convert(self._mean)  # raises now if a layer is not supported
        evolved = [parameter for parameter in self._mean.parameters() if parameter.requires_grad]
        if not evolved:
            raise UserError("the module has no parameters that require a gradient, so there is nothing to evolve")
        self.device = evolved[0].device
        self.population_size = population_size
        self.sigma = sigma
        self.family = family_named(perturbation) if isinstance(perturbation, str) else perturbation
        self.weight_decay = weight_decay
        self.antithetic = antithetic
        self.shaping: Shaping = shaping
        self.seed = seed
        self.generation = 0
        chosen(kernels, self.device, evolved[0].dtype)  # raises now if the kernels cannot be used
        self.forward = ForwardSettings(row_block, kernels, precision)
        self.optimizer = make_optimizer(optimizer, evolved, learning_rate, momentum)
        self._asked: Population | None = None

    @property
    def learning_rate(self) -> float:
        """Step size of the optimizer."""
        return self.optimizer.param_groups[0]["lr"]

    @learning_rate.setter
    def learning_rate(self, value: float) -> None:
        self.optimizer.param_groups[0]["lr"] = value

    def ask(self, draw: bool = True) -> Population:
        """Return the population of this generation; asking again returns the same population.

        Args:
            draw: whether to draw the noise now; otherwise on its first use.
        """
        members = Members(self.population_size, self.antithetic, self.device, self.population_size)
        address = Address(self.seed, self.generation)
        self._asked = Population(self._mean, self.family, members, self.sigma, address, self.forward, draw)
        return self._asked

    @torch.no_grad()
    def tell(self, returns: Tensor, weighted_sum: WeightedSum = Population.weighted_sum) -> None:
        """Move the mean toward the better members and start the next generation.

        Args:
            returns: ``(P,)``, higher is better; NaN ranks worst.
            weighted_sum: see :func:`es_flipout.strategy.estimator.estimate_gradient`.

        Raises:
            RuntimeError: ``ask`` was not called in this generation.
            ValueError: ``returns`` has the wrong shape.
        """
        if self._asked is None:
            raise RuntimeError("call ask() before tell()")
        returns = torch.as_tensor(returns).to(self.device)
        if returns.shape != (self.population_size,):
            raise ValueError(f"returns must have shape ({self.population_size},), got {tuple(returns.shape)}")
        gradient = estimate_gradient(self._asked, shape(returns, self.shaping), weighted_sum)
        for name, parameter in self._mean.named_parameters():
            if not parameter.requires_grad:
                continue
            parameter.grad = gradient[name]
            if self.weight_decay and parameter.ndim > 1:
                parameter.mul_(1 - self.learning_rate * self.weight_decay)
        self.optimizer.step()
        self._asked = None
        self.generation += 1

    def mean_module(self) -> nn.Module:
        """Return a copy of the mean as an instance of the user's class."""
        module = copy.deepcopy(self._mean)
        for parameter in module.parameters():
            parameter.grad = None
        return module

    def state_dict(self) -> dict[str, Any]:
        """Return mean weights, optimizer state and generation, from which a run continues bit for bit."""
        return {
            "generation": self.generation,
            "sigma": self.sigma,
            "module": copy.deepcopy(self._mean.state_dict()),
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the state of :meth:`state_dict`."""
        self.generation = int(state["generation"])
        self.sigma = float(state["sigma"])
        self._mean.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
        self._asked = None
