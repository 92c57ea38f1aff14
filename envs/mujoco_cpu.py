"""MuJoCo tasks on the CPU, with physics in MuJoCo's own thread pool: :class:`MujocoBatchEnv`."""

# MuJoCo's names come from a compiled module without type stubs
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import math
import os
from collections.abc import Mapping

import gymnasium
import mujoco
import numpy as np
import torch
from gymnasium.envs.mujoco.mujoco_env import expand_model_path
from mujoco.batch import Batch, SimulationError
from numpy.typing import NDArray
from torch import Tensor

from es_flipout.envs.base import EnvironmentFailureError
from es_flipout.envs.generators import Rng
from es_flipout.envs.mujoco_contact import ContactForceBatch
from es_flipout.envs.mujoco_task import ModelFacts, MujocoTask
from es_flipout.envs.native import ArrayOutcome, NativeBatchEnv

_BAD_STATE = slice(int(mujoco.mjtWarning.mjWARN_BADQPOS), int(mujoco.mjtWarning.mjWARN_BADCTRL) + 1)
_STAGE_NONE = int(mujoco.mjtStage.mjSTAGE_NONE)


def usable_cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def load_model(xml_file: str) -> mujoco.MjModel:
    """Load a model as Gymnasium does; a plain file name refers to Gymnasium's assets.

    MuJoCo writes warnings to stderr and to a file in the working directory. The relevant ones (non-finite states) are
    reported as ``diverged``, so warnings are silenced for this process, unless it has its own handler.
    """
    if mujoco.get_mju_user_warning() is None:
        mujoco.set_mju_user_warning(_ignore_warning)
    return mujoco.MjModel.from_xml_path(expand_model_path(xml_file))


def _ignore_warning(message: str) -> None:
    del message


def model_facts(model: mujoco.MjModel) -> ModelFacts:
    """Return what the tasks need to know about ``model``, as NumPy arrays."""
    body_ids = {model.body(index).name: index for index in range(model.nbody)}
    return ModelFacts(model.opt.timestep, model.qpos0.copy(), model.nv, model.body_mass.copy(), body_ids)


def action_space(model: mujoco.MjModel) -> gymnasium.spaces.Box:
    """Return the action space of Gymnasium, from the control ranges of the actuators."""
    low, high = model.actuator_ctrlrange.astype(np.float32).T
    return gymnasium.spaces.Box(low, high, dtype=np.float32)


