"""Many simulations of one MuJoCo model in mujoco-warp, with torch views of their fields: :class:`WarpPhysics`."""

# MuJoCo's names come from a compiled module without type stubs
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import mujoco
import torch
import warp as wp
from torch import Tensor

from es_flipout.envs.base import UnsupportedEnvironmentError

# Before importing mujoco_warp, which may initialize warp: by default, this prints a banner and warns without a driver.
if wp.config.log_level == wp.LOG_INFO:
    wp.config.log_level = wp.LOG_ERROR

import mujoco_warp as mjw

from es_flipout.envs.plane_capsule import correct_plane_capsule

correct_plane_capsule()

# The oldest CUDA version whose graphs support the solver's loop, and the first Linux drivers of possible versions.
_CUDA_OF_CONDITIONAL_NODES = (12, 4)
_DRIVERS = {(12, 4): 550, (13, 0): 580}


@dataclass(frozen=True)
class Sizes:
    """Sizes of mujoco-warp's arrays.

    Attributes:
        contacts: average number of contacts per simulation; all simulations share the memory.
        constraints: maximum number of constraint rows (several per contact, one per joint limit) of a single
            simulation.
    """

    contacts: int
    constraints: int


# About twice the maximum for random and bang-bang controls over 600 control steps without termination.
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
    """Return the reason why the NVIDIA driver cannot be used; None if it can.

    Args:
        toolkit: the CUDA version that warp was built with; None without CUDA.
        driver: the newest CUDA version that the driver supports; None without a driver.
    """
    if toolkit is None:
        return "this build of warp has no CUDA support"
    needed = max((toolkit[0], 0), _CUDA_OF_CONDITIONAL_NODES)
    if driver is not None and driver >= needed:
        return None
    name = f" ({_DRIVERS[needed]} or newer)" if needed in _DRIVERS else ""
    found = "there is none" if driver is None else f"this one supports CUDA {driver[0]}.{driver[1]}"
    return f"it needs an NVIDIA driver that supports CUDA {needed[0]}.{needed[1]}{name}; {found}"


class WarpPhysics:
    """``S`` simulations of one model on a CUDA device, or on warp's CPU device for tests.

    On CUDA, :meth:`step` and :meth:`forward` are one captured CUDA graph each, launched on torch's current stream. They
    are ordered with torch's work and never synchronize with the host (without a graph, the solver's loop would do so
    after every iteration). While torch captures a graph on that stream, they add their kernels to it instead.

    Attributes:
        views: torch views of the fields by name, ``(S, ...)`` float32; modify in place only.
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
        """Copy the model to the device, compile kernels and set all simulations to the reference state.

        Args:
            model: the model; the PGS solver, which mujoco-warp does not support, is replaced by Newton.
            num_worlds: ``S``.
            device: a CUDA device, or the CPU.
            fields: names of the ``MjData`` fields to view.
            steps: physics steps per :meth:`step`.
            forces: whether to compute the contact forces on the bodies (``cfrc_ext``) at the end of :meth:`step`.
            sizes: maximum numbers of contacts and constraints.

        Raises:
            UnsupportedEnvironmentError: the driver is too old, or mujoco-warp does not support the model.
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
        """Advance all simulations by one control step."""
        self._run(self._enqueue_step)

    def forward(self) -> None:
        """Compute the derived fields of all simulations from their state, like ``mj_forward``."""
        self._run(self._enqueue_forward)

    def overflow(self) -> int:
        """Return the number of simulations that exceeded the sizes since the last call; synchronizes with the device.

        All simulations share the memory for contacts: when it is full, all of them count.
        """
        count = int(self._overflow.count_nonzero())
        self._overflow.zero_()
        return count

    def temporary_bytes(self) -> int:
        """Run a step without a graph, and return the peak of the memory that it allocates meanwhile.

        On CUDA, the graphs keep that memory; they run on one stream, and CUDA lets such graphs share it.
        """
        reports: list[str] = []
        on_cpu = self._device.type == "cpu"
        where = wp.ScopedDevice(self._warp_device) if on_cpu else wp.ScopedStream(self._stream(), sync_enter=False)
        with where, wp.ScopedMemoryTracker(report_func=reports.append):
            self._enqueue_step()
        return _peak_bytes("".join(reports))

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
        # a graph that allocates memory or loops cannot be a child graph, so its kernels are added instead
        with wp.ScopedStream(stream, sync_enter=False), wp.ScopedCapture(stream=stream, external=True):
            enqueue()

    def _stream(self) -> wp.Stream:
        """Return torch's current stream for warp."""
        stream = torch.cuda.current_stream(self._device)
        if stream.cuda_stream not in self._streams:
            self._streams[stream.cuda_stream] = wp.stream_from_torch(stream)
        return self._streams[stream.cuda_stream]

    def _capture(self) -> None:
        """Run everything once, which compiles the kernels, then capture the graphs."""
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


def _peak_bytes(report: str) -> int:
    """Return the peak in a report of ``wp.ScopedMemoryTracker``, rounded as there; 0 if there is none."""
    units = {"B": 1, "KB": 1 << 10, "MB": 1 << 20, "GB": 1 << 30}
    found = re.search(r"Peak usage:\n((?: {4}.*\n)+)", report)
    sizes = re.findall(r"([\d.]+) (B|KB|MB|GB)", found[1]) if found else []
    return sum(round(float(number) * units[unit]) for number, unit in sizes)
