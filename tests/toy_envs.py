"""For rollout tests: an environment that can identify each of its steps, and a population that signs its actions."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import gymnasium
import numpy as np
import torch
from torch import Tensor

from es_flipout.envs.base import BatchEnv, EnvironmentFailureError
from es_flipout.rollout.players import LocalPlayer
from es_flipout.training.trainer import Trainer


@dataclass(frozen=True)
class Step:
    """One live step: its episode (by seed), its number in the episode (from 1), inputs and outputs."""

    seed: int
    t: int
    obs: Tensor
    action: Tensor
    reward: float


class ToyEnv(BatchEnv):
    """Episodes whose length depends on their seed; stepping a finished slot or restarting a running one is an error.

    By default observations are ``(seed, t, 1)`` and rewards ``1000 * seed + t``: whole numbers, whose sums are exact.
    With ``obs_dim`` the state instead moves chaotically under the actions, in [-1, 1], so that a single wrong bit shows
    in the return; all operations round identically in every slot. Steps beyond the caller's limit ``caller_cap`` are
    errors, too.

    Attributes:
        trace: all live steps, in the order in which they were played.
        masks: ``live`` of every call of :meth:`step`, with None replaced by a mask.
    """

    def __init__(
        self,
        num_envs: int,
        length: Callable[[int], int],
        *,
        max_episode_steps: int | None = None,
        obs_dim: int | None = None,
        action_space: gymnasium.spaces.Box | gymnasium.spaces.Discrete | None = None,
        alive_bonus: float = 0.0,
        dtype: torch.dtype = torch.float64,
        fail_at_call: int | None = None,
        nan_seeds: Collection[int] = (),
        diverging_seeds: Collection[int] = (),
        caller_cap: int | None = None,
    ) -> None:
        self.env_id, self.kwargs, self.num_envs = "Toy-v0", {}, num_envs
        self.device, self.backend = torch.device("cpu"), "torch"
        self.max_episode_steps, self.alive_bonus = max_episode_steps, alive_bonus
        unbounded = gymnasium.spaces.Box(-np.inf, np.inf, (1,), np.float32)
        self.action_space = unbounded if action_space is None else action_space
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (obs_dim or 3,), np.float64)
        self.diverged = torch.zeros(num_envs, dtype=torch.bool)
        self.trace: list[Step] = []
        self.masks: list[Tensor] = []
        self.reset_seeds: list[int] = []
        self._length, self._dtype, self._moves, self._caller_cap = length, dtype, obs_dim is not None, caller_cap
        self._fail_at_call, self._nan_seeds, self._diverging_seeds = fail_at_call, nan_seeds, diverging_seeds
        self._seed = torch.full((num_envs,), -1)
        self._t = torch.zeros(num_envs, dtype=torch.int64)
        self._running = torch.zeros(num_envs, dtype=torch.bool)
        self._state = torch.zeros(num_envs, obs_dim or 3, dtype=dtype)

    def reset(self, seeds: Tensor, mask: Tensor | None = None) -> Tensor:
        mask = torch.ones(self.num_envs, dtype=torch.bool) if mask is None else mask
        cut = self._t == self._caller_cap if self._caller_cap is not None else torch.zeros_like(self._running)
        assert not (mask & self._running & ~cut).any(), "restarted an episode that was not over"
        for i in mask.nonzero()[:, 0].tolist():
            seed = int(seeds[i])
            self.reset_seeds.append(seed)
            self._seed[i], self._t[i], self._running[i] = seed, 0, True
            self._state[i] = self._start(seed)
        return self._state.clone()

    def step(self, action: Tensor, live: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        live = torch.ones(self.num_envs, dtype=torch.bool) if live is None else live.clone()
        self.masks.append(live)
        assert not (live & ~self._running).any(), "stepped a slot whose episode is over"
        assert len(action) == self.num_envs
        if self._fail_at_call == len(self.masks):
            raise EnvironmentFailureError("the toy broke")
        reward = torch.zeros(self.num_envs, dtype=torch.float64)
        terminated, truncated = torch.zeros(2, self.num_envs, dtype=torch.bool).unbind()
        self.diverged = torch.zeros(self.num_envs, dtype=torch.bool)
        for i in live.nonzero()[:, 0].tolist():
            seed, before = int(self._seed[i]), self._state[i].clone()
            self._t[i] += 1
            t = int(self._t[i])
            assert self._caller_cap is None or t <= self._caller_cap, "stepped an episode beyond the caller's limit"
            self._state[i], reward[i] = self._move(seed, t, before, action[i])
            if seed in self._nan_seeds and t == 2:
                reward[i] = torch.nan
            if seed in self._diverging_seeds and t == 2:
                self.diverged[i] = True
            terminated[i] = t >= self._length(seed) or bool(self.diverged[i])
            truncated[i] = t == self.max_episode_steps
            self._running[i] = not (terminated[i] or truncated[i])
            self.trace.append(Step(seed, t, before, action[i].clone(), float(reward[i])))
        return self._state.clone(), reward, terminated, truncated

    def _start(self, seed: int) -> Tensor:
        if not self._moves:
            return torch.tensor([seed, 0, 1], dtype=self._dtype)
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(self._state.shape[1], generator=generator, dtype=torch.float64).to(self._dtype)

    def _move(self, seed: int, t: int, state: Tensor, action: Tensor) -> tuple[Tensor, float]:
        if not self._moves:
            return torch.tensor([seed, t, 1], dtype=self._dtype), 1000.0 * seed + t
        push = action.to(self._dtype).repeat(len(state))[: len(state)]
        moved = 1 - 1.9 * (0.75 * state + 0.25 * push).abs()
        return moved, float(moved.mean())


class SignedPopulation:
    """A population whose member ``n`` always returns the action ``n``.

    Attributes:
        rows_computed: number of rows of every forward.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.device = torch.device("cpu")
        self.rows_computed: list[int] = []

    def initial_state(self, rows: int) -> None:
        return None

    def select(self, members: Tensor) -> SignedRows:
        return SignedRows(members.clone(), self.rows_computed)


class SignedRows:
    """The rows of a :class:`SignedPopulation`."""

    def __init__(self, members: Tensor, rows_computed: list[int]) -> None:
        self.members = members
        self.rows_computed = rows_computed

    def __call__(self, *inputs: Tensor) -> Tensor:
        (x,) = inputs
        assert len(x) == len(self.members)
        self.rows_computed.append(len(x))
        return self.members[:, None].to(torch.float32)

    def replace(self, rows: Tensor, members: Tensor) -> None:
        self.members[rows] = members


def lanes_of(trainer: Trainer) -> tuple[BatchEnv, ...]:
    """Return the environments of a trainer with a :class:`LocalPlayer`."""
    assert isinstance(trainer.player, LocalPlayer)
    return trainer.player.envs
