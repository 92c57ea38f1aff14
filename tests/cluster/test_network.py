"""A cluster of several machines, which are network namespaces of this one: the bits are those of one process without Ray."""

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from namespaces import PORT, Cluster, cluster_of, wait_for

from scripts.checks import chaos

pytestmark = pytest.mark.slow
LONGEST_S = 900.0
GENERATIONS = 300
RUN = [
    *("train", "CartPole-v1", "--population-size", "128", "--hidden", "8", "--env-kwargs", '{"max_episode_steps": 40}'),
    *("--env-steps", "None", "--checkpoint-every", "5", "--evaluation-episodes", "3", "--run-dir", "run"),
]


@pytest.fixture
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """A head without workers, and machines with one core each, whose number is the parameter."""
    try:
        made = cluster_of(0, *[1] * request.param)
        with made as running:
            yield running
    except OSError as refused:
        pytest.skip(f"the kernel refuses a network of namespaces: {refused}")


def begin(cluster: Cluster, folder: Path, workers: int, generations: int = GENERATIONS) -> subprocess.Popen[str]:
    """Start training on the head, with as many workers as there are machines."""
    where = ("--backend", "ray", "--ray-address", f"10.77.0.1:{PORT}", "--workers", str(workers))
    return cluster.start(folder, *RUN, *where, "--generations", str(generations))


def after(process: subprocess.Popen[str], folder: Path, generations: int) -> None:
    """Wait until a run has done some generations."""
    metrics = folder / "run" / "metrics.csv"
    wait_for(lambda: metrics.exists() and chaos.rows_of(metrics) >= generations, process)


def ends_like_one_process(process: subprocess.Popen[str], folder: Path, generations: int = GENERATIONS) -> None:
    """Wait for the end of a run, and compare it with one of a process without Ray."""
    whole = folder / "whole"
    whole.mkdir()
    alone = chaos.start(whole, *RUN, "--generations", str(generations))
    assert (alone.communicate(timeout=LONGEST_S), alone.returncode)[1] == 0
    said = process.communicate(timeout=LONGEST_S)
    assert process.returncode == 0, said
    assert chaos.difference(folder / "run", whole / "run") is None


@pytest.mark.parametrize("cluster", [2, 4], indirect=True)
def test_machines(cluster: Cluster, tmp_path: Path) -> None:
    workers = len(cluster.machines) - 1
    ends_like_one_process(begin(cluster, tmp_path, workers, 20), tmp_path, 20)


@pytest.mark.parametrize("cluster", [2], indirect=True)
def test_a_machine_that_is_killed_and_one_that_joins(cluster: Cluster, tmp_path: Path) -> None:
    process = begin(cluster, tmp_path, 2)
    after(process, tmp_path, 10)
    cluster.kill(3)
    cluster.add(4, cores=1)
    after(process, tmp_path, 20)
    ends_like_one_process(process, tmp_path)


@pytest.mark.parametrize("cluster", [2], indirect=True)
def test_a_link_that_is_cut(cluster: Cluster, tmp_path: Path) -> None:
    process = begin(cluster, tmp_path, 2)
    after(process, tmp_path, 10)
    cluster.link(3, up=False)
    time.sleep(30)
    cluster.link(3, up=True)
    after(process, tmp_path, 20)
    ends_like_one_process(process, tmp_path)


@pytest.mark.parametrize("cluster", [2], indirect=True)
def test_a_slow_link_that_loses_packets(cluster: Cluster, tmp_path: Path) -> None:
    for number in (2, 3):
        try:
            slow = ("root", "netem", "delay", "20ms", "loss", "1%")
            cluster.machines[number].do("tc", "qdisc", "add", "dev", "eth0", *slow)
        except OSError as refused:
            pytest.skip(f"the kernel cannot delay packets: {refused}")
    ends_like_one_process(begin(cluster, tmp_path, 2, 20), tmp_path, 20)
