"""Machines of a cluster as network namespaces of this one: joined by a switch in a namespace of its own, with Ray on each.

A machine also has a mount namespace, so that Ray's folder of one is not seen by the others. All of it ends with the processes
that hold the namespaces; nothing is sent outside.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from command_line import ROOT

RAY = str(Path(sys.executable).with_name("ray"))
PORT = 6379
_START_S = 180.0  # Ray's start takes some ten seconds on a free machine
# A token that is there for other clusters would be asked for in this one.
_QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


class Namespace:
    """A process that holds a network and a mount namespace."""

    def __init__(self) -> None:
        """Make the namespaces. Raises OSError where the kernel refuses."""
        self.holder = subprocess.Popen(
            ["unshare", "--net", "--mount", "sh", "-c", "echo ready; exec sleep infinity"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.holder.stdout is not None
        if self.holder.stdout.readline() != "ready\n":
            raise OSError(" ".join(self.holder.communicate()[1].split()))

    def command(self, *arguments: str) -> list[str]:
        """Return the command that runs another one inside."""
        return ["nsenter", "--target", str(self.holder.pid), "--net", "--mount", *arguments]

    def do(self, *arguments: str) -> None:
        """Run a command inside. Raises OSError with what it said if it fails."""
        done = subprocess.run(self.command(*arguments), capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise OSError(f"{' '.join(arguments)}: {' '.join(done.stderr.split())}")

    def close(self) -> None:
        """Kill every process inside."""
        mine = os.readlink(f"/proc/{self.holder.pid}/ns/net")
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if os.readlink(folder / "ns" / "net") == mine:
                    os.kill(int(folder.name), signal.SIGKILL)
        self.holder.communicate()


class Machine(Namespace):
    """A machine of the cluster, with Ray."""

    def __init__(self, switch: Namespace, number: int, cores: int) -> None:
        """Join the switch, and start Ray: the machine with number 1 is the head."""
        super().__init__()
        self.address, self.port = f"10.77.0.{number}", f"port{number}"
        try:
            self._join(switch, number, cores)
        except BaseException:
            self.close()
            raise

    def _join(self, switch: Namespace, number: int, cores: int) -> None:
        Path("/tmp/ray").mkdir(exist_ok=True)
        self.do("mount", "-t", "tmpfs", "tmpfs", "/tmp/ray")
        switch.do(*f"ip link add {self.port} type veth peer name eth0 netns {self.holder.pid}".split())
        switch.do(*f"ip link set {self.port} master switch up".split())
        for line in ("link set lo up", "link set eth0 up", f"address add {self.address}/24 dev eth0"):
            self.do("ip", *line.split())
        where = (
            ["--head", f"--port={PORT}", "--include-dashboard=false"]
            if number == 1
            else [f"--address=10.77.0.1:{PORT}"]
        )
        more = [f"--num-cpus={cores}", f"--node-ip-address={self.address}", f"--object-store-memory={100 << 20}"]
        done = subprocess.run(
            self.command(RAY, "start", *where, *more, "--disable-usage-stats"),
            env={**os.environ, **_QUIET},
            capture_output=True,
            text=True,
            timeout=_START_S,
            check=False,
        )
        if done.returncode != 0:
            raise RuntimeError(done.stdout + done.stderr)


class Cluster:
    """Machines at a switch.

    Attributes:
        machines: by number; 1 is the head, on which commands run.
    """

    def __init__(self) -> None:
        """Make the switch. Raises OSError where the kernel refuses."""
        self.switch = Namespace()
        self.machines: dict[int, Machine] = {}
        self.switch.do("ip", "link", "add", "switch", "type", "bridge")
        self.switch.do("ip", "link", "set", "switch", "up")

    def add(self, number: int, cores: int) -> None:
        """Start a machine."""
        self.machines[number] = Machine(self.switch, number, cores)

    def kill(self, number: int) -> None:
        """Kill all processes of a machine."""
        self.machines.pop(number).close()

    def link(self, number: int, up: bool) -> None:
        """Cut a machine off, or connect it again."""
        self.switch.do("ip", "link", "set", self.machines[number].port, "up" if up else "down")

    def start(self, folder: Path, *arguments: str) -> subprocess.Popen[str]:
        """Start the command line on the head."""
        return subprocess.Popen(
            self.machines[1].command(
                "sh", "-c", 'cd "$0" && exec "$@"', str(folder), sys.executable, "-m", "es_flipout", *arguments
            ),
            env={**os.environ, **_QUIET},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def close(self) -> None:
        """End all machines and the switch."""
        for number in list(self.machines):
            self.kill(number)
        self.switch.close()


@contextlib.contextmanager
def cluster_of(*cores: int) -> Iterator[Cluster]:
    """Make a cluster of machines with so many cores each. Raises OSError where the kernel refuses namespaces."""
    cluster = Cluster()
    try:
        for number, count in enumerate(cores, start=1):
            cluster.add(number, count)
        yield cluster
    finally:
        cluster.close()


def wait_for(condition: object, process: subprocess.Popen[str], seconds: float = 300.0) -> None:
    """Wait until a condition holds; fail if the process ends before, or if it takes too long."""
    assert callable(condition)
    until = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until, "waited too long"
        time.sleep(0.1)
