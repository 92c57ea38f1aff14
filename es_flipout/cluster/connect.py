"""The connection to Ray: started on this machine with all usable cores, or joined at an address."""

from __future__ import annotations

import logging
import os
import socket
from typing import Any

from es_flipout.envs.mujoco_cpu import usable_cores
from es_flipout.errors import UserError

_ANSWER_S = 5.0  # timeout for an answer from the address of a cluster
_OBJECT_STORE_BYTES = 256 << 20  # it only holds the weights and messages of one generation


def import_ray() -> Any:
    """Import and return the package ``ray``.

    Raises:
        UserError: Ray is not installed.
    """
    # Disables usage statistics, for which Ray accesses the network; it must be set before the import.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError as error:
        raise UserError(f"backend ray requires Ray: pip install 'es-flipout[ray]' ({error})") from None
    return ray


class Connection:
    """A connection to Ray; :meth:`close` shuts down Ray if the connection started it.

    Attributes:
        ray: the package ``ray``.
        nodes: number of cores of every node that offers any.
        gpus: number of GPUs of all nodes.
    """

    def __init__(self, address: str | None = None, cores: int | None = None, gpus: int | None = None) -> None:
        """Join the cluster at ``address`` or start Ray on this machine, unless this process is already connected.

        Args:
            address: ``host:port``, ``ray://host:port`` or ``auto`` (the cluster this machine belongs to).
            cores: number of cores if Ray is started here; by default all usable cores.
            gpus: number of GPUs if Ray is started here; by default those of this machine.

        Raises:
            UserError: Ray is not installed or does not start, the address does not answer, or the cluster runs other
                versions.
        """
        self.ray = ray = import_ray()
        self._is_ours = not ray.is_initialized()
        if address is not None:
            _knock(address)
        if self._is_ours:
            quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
            if address is None:
                try:
                    ray.init(
                        num_cpus=cores or usable_cores(),
                        num_gpus=gpus,
                        include_dashboard=False,
                        object_store_memory=_OBJECT_STORE_BYTES,
                        **quiet,
                    )
                except Exception as error:  # Ray has no class of its own for a process that does not start
                    raise UserError(f"Ray does not start on this machine: {' '.join(str(error).split())}") from error
            else:
                try:
                    ray.init(address=address, **quiet)
                except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
                    reason = " ".join(str(error).split())
                    raise UserError(f"cannot join the Ray cluster at {address}: {reason}") from None
        alive = [node for node in ray.nodes() if node["Alive"]]
        cores_of = (int(node["Resources"].get("CPU", 0)) for node in alive)
        self.gpus = sum(int(node["Resources"].get("GPU", 0)) for node in alive)
        self.nodes = [count for count in cores_of if count]  # a head node may offer no cores

    @property
    def cores(self) -> int:
        """Number of cores of all nodes."""
        return sum(self.nodes)

    def close(self) -> None:
        """Disconnect, and shut down Ray if it was started here."""
        if self._is_ours:
            self._is_ours = False
            self.ray.shutdown()


def _knock(address: str) -> None:
    """Check within seconds that something listens at the address; Ray itself retries for minutes.

    Raises:
        UserError: the address is malformed or does not answer.
    """
    if address == "auto":
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"ray-address must be host:port, ray://host:port or auto, got {address!r}")
    try:
        socket.create_connection((host, int(port)), _ANSWER_S).close()
    except (OSError, OverflowError) as error:
        raise UserError(
            f"no Ray cluster answers at {address} ({error}): start one with `ray start --head`, or omit --ray-address"
        ) from None
