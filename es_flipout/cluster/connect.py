"""The connection to Ray: started here with the cores there are, or joined at an address."""

from __future__ import annotations

import logging
import os
import socket
from typing import Any

from es_flipout.envs.mujoco_cpu import usable_cores
from es_flipout.errors import UserError

_ANSWER_S = 5.0  # to an address where a cluster should be
_OBJECT_STORE_BYTES = 256 << 20  # weights of one generation travel, nothing else


def import_ray() -> Any:
    """The package ``ray``.

    Raises:
        UserError: it is not installed.
    """
    # Ray asks the network for permission to report how it is used, unless told before it is imported.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError as error:
        raise UserError(f"backend ray needs Ray: pip install 'es-flipout[ray]' ({error})") from None
    return ray


class Connection:
    """A Ray that is there; what was started here is ended by :meth:`close`.

    Attributes:
        ray: the package.
        nodes: cores of every node that lends some.
        gpus: of all nodes.
    """

    def __init__(self, address: str | None = None, cores: int | None = None) -> None:
        """Join the cluster at ``address``, or start Ray on this machine; a Ray that this process is connected to is used.

        Args:
            address: ``host:port``, ``ray://host:port`` or ``auto`` (the cluster this machine belongs to).
            cores: of a Ray that is started here; by default all that may be used.

        Raises:
            UserError: Ray is not installed, nobody answers, or the cluster runs other versions.
        """
        self.ray = ray = import_ray()
        self._is_ours = not ray.is_initialized()
        if address is not None:
            _knock(address)
        if self._is_ours:
            quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
            if address is None:
                ray.init(
                    num_cpus=cores or usable_cores(),
                    include_dashboard=False,
                    object_store_memory=_OBJECT_STORE_BYTES,
                    **quiet,
                )
            else:
                try:
                    ray.init(address=address, **quiet)
                except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
                    reason = " ".join(str(error).split())
                    raise UserError(f"cannot join the Ray cluster at {address}: {reason}") from None
        alive = [node for node in ray.nodes() if node["Alive"]]
        cores_of = (int(node["Resources"].get("CPU", 0)) for node in alive)
        self.gpus = sum(int(node["Resources"].get("GPU", 0)) for node in alive)
        self.nodes = [count for count in cores_of if count]  # a head may keep its cores for itself

    @property
    def cores(self) -> int:
        """Cores of all nodes."""
        return sum(self.nodes)

    def close(self) -> None:
        """Disconnect, and end what was started here."""
        if self._is_ours:
            self.ray.shutdown()


def _knock(address: str) -> None:
    """Complain within seconds if nobody is there; Ray itself tries for minutes.

    Raises:
        UserError: the address is malformed, or nobody answers.
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
            f"no Ray cluster answers at {address} ({error}): start one with `ray start --head`, or leave --ray-address out"
        ) from None