class MujocoBatchEnv(NativeBatchEnv):
    """A MuJoCo task on the CPU, bitwise identical to Gymnasium's.

    A slot whose state or reward becomes non-finite (MuJoCo counts a warning and resets it) terminates with reward 0 and
    returns the model's reference state until it is reset. The tensors that :meth:`step` and :meth:`reset` return are
    never overwritten.

    Attributes:
        batch: the simulations, for example to measure bare physics.
        frame_skip: physics steps per control step.
    """

    def __init__(
        self,
        env_id: str,
        task: MujocoTask,
        num_envs: int,
        kwargs: Mapping[str, object],
        threads: int | None = None,
    ) -> None:
        """Load the model and create the simulations.

        Args:
            env_id: the Gymnasium id.
            task: the task, already built from ``kwargs``.
            num_envs: ``S``.
            kwargs: the keyword arguments of ``gymnasium.make`` that select this variant.
            threads: physics threads, by default one per usable core; results do not depend on it.
        """
        self._describe(env_id, kwargs, num_envs, torch.device("cpu"))
        model = load_model(task.xml_file)
        if not task.islands_matter and task.xml_file == type(task).xml_file:
            # solve all constraints as one block instead of one per island: same result, and faster for small models
            model.opt.disableflags |= int(mujoco.mjtDisableBit.mjDSBL_ISLAND)
        threads = min(threads or usable_cores(), num_envs)
        derived = task.derived_fields()
        batch_class = ContactForceBatch if "cfrc_ext" in derived else Batch
        self.batch = batch_class(model, num_envs, nthread=threads)
        self._task, self.frame_skip, self.starts_together = task, task.frame_skip, task.starts_together
        self._model = model_facts(model)
        self._fields: dict[str, NDArray[np.float64]] = {
            name: self.batch.bind(name) for name in ("qpos", "qvel", "ctrl", *derived)
        }
        self._elapsed = np.zeros(num_envs, np.int64)
        self._steps_left = 0  # no slot reaches the time limit before so many steps
        self._no_slot = torch.zeros(num_envs, dtype=torch.bool)
        self.batch.reset()
        observation_shape = self._observe().shape[1:]
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, observation_shape, np.float64)
        self.action_space = action_space(model)
        self.alive_bonus = task.alive_bonus()
        before = task.before(np, self._model, self._fields)
        self.terminates = task.outcome(np, self._model, self._fields, before, self._fields["ctrl"])[1] is not None
        self.backend = "mujoco"
        self.diverged = self._no_slot

    def draw_start(self, rng: Rng) -> NDArray[np.float64]:
        """See :meth:`NativeBatchEnv.draw_start`; positions, then velocities."""
        return np.concatenate(self._task.start(rng, self._model), axis=-1)

    def states(self) -> Tensor:
        """See :meth:`NativeBatchEnv.states`."""
        return torch.from_numpy(np.concatenate([self._fields["qpos"], self._fields["qvel"]], axis=1))

    def restart(self, rows: NDArray[np.intp], starts: NDArray[np.float64]) -> Tensor:
        """See :meth:`NativeBatchEnv.restart`."""
        if len(rows):
            qpos, qvel = np.split(starts, [self._model.qpos0.size], axis=1)
            self.batch.reset(rows, stage=_STAGE_NONE)
            self._fields["qpos"][rows] = qpos
            self._fields["qvel"][rows] = qvel
            self.batch.forward(rows)
            self._elapsed[rows] = 0
            if self.max_episode_steps is not None:
                self._steps_left = self.max_episode_steps - int(self._elapsed.max())
        return torch.from_numpy(self._observe())

    def step(self, action: Tensor, live: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See :meth:`BatchEnv.step`."""
        observation, reward, *ends = self.step_arrays(action, live)
        terminated, truncated = (np.zeros(self.num_envs, np.bool_) if end is None else end for end in ends)
        return observation, torch.from_numpy(reward), torch.from_numpy(terminated), torch.from_numpy(truncated)

    @np.errstate(over="ignore", invalid="ignore")
    def step_arrays(self, action: Tensor, live: Tensor | None = None) -> ArrayOutcome:
        """See :meth:`SteppedInArrays.step_arrays`."""
        task, model, fields = self._task, self._model, self._fields
        mask = None if live is None else live.numpy()
        frozen = None if mask is None or mask.all() else ~mask
        actions = self._actions(action)
        before = task.before(np, model, fields).copy()
        fields["ctrl"][...] = actions
        try:
            self.batch.step(None if frozen is None else mask, nstep=self.frame_skip)
        except SimulationError as error:
            raise EnvironmentFailureError(f"{self.env_id}: {error}") from error
        observation = self._observe()
        reward, terminated = task.outcome(np, model, fields, before, actions)
        if frozen is not None:
            reward[frozen] = 0.0
            if terminated is not None:
                terminated[frozen] = False
        # the sum reveals whether any number in the batch is non-finite
        total = np.add.reduce(observation, axis=None) + np.add.reduce(reward)
        if np.count_nonzero(self.batch.warning) or not math.isfinite(total):
            if terminated is None:
                terminated = np.zeros(self.num_envs, np.bool_)
            observation = self._contain(observation, reward, terminated, frozen)
        else:
            self.diverged = self._no_slot
        return torch.from_numpy(observation), reward, terminated, self._count_step(frozen)

    def _actions(self, action: Tensor) -> NDArray[np.floating]:
        """Convert actions to NumPy, in their own dtype if NumPy and Gymnasium support it."""
        if action.shape != self._fields["ctrl"].shape:
            expected = self._fields["ctrl"].shape
            raise ValueError(f"{self.env_id}: actions must have shape {expected}, got {tuple(action.shape)}")
        if action.dtype not in (torch.float32, torch.float64):
            action = action.float()
        return action.numpy(force=action.requires_grad or action.device.type != "cpu")

    def _observe(self) -> NDArray[np.float64]:
        return self._task.observation(np, self._model, self._fields)

    def _count_step(self, frozen: NDArray[np.bool_] | None) -> NDArray[np.bool_] | None:
        """Count a step of the slots that are not frozen, and return those that reached the time limit; None for none."""
        self._elapsed += 1 if frozen is None else ~frozen
        self._steps_left -= 1
        if self.max_episode_steps is None or self._steps_left > 0:
            return None
        truncated = self._elapsed >= self.max_episode_steps
        if frozen is not None:
            truncated[frozen] = False
        return truncated

    def _contain(
        self,
        observation: NDArray[np.float64],
        reward: NDArray[np.float64],
        terminated: NDArray[np.bool_],
        frozen: NDArray[np.bool_] | None,
    ) -> NDArray[np.float64]:
        """End slots that are non-finite or were reset by MuJoCo: update flags and rewards, return new observations."""
        warned = self.batch.warning[:, _BAD_STATE, 1].any(1)
        bad = warned | ~np.isfinite(observation).all(1) | ~np.isfinite(reward)
        if frozen is not None:
            bad &= ~frozen
        self.diverged = torch.from_numpy(bad)
        self.batch.reset(np.flatnonzero(bad))
        reward[bad] = 0.0
        terminated[bad] = True
        return self._observe()
