"""A batch of simulations that also computes the contact forces on the bodies (``cfrc_ext``) after each step.

Gymnasium calls ``mj_rnePostConstraint`` after ``mj_step``. ``mujoco.batch.Batch`` cannot do that, but MuJoCo's C
interface (``mujoco/mjbatch.h``) can, which this module uses through ctypes.
"""

# MuJoCo's names come from a compiled module without type stubs
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import ctypes
import functools
import weakref
from pathlib import Path

import mujoco
import numpy as np
from mujoco.batch import SimulationError
from numpy.typing import NDArray

_STAGE_NONE = int(mujoco.mjtStage.mjSTAGE_NONE)
_STAGE_ACC = int(mujoco.mjtStage.mjSTAGE_ACC)
_STATE = {
    "qpos": mujoco.mjtState.mjSTATE_QPOS,
    "qvel": mujoco.mjtState.mjSTATE_QVEL,
    "ctrl": mujoco.mjtState.mjSTATE_CTRL,
}
_DOUBLES = ctypes.POINTER(ctypes.c_double)
_INTS = ctypes.POINTER(ctypes.c_int)


class _BatchConfig(ctypes.Structure):
    """The C struct ``mjBatchConfig``."""

    _fields_ = (("nthread", ctypes.c_int), ("persistent", ctypes.c_bool))


@functools.cache
def _library() -> ctypes.CDLL:
    """Return the MuJoCo library that the Python package has already loaded, with the signatures used here."""
    path = next(Path(mujoco.__file__).parent.glob("libmujoco*"))
    library = ctypes.CDLL(str(path))
    batch, ids, count = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int
    signatures = {
        "mjb_makeBatch": (batch, [ctypes.c_void_p, count, ctypes.POINTER(_BatchConfig), ctypes.c_char_p, count]),
        "mjb_deleteBatch": (None, [batch]),
        "mjb_nstate": (count, [batch]),
        "mjb_stateComponent": (_DOUBLES, [batch, count, _INTS]),
        "mjb_warning": (_INTS, [batch]),
        "mjb_status": (_INTS, [batch]),
        "mjb_error": (ctypes.c_char_p, [batch, count]),
        "mjb_output": (_DOUBLES, [batch, ctypes.c_char_p, _INTS, _INTS]),
        "mjb_step": (count, [batch, ids, count, count, count]),
        "mjb_forward": (count, [batch, ids, count, count]),
        "mjb_reset": (count, [batch, ids, count, ctypes.c_void_p, count]),
        "mjb_apply": (count, [batch, ids, count, ctypes.c_void_p, ctypes.c_void_p, count]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


class ContactForceBatch:
    """The part of ``mujoco.batch.Batch`` that the environments use, with up-to-date ``cfrc_ext`` after a step.

    Keeps one ``MjData`` per simulation, because the forces are computed from the data that a step leaves in it.

    Attributes:
        warning: ``(nsim, mjNWARNING, 2)`` int32, MuJoCo's warning counters (last info, count).
    """

    def __init__(self, model: mujoco.MjModel, nsim: int, nthread: int) -> None:
        self._library = _library()
        self._model = model
        self._nsim = nsim
        error = ctypes.create_string_buffer(1000)
        config = _BatchConfig(nthread, True)
        address = ctypes.c_void_p(model._address)  # the only access to the C struct
        self._batch = self._library.mjb_makeBatch(address, nsim, ctypes.byref(config), error, len(error))
        if not self._batch:
            raise RuntimeError(error.value.decode())
        weakref.finalize(self, self._library.mjb_deleteBatch, self._batch)
        self._rne_post_constraint = ctypes.cast(self._library.mj_rnePostConstraint, ctypes.c_void_p)
        shape = (nsim, int(mujoco.mjtWarning.mjNWARNING), 2)
        self.warning = np.ctypeslib.as_array(self._library.mjb_warning(self._batch), shape)

    def bind(self, name: str) -> NDArray[np.float64]:
        """Return a ``(nsim, ...)`` view of an ``MjData`` field; it must not outlive the batch."""
        size = ctypes.c_int()
        if name in _STATE:
            nstate = self._library.mjb_nstate(self._batch)
            first = self._library.mjb_stateComponent(self._batch, int(_STATE[name]), ctypes.byref(size))
            # the last row ends with this component, even if other components follow it
            whole = np.ctypeslib.as_array(first, ((self._nsim - 1) * nstate + size.value,))
            strides = (nstate * whole.itemsize, whole.itemsize)
            return np.lib.stride_tricks.as_strided(whole, (self._nsim, size.value), strides)
        address = self._library.mjb_output(self._batch, name.encode(), ctypes.byref(size), None)
        shape = getattr(mujoco.MjData(self._model), name).shape
        return np.ctypeslib.as_array(address, (self._nsim, *shape))

    def step(self, ids: NDArray[np.generic] | None = None, nstep: int = 1) -> None:
        """Advance by ``nstep`` calls of ``mj_step``, then compute the contact forces on the bodies.

        Args:
            ids: a boolean mask or ascending indices of the simulations, ``None`` for all.
            nstep: the number of physics steps.
        """
        chosen, pointer, count = self._chosen(ids)
        self._check(chosen, self._library.mjb_step(self._batch, pointer, count, nstep, _STAGE_NONE))
        # mj_rnePostConstraint(m, d) is called as func(m, d, sim, arg): C functions ignore surplus arguments
        function = self._rne_post_constraint
        self._check(chosen, self._library.mjb_apply(self._batch, pointer, count, function, None, 0))
        # computes nothing, but copies the output fields
        self._check(chosen, self._library.mjb_forward(self._batch, pointer, count, _STAGE_NONE))

    def forward(self, ids: NDArray[np.generic] | None = None) -> None:
        """Call ``mj_forward``."""
        chosen, pointer, count = self._chosen(ids)
        self._check(chosen, self._library.mjb_forward(self._batch, pointer, count, _STAGE_ACC))

    def reset(self, ids: NDArray[np.generic] | None = None, stage: int = _STAGE_ACC) -> None:
        """Call ``mj_resetData``, then compute the stages up to ``stage``."""
        chosen, pointer, count = self._chosen(ids)
        self._check(chosen, self._library.mjb_reset(self._batch, pointer, count, None, stage))

    def _chosen(self, ids: NDArray[np.generic] | None) -> tuple[NDArray[np.int32], int | None, int]:
        """Return the selected simulations for the C interface: indices (kept alive by the caller), address, count."""
        if ids is None:
            return np.arange(self._nsim, dtype=np.int32), None, 0
        indices = np.flatnonzero(ids) if ids.dtype == np.bool_ else ids
        indices = np.ascontiguousarray(indices, np.int32)
        return indices, indices.ctypes.data, len(indices)

    def _check(self, chosen: NDArray[np.int32], failures: int) -> None:
        if failures:
            status = np.ctypeslib.as_array(self._library.mjb_status(self._batch), (self._nsim,))
            failed = chosen[status[chosen] != 0]
            message = self._library.mjb_error(self._batch, int(failed[0])).decode()
            raise SimulationError(failed, message, len(chosen))
