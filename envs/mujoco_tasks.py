"""The Gymnasium v5 MuJoCo tasks, with Gymnasium's order of operations: bitwise identical results in NumPy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from typing_extensions import override

from es_flipout.envs.mujoco_task import (
    Array,
    Fields,
    ModelFacts,
    MujocoTask,
    Namespace,
    NoisyStart,
    Start,
    between,
    flat,
    norm,
    sum_of_squares,
)


@dataclass(frozen=True, kw_only=True)
class InvertedPendulum(NoisyStart):
    """Balance a pole on a cart; the whole reward is 1 while it stands, so there is no separate alive bonus."""

    xml_file: str = "inverted_pendulum.xml"
    frame_skip: int = 2
    reset_noise_scale: float = 0.01

    @override
    def observation(self, xp: Namespace, model: ModelFacts, d: Fields) -> Array:
        del model
        return xp.concatenate((d["qpos"], d["qvel"]), 1)

    @override
    def outcome(
        self, xp: Namespace, model: ModelFacts, d: Fields, before: Array, action: Array
    ) -> tuple[Array, Array | None]:
        del before, action
        finite = xp.all(xp.isfinite(self.observation(xp, model, d)), 1)
        alive = finite & ~(xp.abs(d["qpos"][:, 1]) > 0.2)
        return xp.where(alive, xp.ones_like(d["qpos"][:, 0]), 0.0), ~alive


@dataclass(frozen=True, kw_only=True)
class InvertedDoublePendulum(NoisyStart):
    """Balance two poles, one on top of the other, on a cart."""

    normal_velocity: ClassVar[bool] = True
    xml_file: str = "inverted_double_pendulum.xml"
    frame_skip: int = 5
    healthy_reward: float = 10.0

    @override
    def derived_fields(self) -> tuple[str, ...]:
        return ("site_xpos", "qfrc_constraint")

    @override
    def alive_bonus(self) -> float:
        return self.healthy_reward

    @override
    def observation(self, xp: Namespace, model: ModelFacts, d: Fields) -> Array:
        del model
        cart, angles = d["qpos"][:, :1], d["qpos"][:, 1:]
        velocity = xp.clip(d["qvel"], -10, 10)
        force = xp.clip(d["qfrc_constraint"][:, :1], -10, 10)
        return xp.concatenate((cart, xp.sin(angles), xp.cos(angles), velocity, force), 1)

    @override
    def outcome(
        self, xp: Namespace, model: ModelFacts, d: Fields, before: Array, action: Array
    ) -> tuple[Array, Array | None]:
        del model, before, action
        x, y = d["site_xpos"][:, 0, 0], d["site_xpos"][:, 0, 2]
        v1, v2 = d["qvel"][:, 1], d["qvel"][:, 2]
        # float_power is pow() of the C library, like Gymnasium's ** on scalars; ** on arrays multiplies instead
        distance = 0.01 * xp.float_power(x, 2) + xp.float_power(y - 2, 2)
        speed = 1e-3 * xp.float_power(v1, 2) + 5e-3 * xp.float_power(v2, 2)
        terminated = y <= 1
        bonus = xp.where(terminated, xp.zeros_like(y), self.healthy_reward)
        return bonus - distance - speed, terminated


@dataclass(frozen=True, kw_only=True)
class HalfCheetah(NoisyStart):
    """Run forward with a two-legged planar body; never terminates."""

    normal_velocity: ClassVar[bool] = True
    hidden_positions: ClassVar[int] = 1  # leading coordinates that the observation omits
    xml_file: str = "half_cheetah.xml"
    frame_skip: int = 5
    forward_reward_weight: float = 1.0
    ctrl_cost_weight: float = 0.1
    exclude_current_positions_from_observation: bool = True

    @override
    def observation(self, xp: Namespace, model: ModelFacts, d: Fields) -> Array:
        del model
        hidden = self.hidden_positions if self.exclude_current_positions_from_observation else 0
        return xp.concatenate((d["qpos"][:, hidden:], d["qvel"]), 1)

    @override
    def outcome(
        self, xp: Namespace, model: ModelFacts, d: Fields, before: Array, action: Array
    ) -> tuple[Array, Array | None]:
        forward = self.forward_reward_weight * self.velocity(model, before, d["qpos"][:, 0])
        return forward - self.ctrl_cost_weight * sum_of_squares(xp, action), None


@dataclass(frozen=True, kw_only=True)
class Swimmer(HalfCheetah):
    """Swim forward with a three-link body in a viscous fluid; never terminates."""

    normal_velocity: ClassVar[bool] = False
    hidden_positions: ClassVar[int] = 2
    xml_file: str = "swimmer.xml"
    frame_skip: int = 4
    ctrl_cost_weight: float = 1e-4


@dataclass(frozen=True, kw_only=True)
class Walker2d(NoisyStart):
    """Walk forward with a two-legged planar body without falling."""

    xml_file: str = "walker2d_v5.xml"
    frame_skip: int = 4
    forward_reward_weight: float = 1.0
    ctrl_cost_weight: float = 1e-3
    healthy_reward: float = 1.0
    terminate_when_unhealthy: bool = True
    healthy_z_range: tuple[float, float] = (0.8, 2.0)
    healthy_angle_range: tuple[float, float] = (-1.0, 1.0)
    reset_noise_scale: float = 5e-3
    exclude_current_positions_from_observation: bool = True

    @override
    def alive_bonus(self) -> float:
        return self.healthy_reward

    def healthy(self, xp: Namespace, d: Fields) -> Array:
        """Return the slots that stand, ``(S,)`` bool."""
        del xp
        return between(d["qpos"][:, 1], self.healthy_z_range) & between(d["qpos"][:, 2], self.healthy_angle_range)

    @override
    def observation(self, xp: Namespace, model: ModelFacts, d: Fields) -> Array:
        del model
        hidden = 1 if self.exclude_current_positions_from_observation else 0
        return xp.concatenate((d["qpos"][:, hidden:], xp.clip(d["qvel"], -10, 10)), 1)

    @override
    def outcome(
        self, xp: Namespace, model: ModelFacts, d: Fields, before: Array, action: Array
    ) -> tuple[Array, Array | None]:
        healthy = self.healthy(xp, d)
        forward = self.forward_reward_weight * self.velocity(model, before, d["qpos"][:, 0])
        gain = xp.where(healthy, forward + self.healthy_reward, forward)
        reward = gain - self.ctrl_cost_weight * sum_of_squares(xp, action)
        return reward, ~healthy if self.terminate_when_unhealthy else None


@dataclass(frozen=True, kw_only=True)
class Hopper(Walker2d):
    """Hop forward on one leg without falling."""

    xml_file: str = "hopper.xml"
    healthy_state_range: tuple[float, float] = (-100.0, 100.0)
    healthy_z_range: tuple[float, float] = (0.7, float("inf"))
    healthy_angle_range: tuple[float, float] = (-0.2, 0.2)

    def healthy(self, xp: Namespace, d: Fields) -> Array:
        """Return the slots that stand and whose state is in bounds, ``(S,)`` bool."""
        bounds = self.healthy_state_range
        in_bounds = xp.all(between(d["qpos"][:, 2:], bounds), 1) & xp.all(between(d["qvel"], bounds), 1)
        return in_bounds & Walker2d.healthy(self, xp, d)


@dataclass(frozen=True, kw_only=True)
class Reacher(MujocoTask):
    """Move the tip of a two-joint arm to a target; never terminates."""

    xml_file: str = "reacher.xml"
    frame_skip: int = 2
    reward_dist_weight: float = 1
    reward_control_weight: float = 1

    @override
    def derived_fields(self) -> tuple[str, ...]:
        return ("xpos",)

    @override
    def start(self, rng: np.random.Generator, model: ModelFacts) -> Start:
        qpos = rng.uniform(low=-0.1, high=0.1, size=model.qpos0.size) + model.qpos0
        goal = rng.uniform(low=-0.2, high=0.2, size=2)
        while not np.linalg.norm(goal) < 0.2:
            goal = rng.uniform(low=-0.2, high=0.2, size=2)
        qvel = rng.uniform(low=-0.005, high=0.005, size=model.nv)
        qpos[-2:], qvel[-2:] = goal, 0
        return qpos, qvel

    def _miss(self, model: ModelFacts, d: Fields) -> Array:
        return d["xpos"][:, model.body_ids["fingertip"]] - d["xpos"][:, model.body_ids["target"]]

    @override
    def observation(self, xp: Namespace, model: ModelFacts, d: Fields) -> Array:
        theta = d["qpos"][:, :2]
        parts = (xp.cos(theta), xp.sin(theta), d["qpos"][:, 2:], d["qvel"][:, :2], self._miss(model, d)[:, :2])
        return xp.concatenate(parts, 1)

    @override
    def outcome(
        self, xp: Namespace, model: ModelFacts, d: Fields, before: Array, action: Array
    ) -> tuple[Array, Array | None]:
        del before
        distance = -norm(xp, self._miss(model, d)) * self.reward_dist_weight
        return distance + -sum_of_squares(xp, action) * self.reward_control_weight, None


@dataclass(frozen=True, kw_only=True)
class Pusher(MujocoTask):
    """Push a cylinder to a goal with a robot arm; never terminates."""

    islands_matter: ClassVar[bool] = True
    xml_file: str = "pusher_v5.xml"
    frame_skip: int = 5
    reward_near_weight: float = 0.5
    reward_dist_weight: float = 1
    reward_control_weight: float = 0.1

    @override
    def derived_fields(self) -> tuple[str, ...]:
        return ("xpos",)

    @override
    def start(self, rng: np.random.Generator, model: ModelFacts) -> Start:
        cylinder = np.zeros(2)
        while not np.linalg.norm(cylinder) > 0.17:
            cylinder = np.concatenate((rng.uniform(low=-0.3, high=0, size=1), rng.uniform(low=-0.2, high=0.2, size=1)))
        qpos = model.qpos0.copy()
        qpos[-4:] = (*cylinder, 0, 0)
        qvel = rng.uniform(low=-0.005, high=0.005, size=model.nv)
        qvel[-4:] = 0
        return qpos, qvel

    def _bodies(self, model: ModelFacts, d: Fields) -> tuple[Array, Array, Array]:
        """Return the positions of arm tip, object and goal, ``(S, 3)`` each."""
        tip, thing, goal = (d["xpos"][:, model.body_ids[name]] for name in ("tips_arm", "object", "goal"))
        return tip, thing, goal

    @override
    def observation(self, xp: Namespace, model: ModelFacts, d: Fields) -> Array:
        return xp.concatenate((d["qpos"][:, :7], d["qvel"][:, :7], *self._bodies(model, d)), 1)

    @override
    def outcome(
        self, xp: Namespace, model: ModelFacts, d: Fields, before: Array, action: Array
    ) -> tuple[Array, Array | None]:
        del before
        tip, thing, goal = self._bodies(model, d)
        near = -norm(xp, thing - tip) * self.reward_near_weight
        distance = -norm(xp, thing - goal) * self.reward_dist_weight
        return distance + -sum_of_squares(xp, action) * self.reward_control_weight + near, None


@dataclass(frozen=True, kw_only=True)
class Ant(NoisyStart):
    """Run forward with a four-legged body without falling or jumping."""

    normal_velocity: ClassVar[bool] = True
    xml_file: str = "ant.xml"
    frame_skip: int = 5
    forward_reward_weight: float = 1
    ctrl_cost_weight: float = 0.5
    contact_cost_weight: float = 5e-4
    healthy_reward: float = 1.0
    main_body: int | str = 1
    terminate_when_unhealthy: bool = True
    healthy_z_range: tuple[float, float] = (0.2, 1.0)
    contact_force_range: tuple[float, float] = (-1.0, 1.0)
    exclude_current_positions_from_observation: bool = True
    include_cfrc_ext_in_observation: bool = True

    @override
    def derived_fields(self) -> tuple[str, ...]:
        uses_forces = self.include_cfrc_ext_in_observation or self.contact_cost_weight != 0
        return ("xpos", "cfrc_ext") if uses_forces else ("xpos",)

    @override
    def alive_bonus(self) -> float:
        return self.healthy_reward

    @override
    def before(self, xp: Namespace, model: ModelFacts, d: Fields) -> Array:
        del xp
        body = model.body_ids[self.main_body] if isinstance(self.main_body, str) else self.main_body
        return d["xpos"][:, body, 0]

    @override
    def observation(self, xp: Namespace, model: ModelFacts, d: Fields) -> Array:
        del model
        hidden = 2 if self.exclude_current_positions_from_observation else 0
        parts = [d["qpos"][:, hidden:], d["qvel"]]
        if self.include_cfrc_ext_in_observation:
            parts.append(xp.clip(flat(d["cfrc_ext"][:, 1:]), *self.contact_force_range))
        return xp.concatenate(parts, 1)

    @override
    def outcome(
        self, xp: Namespace, model: ModelFacts, d: Fields, before: Array, action: Array
    ) -> tuple[Array, Array | None]:
        z = d["qpos"][:, 2]
        finite = xp.all(xp.isfinite(d["qpos"]), 1) & xp.all(xp.isfinite(d["qvel"]), 1)
        healthy = finite & (self.healthy_z_range[0] <= z) & (z <= self.healthy_z_range[1])
        forward = self.velocity(model, before, self.before(xp, model, d)) * self.forward_reward_weight
        gain = xp.where(healthy, forward + self.healthy_reward, forward)
        cost = self.ctrl_cost_weight * sum_of_squares(xp, action)
        if self.contact_cost_weight != 0:
            forces = xp.clip(flat(d["cfrc_ext"]), *self.contact_force_range)
            cost = cost + self.contact_cost_weight * sum_of_squares(xp, forces)
        return gain - cost, ~healthy if self.terminate_when_unhealthy else None


@dataclass(frozen=True, kw_only=True)
class _HumanoidBody(NoisyStart):
    """Base class of the two humanoid tasks: observation and costs."""

    frame_skip: int = 5
    ctrl_cost_weight: float = 0.1
    reset_noise_scale: float = 1e-2
    exclude_current_positions_from_observation: bool = True
    include_cinert_in_observation: bool = True
    include_cvel_in_observation: bool = True
    include_qfrc_actuator_in_observation: bool = True
    include_cfrc_ext_in_observation: bool = True

    def _observed(self) -> dict[str, int]:
        """Return the derived fields of the observation, with the number of leading entries that it omits of each."""
        skipped = {"cinert": 1, "cvel": 1, "qfrc_actuator": 6, "cfrc_ext": 1}
        return {name: first for name, first in skipped.items() if getattr(self, f"include_{name}_in_observation")}

    @override
    def observation(self, xp: Namespace, model: ModelFacts, d: Fields) -> Array:
        del model
        hidden = 2 if self.exclude_current_positions_from_observation else 0
        derived = [flat(d[name][:, first:]) for name, first in self._observed().items()]
        return xp.concatenate((d["qpos"][:, hidden:], d["qvel"], *derived), 1)

    def _force_cost(self, xp: Namespace, d: Fields, weight: float, bounds: tuple[float, float]) -> Array | float:
        """Compute the cost of contact forces, clipped to ``bounds``: ``(S,)``, or a number if ``weight`` is 0."""
        if weight == 0:
            return min(max(0.0, bounds[0]), bounds[1])
        return xp.clip(weight * sum_of_squares(xp, flat(d["cfrc_ext"])), *bounds)


@dataclass(frozen=True, kw_only=True)
class Humanoid(_HumanoidBody):
    """Walk forward with a humanoid body without falling."""

    xml_file: str = "humanoid.xml"
    forward_reward_weight: float = 1.25
    contact_cost_weight: float = 5e-7
    contact_cost_range: tuple[float, float] = (-float("inf"), 10.0)
    healthy_reward: float = 5.0
    terminate_when_unhealthy: bool = True
    healthy_z_range: tuple[float, float] = (1.0, 2.0)

    @override
    def derived_fields(self) -> tuple[str, ...]:
        cost = () if self.contact_cost_weight == 0 else ("cfrc_ext",)
        return tuple(dict.fromkeys(("xipos", *self._observed(), *cost)))

    @override
    def alive_bonus(self) -> float:
        return self.healthy_reward

    def before(self, xp: Namespace, model: ModelFacts, d: Fields) -> Array:
        """Return the x coordinate of the center of mass, summed body by body like Gymnasium's einsum."""
        return xp.cumsum(d["xipos"][:, :, 0] * model.body_mass, 1)[:, -1] / model.body_mass.sum()

    @override
    def outcome(
        self, xp: Namespace, model: ModelFacts, d: Fields, before: Array, action: Array
    ) -> tuple[Array, Array | None]:
        del action
        healthy = between(d["qpos"][:, 2], self.healthy_z_range)
        forward = self.forward_reward_weight * self.velocity(model, before, self.before(xp, model, d))
        gain = xp.where(healthy, forward + self.healthy_reward, forward)
        cost = self.ctrl_cost_weight * sum_of_squares(xp, d["ctrl"])
        cost = cost + self._force_cost(xp, d, self.contact_cost_weight, self.contact_cost_range)
        return gain - cost, ~healthy if self.terminate_when_unhealthy else None


