"""Gymnasium's classic control tasks in torch, with Gymnasium's order of operations and rounding."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from gymnasium.spaces import Box, Discrete
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import override

from es_flipout.envs.torch_env import TorchTask


def _symmetric_box(*high: float) -> Box:
    bound = np.array(high, dtype=np.float32)
    return Box(-bound, bound, dtype=np.float32)


def _float32(values: Tensor) -> Tensor:
    """Round to the nearest float32, kept as float64."""
    return values.float().double()


def _round32(value: float) -> float:
    return float(np.float32(value))


@dataclass(frozen=True, kw_only=True)
class CartPole(TorchTask):
    """Keep a pole upright on a cart pushed left or right. State: position, velocity, angle, angular velocity."""

    starts_together: ClassVar[bool] = True
    position_limit: ClassVar[float] = 2.4
    angle_limit: ClassVar[float] = 12 * 2 * math.pi / 360
    observation_space = _symmetric_box(position_limit * 2, math.inf, angle_limit * 2, math.inf)
    action_space = Discrete(2)
    sutton_barto_reward: bool = False

    @override
    def start(self, rng: np.random.Generator) -> NDArray[np.float64]:
        return rng.uniform(low=-0.05, high=0.05, size=(4,))

    @override
    def advance(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        gravity, mass_pole, half_length, push, tau = 9.8, 0.1, 0.5, 10.0, 0.02
        total_mass, pole_moment = mass_pole + 1.0, mass_pole * half_length
        x, x_dot, theta, theta_dot = state.unbind()
        cosine, sine = theta.cos(), theta.sin()
        force = torch.where(action == 1, push, -push)
        pull = (force + pole_moment * theta_dot.square() * sine) / total_mass
        angular = (gravity * sine - cosine * pull) / (
            half_length * (4.0 / 3.0 - mass_pole * cosine.square() / total_mass)
        )
        linear = pull - pole_moment * angular * cosine / total_mass
        x, theta = x + tau * x_dot, theta + tau * theta_dot
        terminated = (x.abs() > self.position_limit) | (theta.abs() > self.angle_limit)
        reward = -terminated.double() if self.sutton_barto_reward else torch.ones_like(x)
        return torch.stack((x, x_dot + tau * linear, theta, theta_dot + tau * angular)), reward, terminated

    @override
    def observe(self, state: Tensor) -> Tensor:
        return state.T.float()


@dataclass(frozen=True, kw_only=True)
class Pendulum(TorchTask):
    """Swing a pendulum up and hold it there. State: angle, angular velocity. Never terminates."""

    starts_together: ClassVar[bool] = True
    max_speed: ClassVar[float] = 8.0
    max_torque: ClassVar[float] = 2.0
    observation_space = _symmetric_box(1.0, 1.0, max_speed)
    action_space = _symmetric_box(max_torque)
    g: float = 10.0

    @override
    def start(self, rng: np.random.Generator) -> NDArray[np.float64]:
        high = np.array([np.pi, 1.0])
        return rng.uniform(low=-high, high=high)

    @override
    def advance(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        dt = 0.05
        theta, speed = state.unbind()
        torque = action[:, 0].clamp(-self.max_torque, self.max_torque)  # Gymnasium computes its terms in float32
        angle = (theta + math.pi) % (2 * math.pi) - math.pi
        cost = angle.square() + 0.1 * speed.square() + 0.001 * torque.square()
        speed = speed + (3 * self.g / 2 * theta.sin() + 3.0 * torque) * dt
        speed = speed.clamp(-self.max_speed, self.max_speed)
        return torch.stack((theta + speed * dt, speed)), -cost, None

    @override
    def observe(self, state: Tensor) -> Tensor:
        theta, speed = state.unbind()
        return torch.stack((theta.cos(), theta.sin(), speed), 1).float()


@dataclass(frozen=True, kw_only=True)
class Acrobot(TorchTask):
    """Swing the tip of two hanging links above a line by a torque between them.

    State: two angles, their velocities, then cosine and sine of each angle as observed. The latter are part of the
    state because Gymnasium computes them in float32 at the start of an episode and in float64 afterwards.
    """

    max_speeds: ClassVar[tuple[float, float]] = (4 * math.pi, 9 * math.pi)
    observation_space = _symmetric_box(1.0, 1.0, 1.0, 1.0, *max_speeds)
    action_space = Discrete(3)

    @override
    def start(self, rng: np.random.Generator) -> NDArray[np.float64]:
        start = rng.uniform(low=-0.1, high=0.1, size=(4,)).astype(np.float32)
        cosines, sines = np.cos(start[:2]), np.sin(start[:2])
        return np.array([*start, cosines[0], sines[0], cosines[1], sines[1]], np.float64)

    @override
    def advance(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        dt = 0.2
        torque = action.double() - 1.0
        state = state[:4]
        k1 = self._derivative(state, torque)
        k2 = self._derivative(state + dt / 2.0 * k1, torque)
        k3 = self._derivative(state + dt / 2.0 * k2, torque)
        k4 = self._derivative(state + dt * k3, torque)
        theta1, theta2, speed1, speed2 = (state + dt / 6.0 * (k1 + 2 * k2 + 2 * k3 + k4)).unbind()
        theta1, theta2 = _wrap(theta1), _wrap(theta2)
        speed1 = speed1.clamp(-self.max_speeds[0], self.max_speeds[0])
        speed2 = speed2.clamp(-self.max_speeds[1], self.max_speeds[1])
        shown = theta1.cos(), theta1.sin(), theta2.cos(), theta2.sin()
        terminated = -shown[0] - (theta2 + theta1).cos() > 1.0
        reward = torch.where(terminated, torch.zeros_like(theta1), -1.0)
        return torch.stack((theta1, theta2, speed1, speed2, *shown)), reward, terminated

    def _derivative(self, state: Tensor, torque: Tensor) -> Tensor:
        """Return the time derivative of the state, ``(4, S)``; masses, lengths and inertias are 1, centers 1/2."""
        center, g = 0.5, 9.8
        theta1, theta2, speed1, speed2 = state.unbind()
        cosine, sine = theta2.cos(), theta2.sin()
        d1 = center**2 + (1.0 + center**2 + 2 * center * cosine) + 1.0 + 1.0
        d2 = (center**2 + center * cosine) + 1.0
        phi2 = center * g * (theta1 + theta2 - math.pi / 2.0).cos()
        phi1 = (
            -center * speed2.square() * sine
            - 2 * center * speed2 * speed1 * sine
            + (center + 1.0) * g * (theta1 - math.pi / 2).cos()
            + phi2
        )
        acceleration2 = (torque + d2 / d1 * phi1 - center * speed1.square() * sine - phi2) / (
            center**2 + 1.0 - d2.square() / d1
        )
        return torch.stack((speed1, speed2, -(d2 * acceleration2 + phi1) / d1, acceleration2))

    @override
    def observe(self, state: Tensor) -> Tensor:
        return torch.cat((state[4:], state[2:4])).T.float()


def _wrap(angle: Tensor) -> Tensor:
    """Wrap an angle to [-pi, pi] by whole turns; a step of Acrobot adds at most two."""
    for _ in range(2):
        angle = torch.where(angle > math.pi, angle - 2 * math.pi, angle)
        angle = torch.where(angle < -math.pi, angle + 2 * math.pi, angle)
    return angle


@dataclass(frozen=True, kw_only=True)
class MountainCar(TorchTask):
    """Drive a weak car out of a valley by pushing left, not at all or right. State: position, velocity."""

    low: ClassVar[tuple[float, float]] = (-1.2, -0.07)
    high: ClassVar[tuple[float, float]] = (0.6, 0.07)
    observation_space = Box(np.array(low, np.float32), np.array(high, np.float32), dtype=np.float32)
    action_space = Discrete(3)
    goal_velocity: float = 0

    @override
    def start(self, rng: np.random.Generator) -> NDArray[np.float64]:
        return np.array([rng.uniform(low=-0.6, high=-0.4), 0.0])

    @override
    def advance(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        position, velocity = state.unbind()
        velocity = velocity + ((action.double() - 1) * 0.001 + (3 * position).cos() * (-0.0025))
        velocity = velocity.clamp(self.low[1], self.high[1])
        position = (position + velocity).clamp(self.low[0], self.high[0])
        velocity = torch.where((position == self.low[0]) & (velocity < 0), 0.0, velocity)
        terminated = (position >= 0.5) & (velocity >= self.goal_velocity)
        return torch.stack((position, velocity)), torch.full_like(position, -1.0), terminated

    @override
    def observe(self, state: Tensor) -> Tensor:
        return state.T.float()


@dataclass(frozen=True, kw_only=True)
class MountainCarContinuous(TorchTask):
    """Drive a weak car out of a valley with a continuous force. State: position, velocity, and 1 after the first step.

    Gymnasium keeps the state in float64 until the first step of an episode and in float32 afterwards, and NumPy then
    computes in float32, too. The third variable tells which applies.
    """

    low: ClassVar[tuple[float, float]] = MountainCar.low
    high: ClassVar[tuple[float, float]] = MountainCar.high
    observation_space = MountainCar.observation_space
    action_space = Box(-1.0, 1.0, (1,), np.float32)
    goal_velocity: float = 0

    @override
    def start(self, rng: np.random.Generator) -> NDArray[np.float64]:
        return np.array([rng.uniform(low=-0.6, high=-0.4), 0.0, 0.0])

    @override
    def advance(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        position, velocity, started = state.unbind()
        single = started > 0

        def rounded(values: Tensor) -> Tensor:
            return torch.where(single, _float32(values), values)

        push = action[:, 0].double()
        gravity = 0.0025 * rounded(3 * position).cos()
        # a force within bounds is a float32 array element; a clipped one is a Python float, in double precision
        within = _float32(_float32(push * _round32(0.0015)) - _float32(gravity))
        clipped = push.clamp(-1.0, 1.0) * 0.0015 - gravity
        acceleration = torch.where(push.abs() > 1.0, rounded(clipped), within)
        velocity = rounded(velocity + acceleration).clamp(_round32(self.low[1]), _round32(self.high[1]))
        position = rounded(position + velocity).clamp(_round32(self.low[0]), _round32(self.high[0]))
        velocity = torch.where((position == _round32(self.low[0])) & (velocity < 0), 0.0, velocity)
        terminated = (position >= _round32(0.45)) & (velocity >= self.goal_velocity)
        reward = torch.where(terminated, 100.0, 0.0) - push.square() * 0.1
        state = torch.stack((_float32(position), _float32(velocity), torch.ones_like(started)))
        return state, reward, terminated

    @override
    def observe(self, state: Tensor) -> Tensor:
        return state[:2].T.float()


CLASSIC_TASKS: Mapping[str, type[TorchTask]] = {
    "CartPole-v1": CartPole,
    "Pendulum-v1": Pendulum,
    "Acrobot-v1": Acrobot,
    "MountainCar-v0": MountainCar,
    "MountainCarContinuous-v0": MountainCarContinuous,
}
