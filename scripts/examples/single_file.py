"""Evolution strategies with flipout in one file: CartPole-v1 with plain torch and gymnasium, and nothing of es_flipout.

python scripts/examples/single_file.py        # solved in about ten seconds on one core

An evolution strategy plays one episode with each of P perturbed copies ("members") of a policy, and moves the policy towards the
perturbations that did well. With a perturbation matrix for every member, the forward pass of the population would be P products
with P different matrices. Flipout (Wen et al., "Flipout: efficient pseudo-independent weight perturbations on mini-batches", ICLR
2018) flips the signs of one matrix B instead. Member n has, in every layer,

    W_n = W + sigma * B o (r_n s_n^T)                                (equation 3)

with sign vectors r_n (outputs) and s_n (inputs), where o is the elementwise product. For all members together, one row each:

    Y = X W^T + sigma * R o ((X o S) B^T)                            (equation 4)

that is two products with shared matrices, whatever P is. Shapes: W and B are ``(out, in)``, R ``(P, out)``, S ``(P, in)``.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import gymnasium
import torch
from torch import Tensor


class Layer(NamedTuple):
    """A linear layer of the mean policy: ``weight`` (out, in), ``bias`` (out,)."""

    weight: Tensor
    bias: Tensor


class Noise(NamedTuple):
    """The perturbations of one layer, in units of sigma: B, R and S as above, and dense ``bias`` noise ``(P, out)``."""

    base: Tensor
    r: Tensor
    s: Tensor
    bias: Tensor


def make_layers(sizes: list[int]) -> list[Layer]:
    """The mean policy: scaled normal weights, zero biases; a small last layer, so that it starts undecided."""
    gains = [1.0] * (len(sizes) - 2) + [0.1]
    return [
        Layer(gain * torch.randn(n_out, n_in) / n_in**0.5, torch.zeros(n_out))
        for n_in, n_out, gain in zip(sizes[:-1], sizes[1:], gains, strict=True)
    ]


def signs(*shape: int) -> Tensor:
    """Random +1 and -1."""
    return torch.randint(2, shape).float() * 2 - 1


def antithetic(noise: Tensor, sign: int = -1) -> Tensor:
    """From one row for each pair to one for each member: the partner of a row is the row times ``sign``."""
    return torch.stack([noise, sign * noise], 1).flatten(0, 1)


def draw(layers: list[Layer], pairs: int) -> list[Noise]:
    """A generation's noise. Partners have signs (r, s) and (-r, s), so their perturbations are opposite.

    B has entries of +1 and -1 here; the paper's are Gaussian. A bias is small, so every pair has its own noise for it.
    """
    return [
        Noise(
            base=signs(*weight.shape),
            r=antithetic(signs(pairs, len(weight))),
            s=antithetic(signs(pairs, weight.shape[1]), sign=1),
            bias=antithetic(torch.randn(pairs, len(bias))),
        )
        for weight, bias in layers
    ]


def forward(layers: list[Layer], x: Tensor) -> Tensor:
    """The mean policy: ``(n, inputs)`` to ``(n, outputs)``."""
    for i, (weight, bias) in enumerate(layers):
        x = x @ weight.T + bias
        x = x.tanh() if i < len(layers) - 1 else x
    return x


def population_forward(layers: list[Layer], noise: list[Noise], sigma: float, x: Tensor) -> Tensor:
    """Row n through member n, ``(P, inputs)`` to ``(P, outputs)``: equation 4, layer by layer."""
    for i, ((weight, bias), (base, r, s, bias_noise)) in enumerate(zip(layers, noise, strict=True)):
        x = x @ weight.T + bias + sigma * (r * ((x * s) @ base.T) + bias_noise)
        x = x.tanh() if i < len(layers) - 1 else x
    return x


def centered_ranks(returns: Tensor) -> Tensor:
    """Returns to ranks in [-1/2, 1/2], so that their scale does not matter; ties get their average rank."""
    below = (returns[:, None] > returns).sum(1)
    equal = (returns[:, None] == returns).sum(1)
    return (below + (equal - 1) / 2) / (len(returns) - 1) - 0.5


def gradient(noise: list[Noise], u: Tensor, sigma: float) -> list[Layer]:
    """The estimate 1 / (P sigma) * sum_n u_n * (perturbation of n), from the members' utilities ``u`` (P,).

    The perturbations are B o (r_n s_n^T), so their weighted sum is B o (R^T diag(u) S): one matrix product for each layer.
    """
    scale = 1 / (len(u) * sigma)
    return [Layer(scale * base * (r.T @ (u[:, None] * s)), scale * (u @ bias)) for base, r, s, bias in noise]


def play(policy: Callable[[Tensor], Tensor], envs: gymnasium.vector.VectorEnv, seed: int) -> Tensor:
    """One episode in each environment, where row n of the observations is for member n; the returns ``(n,)``."""
    observations, _ = envs.reset(seed=seed)
    returns, alive = torch.zeros(envs.num_envs), torch.ones(envs.num_envs, dtype=torch.bool)
    while alive.any():
        actions = policy(torch.as_tensor(observations)).argmax(1)
        observations, rewards, terminated, truncated, _ = envs.step(actions.numpy())
        returns += alive * torch.as_tensor(rewards)
        alive &= ~torch.as_tensor(terminated | truncated)  # what follows an end is another episode
    return returns


def main(generations: int = 60, pairs: int = 32, sigma: float = 0.2, learning_rate: float = 0.1) -> float:
    """Train; returns the mean return of the mean policy over 100 new episodes."""
    torch.manual_seed(0)
    envs, test_envs = (gymnasium.make_vec("CartPole-v1", num_envs=n) for n in (2 * pairs, 100))
    layers, started = make_layers([4, 16, 2]), time.perf_counter()
    parameters = [parameter for layer in layers for parameter in layer]
    optimizer = torch.optim.Adam(parameters, lr=learning_rate, maximize=True)
    score = 0.0
    for generation in range(1, generations + 1):
        noise = draw(layers, pairs)
        returns = play(lambda x, noise=noise: population_forward(layers, noise, sigma, x), envs, seed=generation)
        estimate = gradient(noise, centered_ranks(returns), sigma)
        for parameter, own in zip(parameters, (g for layer in estimate for g in layer), strict=True):
            parameter.grad = own
        optimizer.step()
        if generation % 10 == 0 or generation == generations:
            score = float(play(lambda x: forward(layers, x), test_envs, seed=1_000_000).mean())
            print(f"generation {generation}: {score:.1f} (mean of 100 episodes), {time.perf_counter() - started:.0f} s")
    return score


if __name__ == "__main__":
    torch.set_num_threads(1)  # the products are small: more threads only wait for each other
    main()
