"""What a MuJoCo task is: start, observation, reward and end, written once over any array namespace.

The functions take ``xp``, an array namespace (``numpy`` or ``torch``), and the simulation's fields with the slots in
front: ``qpos`` is ``(S, nq)``, ``xpos`` is ``(S, nbody, 3)``. The order of the operations is Gymnasium's, so that with
``numpy`` the results are the same to the bit. Derived fields (``xpos``, ``cvel``, ...) are read as ``mj_step`` leaves
them, one substep behind the state; that too is what Gymnasium reads.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

Array = Any  # an array of the namespace in use
Namespace = Any  # numpy or torch
Fields = Mapping[str, Array]  # MjData fields by name, (S, ...)
Start = tuple[NDArray[np.float64], NDArray[np.float64]]  # qpos (nq,), qvel (nv,)


@dataclass(frozen=True)
class ModelFacts:
    """What the tasks need to know of the compiled model.

    Attributes:
        timestep: of one physics step, in seconds.
        qpos0: ``(nq,)`` the model's reference configuration, in NumPy.
        nv: the number of degrees of freedom.
        body_mass: ``(nbody,)``, in the array namespace of the fields.
        body_ids: body index by name.
    """

    timestep: float
    qpos0: NDArray[np.float64]
    nv: int
    body_mass: Array
    body_ids: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class MujocoTask(ABC):
    """One task; its dataclass fields are Gymnasium's keyword arguments with Gymnasium's defaults."""

    islands_matter: ClassVar[bool] = False  # whether solving all constraints as one block changes the last bits
    xml_file: str = ""
    frame_skip: int = 1

    def derived_fields(self) -> tuple[str, ...]:
        """The MjData fields, beyond ``qpos``, ``qvel`` and ``ctrl``, that the other methods read."""
        return ()

    def alive_bonus(self) -> float:
        """The part of every step's reward that is paid for merely not having ended."""
        return 0.0

    @abstractmethod
    def start(self, rng: np.random.Generator, model: ModelFacts) -> Start:
        """Draw the state in which an episode starts."""

    def before(self, xp: Namespace, model: ModelFacts, d: Fields) -> Array:
        """What :meth:`outcome` must know of the state before the step, ``(S,)``; the caller keeps a copy of it."""
        del xp, model
        return d["qpos"][:, 0]

    @abstractmethod
    def observation(self, xp: Namespace, model: ModelFacts, d: Fields) -> Array:
        """The observation, ``(S, O)``."""

    @abstractmethod
    def outcome(
        self, xp: Namespace, model: ModelFacts, d: Fields, before: Array, action: Array
    ) -> tuple[Array, Array | None]:
        """Reward ``(S,)`` and terminated ``(S,)`` (``None``: never) of the step that led to ``d``.

        Args:
            xp: the array namespace.
            model: facts of the model.
            d: the fields after the step.
            before: what :meth:`before` gave before the step.
            action: ``(S, A)`` in the policy's own dtype; Gymnasium squares it in that dtype.
        """

    def velocity(self, model: ModelFacts, before: Array, after: Array) -> Array:
        """Mean velocity over the control step, ``(S,)``."""
        return (after - before) / (model.timestep * self.frame_skip)


@dataclass(frozen=True, kw_only=True)
class NoisyStart(MujocoTask):
    """Starts from the model's reference state with noise on every coordinate."""

    normal_velocity: ClassVar[bool] = False
    reset_noise_scale: float = 0.1

    @override
    def start(self, rng: np.random.Generator, model: ModelFacts) -> Start:
        scale = self.reset_noise_scale
        qpos = model.qpos0 + rng.uniform(low=-scale, high=scale, size=model.qpos0.size)
        if self.normal_velocity:
            return qpos, scale * rng.standard_normal(model.nv)
        return qpos, rng.uniform(low=-scale, high=scale, size=model.nv)


def sum_of_squares(xp: Namespace, rows: Array) -> Array:
    """Sum of squares of each row: ``(S, N)`` to ``(S,)``."""
    return xp.square(rows).sum(1)


def between(values: Array, bounds: tuple[float, float]) -> Array:
    """Where values lie strictly within the bounds."""
    return (bounds[0] < values) & (values < bounds[1])


def flat(values: Array) -> Array:
    """``(S, ...)`` to ``(S, N)``."""
    return values.reshape(values.shape[0], -1)


def norm(xp: Namespace, vectors: Array) -> Array:
    """Euclidean norm of each row, ``(S, N)`` to ``(S,)``, by the dot product as NumPy's norm of one vector."""
    return xp.sqrt(xp.linalg.vecdot(vectors, vectors))
