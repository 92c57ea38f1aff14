"""Many simulations of one MuJoCo model in mujoco-warp, with torch views of their fields: :class:`WarpPhysics`."""

# MuJoCo has its names from a compiled module without type stubs
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import mujoco
import torch
import warp as wp
from torch import Tensor

from es_flipout.envs.base import UnsupportedEnvironmentError

# Before mujoco_warp, which may initialize warp: by default that greets on stdout and warns where there is no driver.
if wp.config.log_level == wp.LOG_INFO:
    wp.config.log_level = wp.LOG_ERROR

import mujoco_warp as mjw

from es_flipout.envs.plane_capsule import correct_plane_capsule

correct_plane_capsule()

# The oldest CUDA whose graphs can hold the solver's loop, and the first Linux drivers of the versions that can be needed.
_CUDA_OF_CONDITIONAL_NODES = (12, 4)
_DRIVERS = {(12, 4): 550, (13, 0): 580}


@dataclass(frozen=True)
class Sizes:
    """How much room mujoco-warp is given.

    Attributes:
        contacts: contacts per simulation on average; the room is shared by all simulations.
        constraints: rows of constraints (contacts have several, joint limits one) of a single simulation.
    """

    contacts: int
    constraints: int


# About twice what random and bang-bang controls needed at most over 600 control steps without ends.
SIZES: Mapping[str, Sizes] = {
    "inverted_pendulum.xml": Sizes(4, 8),
    "inverted_double_pendulum.xml": Sizes(4, 8),
    "swimmer.xml": Sizes(4, 8),
    "reacher.xml": Sizes(4, 8),
    "pusher_v5.xml": Sizes(12, 32),
    "half_cheetah.xml": Sizes(12, 48),
    "hopper.xml": Sizes(10, 40),
    "walker2d_v5.xml": Sizes(14, 72),
    "ant.xml": Sizes(12, 56),
    "humanoid.xml": Sizes(24, 96),
    "humanoidstandup.xml": Sizes(40, 160),
}
FOREIGN_MODEL = Sizes(64, 256)


def missing_driver(toolkit: tuple[int, int] | None, driver: tuple[int, int] | None) -> str | None:
    """What is wrong with the NVIDIA driver, in words; None if nothing is.

    Args:
        toolkit: the CUDA version warp was built with; None without CUDA.
        driver: the newest CUDA version the driver supports; None without a driver.
    """
    if toolkit is None:
        return "this build of warp has no CUDA"
    needed = max((toolkit[0], 0), _CUDA_OF_CONDITIONAL_NODES)
    if driver is not None and driver >= needed:
        return None
    name = f" ({_DRIVERS[needed]} or newer)" if needed in _DRIVERS else ""
    found = "there is none" if driver is None else f"this one supports CUDA {driver[0]}.{driver[1]}"
    return f"it needs an NVIDIA driver that supports CUDA {needed[0]}.{needed[1]}{name}; {found}"


