"""MuJoCo tasks on an NVIDIA GPU, with physics in mujoco-warp: :class:`MujocoWarpBatchEnv`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import gymnasium
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import override

from es_flipout.envs.base import UnsupportedEnvironmentError
from es_flipout.envs.generators import Rng
from es_flipout.envs.mujoco_cpu import action_space, load_model, model_facts
from es_flipout.envs.mujoco_task import MujocoTask
from es_flipout.envs.mujoco_tasks import MUJOCO_TASKS
from es_flipout.envs.native import NativeBatchEnv, build_task
from es_flipout.envs.warp_physics import FOREIGN_MODEL, SIZES, Sizes, WarpPhysics

_LARGEST = 1e10  # mjMAXVAL: MuJoCo considers larger positions, velocities and controls as bad
_STATE = ("qpos", "qvel", "act", "qacc_warmstart", "time")  # the state of a simulation between steps


class MujocoWarpBatchEnv(NativeBatchEnv):
    """A MuJoCo task in mujoco-warp, from the same definition as on the CPU; float32 throughout, rewards as float64.

    Agrees with Gymnasium up to float32 rounding (which chaotic dynamics amplify); final scores come from the real
    environment. Models with the PGS solver (the humanoids) are solved by Newton's method, which has the same solution.

    :meth:`step` and :meth:`restart_where` never synchronize with the host, and all state keeps its storage. A step has
    three parts, :meth:`begin_step`, :meth:`run_physics` and :meth:`end_step`. The first and the last are torch
    operations, which torch CUDA graphs may contain together with a policy; the middle one is a CUDA graph of warp. The
    safe way is one graph of each per control step, launched alternately on one stream: the solver loops with
    conditional nodes, and recording these ends and resumes torch's capture, after which torch's allocator no longer
    knows that it is capturing. Capturing whole steps works if the graph's memory comes from elsewhere
    (``torch.cuda.use_mem_pool``).

    Four differences from the CPU:

    * the observation space is float32;
    * two runs on a GPU may differ in the last bits: contacts and sums are ordered as threads finish
      (``opt.deterministic`` of mujoco-warp is off, as its price has not been measured);
    * a frozen slot is parked in the model's reference state, so that a fallen body does not use up the contact memory
      that all slots share. Its state is finite, but it must be restarted before it can be live again;
    * a slot whose state or reward becomes non-finite (``diverged``) terminates with reward 0 and immediately goes to
      the reference state, which it also returns.
    """

    def __init__(
        self,
        env_id: str,
        task: MujocoTask,
        num_envs: int,
        kwargs: Mapping[str, object],
        device: torch.device,
        sizes: Sizes | None = None,
    ) -> None:
        """Load the model and create the simulations.

        Args:
            env_id: the Gymnasium id.
            task: the task, already built from ``kwargs``.
            num_envs: ``S``.
            kwargs: the keyword arguments of ``gymnasium.make`` that select this variant.
            device: a CUDA device, or the CPU (slow, for tests).
            sizes: maximum numbers of contacts and constraints; defaults suffice for Gymnasium's models, and are
                generous for others.

        Raises:
            UnsupportedEnvironmentError: the driver is too old, or mujoco-warp does not support the model.
        """
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        self._describe(env_id, kwargs, num_envs, device)
        model = load_model(task.xml_file)
        facts = model_facts(model)
        self._task, self.starts_together = task, task.starts_together
        self._derived = task.derived_fields()
        own_model = task.xml_file == type(task).xml_file
        self._physics = WarpPhysics(
            model,
            num_envs,
            device,
            fields=(*_STATE, "ctrl", *self._derived),
            steps=task.frame_skip,
            forces="cfrc_ext" in self._derived,
            sizes=sizes or (SIZES[task.xml_file] if own_model else FOREIGN_MODEL),
        )
        masses = torch.tensor(facts.body_mass, dtype=torch.float32).to(device)
        self._model = dataclasses.replace(facts, body_mass=masses)
        self._fields = self._physics.views
        self._elapsed = torch.zeros(num_envs, dtype=torch.int64, device=device)
        self._live = torch.ones(num_envs, dtype=torch.bool, device=device)
        self._sound = torch.ones_like(self._live)
        self.diverged = torch.zeros_like(self._live)
        self._physics.forward()
        if "cfrc_ext" in self._derived:
            self._fields["cfrc_ext"].zero_()
        self._reference = {name: view[:1].clone() for name, view in self._fields.items()}
        self._reference_observation = self._observe()[:1].clone()
        self._before = task.before(torch, self._model, self._fields).clone()
        outcome = task.outcome(torch, self._model, self._fields, self._before, self._fields["ctrl"])
        self.terminates = outcome[1] is not None
        observation_shape = self._reference_observation.shape[1:]
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, observation_shape, np.float32)
        self.action_space = action_space(model)
        self.alive_bonus = task.alive_bonus()
        self.backend = "mujoco-warp"

    @override
    def draw_start(self, rng: Rng) -> NDArray[np.float64]:
        return np.concatenate(self._task.start(rng, self._model), axis=-1)

    @override
    def states(self) -> Tensor:
        return torch.cat([self._fields["qpos"], self._fields["qvel"]], 1).double()

    @override
    def restart(self, rows: NDArray[np.intp], starts: NDArray[np.float64]) -> Tensor:
        mask = np.zeros(self.num_envs, np.bool_)
        mask[rows] = True
        every = np.zeros((self.num_envs, self._model.qpos0.size + self._model.nv))
        if len(rows):
            every[rows] = starts
        return self.restart_where(torch.from_numpy(mask).to(self.device), torch.from_numpy(every).to(self.device))

    @override
    def restart_where(self, mask: Tensor, starts: Tensor) -> Tensor:
        fields = self._fields
        qpos, qvel = starts.float().split([self._model.qpos0.size, self._model.nv], 1)
        kept = {name: fields[name].clone() for name in self._derived}
        self._park(mask, (*_STATE, "ctrl", *self._derived))
        _put(fields["qpos"], mask, qpos)
        _put(fields["qvel"], mask, qvel)
        self._elapsed.masked_fill_(mask, 0)
        if kept:
            # the others keep the values of their last step, one substep behind the state, as in Gymnasium
            self._physics.forward()
            for name, values in kept.items():
                _put(fields[name], ~mask, values)
        return self._observe()

    @override
    def step(self, action: Tensor, live: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        self.begin_step(action, live)
        self.run_physics()
        return self.end_step()

    def begin_step(self, action: Tensor, live: Tensor | None = None) -> None:
        """Store the actions and park the frozen slots; the first part of :meth:`step`."""
        controls = self.controls
        if action.shape != controls.shape:
            expected, got = tuple(controls.shape), tuple(action.shape)
            raise ValueError(f"{self.env_id}: actions must have shape {expected}, got {got}")
        action = action.to(self.device, torch.float32)
        if live is None:
            self._live.fill_(True)
        else:
            self._live.copy_(live)
            self._park(~live, _STATE)
        self._before.copy_(self._task.before(torch, self._model, self._fields))
        self._sound.copy_((action.abs() <= _LARGEST).all(1))
        controls.copy_(torch.where((self._sound & self._live)[:, None], action, 0.0))

    @property
    def controls(self) -> Tensor:
        """Controls that the next :meth:`run_physics` applies, ``(S, A)`` float32; modify in place only."""
        return self._fields["ctrl"]

    def run_physics(self) -> None:
        """Run the physics; the second part of :meth:`step`."""
        self._physics.step()

    def end_step(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Compute and return the outcome; the last part of :meth:`step`."""
        fields, live = self._fields, self._live
        observation = self._observe()
        reward, terminated = self._task.outcome(torch, self._model, fields, self._before, fields["ctrl"])
        sound = self._sound & observation.isfinite().all(1) & reward.isfinite()
        for name in ("qpos", "qvel"):
            sound = sound & (fields[name].abs() <= _LARGEST).all(1)
        self.diverged.copy_(live & ~sound)
        self._park(~sound, (*_STATE, "ctrl", *self._derived))
        moved = live & sound
        observation = torch.where(sound[:, None], observation, self._reference_observation)
        reward = torch.where(moved, reward, 0.0).double()
        terminated = self.diverged.clone() if terminated is None else (terminated & moved) | self.diverged
        self._elapsed.add_(live)
        if self.max_episode_steps is None:
            return observation, reward, terminated, torch.zeros_like(live)
        return observation, reward, terminated, (self._elapsed >= self.max_episode_steps) & live

    def overflow(self) -> int:
        """Return the number of slots that exceeded ``sizes`` since the last call; synchronizes with the device.

        They lost contacts or constraints, which changed their motion; increase ``sizes``. All slots share the memory
        for contacts; when it is full, all of them count.
        """
        return self._physics.overflow()

    def temporary_bytes(self) -> int:
        """Return the memory that a step allocates besides the arrays that are stored; this runs a step."""
        return self._physics.temporary_bytes()

    def _observe(self) -> Tensor:
        return self._task.observation(torch, self._model, self._fields)

    def _park(self, mask: Tensor, names: tuple[str, ...]) -> None:
        """Set the named fields of the slots in ``mask`` to the model's reference state."""
        for name in names:
            _put(self._fields[name], mask, self._reference[name])


def _put(field: Tensor, mask: Tensor, values: Tensor) -> None:
    """Write ``values`` (S or 1, ...) to the rows of ``field`` (S, ...) that are in ``mask`` (S,), in place."""
    torch.where(mask.view(-1, *[1] * (field.ndim - 1)), values, field, out=field)


def make_warp_env(env_id: str, num_envs: int, device: str | torch.device, **kwargs: Any) -> MujocoWarpBatchEnv:
    """Create a batch of a MuJoCo task in mujoco-warp, also on the CPU; see :func:`es_flipout.envs.make_env`.

    Raises:
        UnsupportedEnvironmentError: the task or a keyword is not supported, or the task cannot run on the device.
    """
    if env_id not in MUJOCO_TASKS:
        raise UnsupportedEnvironmentError(f"{env_id} is not one of {', '.join(MUJOCO_TASKS)}")
    task = build_task(MUJOCO_TASKS[env_id], env_id, kwargs)
    return MujocoWarpBatchEnv(env_id, task, num_envs, kwargs, torch.device(device))