@dataclass(frozen=True, kw_only=True)
class HumanoidStandup(_HumanoidBody):
    """Stand up from lying; never terminates, alive bonus 1. Gymnasium accepts ``uph_cost_weight`` and ignores it."""

    xml_file: str = "humanoidstandup.xml"
    uph_cost_weight: float = 1
    impact_cost_weight: float = 0.5e-6
    impact_cost_range: tuple[float, float] = (-float("inf"), 10.0)

    @override
    def derived_fields(self) -> tuple[str, ...]:
        cost = () if self.impact_cost_weight == 0 else ("cfrc_ext",)
        return tuple(dict.fromkeys((*self._observed(), *cost)))

    @override
    def alive_bonus(self) -> float:
        return 1.0

    @override
    def outcome(
        self, xp: Namespace, model: ModelFacts, d: Fields, before: Array, action: Array
    ) -> tuple[Array, Array | None]:
        del before, action
        height = d["qpos"][:, 2] / model.timestep
        control = self.ctrl_cost_weight * sum_of_squares(xp, d["ctrl"])
        return height - control - self._force_cost(xp, d, self.impact_cost_weight, self.impact_cost_range) + 1, None


MUJOCO_TASKS: Mapping[str, type[MujocoTask]] = {
    "InvertedPendulum-v5": InvertedPendulum,
    "InvertedDoublePendulum-v5": InvertedDoublePendulum,
    "Swimmer-v5": Swimmer,
    "Hopper-v5": Hopper,
    "HalfCheetah-v5": HalfCheetah,
    "Walker2d-v5": Walker2d,
    "Reacher-v5": Reacher,
    "Pusher-v5": Pusher,
    "Ant-v5": Ant,
    "Humanoid-v5": Humanoid,
    "HumanoidStandup-v5": HumanoidStandup,
}