class WarpPhysics:
    """``S`` simulations of one model on a CUDA device, or on warp's CPU device for tests.

    On CUDA, :meth:`step` and :meth:`forward` are one captured CUDA graph each, launched on torch's current stream: they
    are ordered with torch's work and nothing waits for the host. (Eagerly, the solver's loop would ask the host after
    every iteration.) While torch captures a graph on that stream, they add their kernels to it instead.

    Attributes:
        views: torch views of the fields by name, ``(S, ...)`` float32; write to them in place only.
    """

    def __init__(
        self,
        model: mujoco.MjModel,
        num_worlds: int,
        device: torch.device,
        *,
        fields: Iterable[str],
        steps: int,
        forces: bool,
        sizes: Sizes,
    ) -> None:
        """Put the model on the device, compile what it needs and bring all simulations to its reference state.

        Args:
            model: the model; its solver becomes Newton if it is PGS, which mujoco-warp does not have.
            num_worlds: ``S``.
            device: a CUDA device, or the CPU.
            fields: names of the ``MjData`` fields to view.
            steps: physics steps of one :meth:`step`.
            forces: compute the contact forces on the bodies (``cfrc_ext``) at the end of :meth:`step`.
            sizes: room for contacts and constraints.

        Raises:
            UnsupportedEnvironmentError: the driver is too old, or the model uses what mujoco-warp does not have.
        """
        wp.init()
        if device.type == "cuda" and (
            fault := missing_driver(wp.get_cuda_toolkit_version(), wp.get_cuda_driver_version())
        ):
            raise UnsupportedEnvironmentError(f"MuJoCo cannot run on {str(device)!r}: {fault}")
        self._device = device
        self._steps, self._forces = steps, forces
        self._warp_device = wp.device_from_torch(device)
        if model.opt.solver == mujoco.mjtSolver.mjSOL_PGS:
            model.opt.solver = mujoco.mjtSolver.mjSOL_NEWTON
        with wp.ScopedDevice(self._warp_device):
            try:
                self._model = mjw.put_model(model)
            except NotImplementedError as error:
                raise UnsupportedEnvironmentError(f"the model cannot run on mujoco-warp: {error}") from error
            self._model.opt.warn_overflow = False  # it would print from the device; see overflow()
            self._data = mjw.make_data(model, num_worlds, nconmax=sizes.contacts, njmax=sizes.constraints)
        self.views: dict[str, Tensor] = {name: wp.to_torch(getattr(self._data, name)) for name in fields}
        self._overflow = wp.to_torch(self._data.overflow)
        self._streams: dict[int, wp.Stream] = {}
        self._graphs: dict[Callable[[], None], wp.Graph | None] = {}
        if device.type == "cuda":
            self._capture()

    def step(self) -> None:
        """Advance all simulations by the control step's physics steps."""
        self._run(self._enqueue_step)

    def forward(self) -> None:
        """Compute the derived fields of all simulations from their state, as ``mj_forward``."""
        self._run(self._enqueue_forward)

    def overflow(self) -> int:
        """The simulations that found no room for a contact or constraint since the last call; waits for the device.

        All simulations share the room for contacts: when it is full, all of them count.
        """
        count = int(self._overflow.count_nonzero())
        self._overflow.zero_()
        return count

    def _enqueue_step(self) -> None:
        for _ in range(self._steps):
            mjw.step(self._model, self._data)
        if self._forces:
            mjw.rne_postconstraint(self._model, self._data)

    def _enqueue_forward(self) -> None:
        mjw.forward(self._model, self._data)

    def _run(self, enqueue: Callable[[], None]) -> None:
        if self._device.type == "cpu":
            with wp.ScopedDevice(self._warp_device):
                enqueue()
            return
        stream = self._stream()
        if not torch.cuda.is_current_stream_capturing():
            graph = self._graphs[enqueue]
            assert graph is not None
            wp.capture_launch(graph, stream=stream)
            return
        # a graph that allocates memory or loops cannot be a part of another, so its kernels are
        with wp.ScopedStream(stream, sync_enter=False), wp.ScopedCapture(stream=stream, external=True):
            enqueue()

    def _stream(self) -> wp.Stream:
        """Torch's current stream, for warp."""
        stream = torch.cuda.current_stream(self._device)
        if stream.cuda_stream not in self._streams:
            self._streams[stream.cuda_stream] = wp.stream_from_torch(stream)
        return self._streams[stream.cuda_stream]

    def _capture(self) -> None:
        """Run everything once, which compiles it, then record the graphs."""
        torch.cuda.synchronize(self._device)
        side = wp.stream_from_torch(torch.cuda.Stream(self._device))
        with wp.ScopedStream(side):
            for enqueue in (self._enqueue_forward, self._enqueue_step):
                enqueue()
                wp.synchronize_stream(side)
                with wp.ScopedCapture(stream=side) as capture:
                    enqueue()
                self._graphs[enqueue] = capture.graph
            mjw.reset_data(self._model, self._data)
        torch.cuda.synchronize(self._device)
