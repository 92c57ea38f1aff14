"""The definition of a MuJoCo task: start, observation, reward and termination, written once for any array namespace.

The functions take ``xp``, an array namespace (``numpy`` or ``torch``), and the fields of the simulations, whose first
dimension is the slot: ``qpos`` is ``(S, nq)``, ``xpos`` is ``(S, nbody, 3)``. The order of operations is Gymnasium's,
so with ``numpy`` the results are bitwise identical. Derived fields (``xpos``, ``cvel``, ...) are read as ``mj_step``
leaves them, one substep behind the state, as in Gymnasium.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from es_flipout.envs.generators import Rng

Array = Any  # an array of the namespace in use
Namespace = Any  # numpy or torch
Fields = Mapping[str, Array]  # MjData fields by name, (S, ...)
Start = tuple[NDArray[np.float64], NDArray[np.float64]]  # qpos (nq,), qvel (nv,)


@dataclass(frozen=True)
class ModelFacts:
    """What the tasks need to know about the compiled model.

    Attributes:
        timestep: duration of one physics step, in seconds.
        qpos0: ``(nq,)``, the model's reference configuration, in NumPy.
        nv: number of degrees of freedom.
        body_mass: ``(nbody,)``, in the array namespace of the fields.
        body_ids: body indices by name.
    """

    timestep: float
    qpos0: NDArray[np.float64]
    nv: int
    body_mass: Array
    body_ids: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class MujocoTask(ABC):
    """A task; its dataclass fields are Gymnasium's keyword arguments with Gymnasium's defaults."""

    starts_together: ClassVar[bool] = False  # whether start() also takes the generators of many starts
    islands_matter: ClassVar[bool] = False  # whether solving all constraints as one block changes the last bits
    xml_file: str = ""
    frame_skip: int = 1

    def derived_fields(self) -> tuple[str, ...]:
        """Return the MjData fields, in addition to ``qpos``, ``qvel`` and ``ctrl``, that the other methods read."""
        return ()

    def alive_bonus(self) -> float:
        """Return the part of the reward of every step that is given for being alive."""
        return 0.0

    @abstractmethod
    def start(self, rng: Any, model: ModelFacts) -> Start:
        """Draw the start state of an episode."""

    def before(self, xp: Namespace, model: ModelFacts, d: Fields) -> Array:
        """Return what :meth:`outcome` needs to know about the state before the step, ``(S,)``; the caller copies it."""
        del xp, model
        return d["qpos"][:, 0]

    @abstractmethod
    def observation(self, xp: Namespace, model: ModelFacts, d: Fields) -> Array:
        """Compute the observation, ``(S, O)``."""

    @abstractmethod
    def outcome(
        self, xp: Namespace, model: ModelFacts, d: Fields, before: Array, action: Array
    ) -> tuple[Array, Array | None]:
        """Compute reward ``(S,)`` and terminated ``(S,)`` (``None`` if never) of the step that led to ``d``.

        Args:
            xp: the array namespace.
            model: facts about the model.
            d: the fields after the step.
            before: the result of :meth:`before`, from before the step.
            action: ``(S, A)`` in the policy's dtype, in which Gymnasium squares it.
        """

    def velocity(self, model: ModelFacts, before: Array, after: Array) -> Array:
        """Compute the mean velocity over the control step, ``(S,)``."""
        return (after - before) / (model.timestep * self.frame_skip)


@dataclass(frozen=True, kw_only=True)
class NoisyStart(MujocoTask):
    """Starts from the model's reference state with noise on every coordinate."""

    starts_together: ClassVar[bool] = True
    normal_velocity: ClassVar[bool] = False
    reset_noise_scale: float = 0.1

    @override
    def start(self, rng: Rng, model: ModelFacts) -> Start:
        scale = self.reset_noise_scale
        qpos = model.qpos0 + rng.uniform(low=-scale, high=scale, size=model.qpos0.size)
        if self.normal_velocity:
            return qpos, scale * rng.standard_normal(model.nv)
        return qpos, rng.uniform(low=-scale, high=scale, size=model.nv)


def sum_of_squares(xp: Namespace, rows: Array) -> Array:
    """Compute the sum of squares of each row: ``(S, N)`` to ``(S,)``."""
    return xp.square(rows).sum(1)


def between(values: Array, bounds: tuple[float, float]) -> Array:
    """Return where values are strictly within the bounds."""
    return (bounds[0] < values) & (values < bounds[1])


def flat(values: Array) -> Array:
    """Flatten ``(S, ...)`` to ``(S, N)``."""
    return values.reshape(values.shape[0], -1)


def norm(xp: Namespace, vectors: Array) -> Array:
    """Compute the Euclidean norm of each row, ``(S, N)`` to ``(S,)``, by a dot product like NumPy for vectors."""
    return xp.sqrt(xp.linalg.vecdot(vectors, vectors))
