"""``scripts/paper/update_time.py`` on a small scale."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from es_flipout.perturbations import Flipout
from es_flipout.strategy.shaping import centered_ranks
from scripts import report
from scripts.paper import update_time
from scripts.paper._update_methods import (
    CPU_ES,
    FAMILIES,
    FLIPES,
    LEARNING_RATE,
    METHODS,
    SIGMA,
    Flat,
    Independent,
    Task,
    Worker,
    Workers,
)
from scripts.paper._update_report import PAPER, table

FC, CONV = Task("fc", 6, 3, "cpu"), Task("conv", 1 / 16, 3, "cpu")
TASKS = pytest.mark.parametrize("task", [FC, CONV], ids=["fc", "conv"])


def dense_fitness(task: Task, noise: torch.Tensor, channels_last: bool = False) -> torch.Tensor:
    """One sample after the other, each as an ordinary module."""
    x, y = task.images()
    flat = Flat(task.module(), channels_last)
    values = []
    for own in noise:
        weights = {n: w.contiguous() for n, w in flat.split(flat.vector + SIGMA * own).items()}
        values.append(-F.cross_entropy(torch.func.functional_call(task.module(), weights, (x,)), y))
    return torch.stack(values).detach()


@TASKS
@pytest.mark.parametrize("how", ["bmm", "vmap"])
def test_independent_is_one_dense_network_after_the_other(task: Task, how: str) -> None:
    independent = Independent(task, 5, how, 1 << 30)  # type: ignore[arg-type]
    independent.chunk = 2
    noise = torch.cat([independent.noise(start) for start in (0, 2, 4)])
    fitness = torch.cat([independent.fitness(start) for start in (0, 2, 4)])
    torch.testing.assert_close(fitness, dense_fitness(task, noise))
    assert len(set(fitness.tolist())) == 5
    u = centered_ranks(fitness).float()
    torch.testing.assert_close(independent.gradient(u), (u @ noise) / (5 * SIGMA))


@TASKS
def test_workers_make_the_update_of_one_dense_network_after_the_other(task: Task) -> None:
    vector = Flat(task.module(), channels_last=True).vector
    worker = Worker(task, vector, 5)
    noise = torch.stack([worker.noise(0, sample).clone() for sample in range(5)])
    fitness = dense_fitness(task, noise, channels_last=True)
    torch.testing.assert_close(torch.tensor(worker.fitness(0, range(5))), fitness)
    assert not torch.equal(worker.noise(1, 0), noise[0])  # another generation, other noise
    mean = vector.clone().requires_grad_()
    mean.grad = -(centered_ranks(fitness).float() @ noise) / (5 * SIGMA)
    torch.optim.Adam([mean], LEARNING_RATE).step()
    with Workers(task, 5, 2) as workers:
        workers.update()
        torch.testing.assert_close(workers.mean.detach(), mean.detach())
        workers.update()
        assert workers.generation == 2


@TASKS
def test_flat_vector_gives_the_parameters_back(task: Task) -> None:
    module = task.module()
    for channels_last in (False, True):
        flat = Flat(module, channels_last)
        views = flat.split(flat.vector)
        for name, parameter in module.named_parameters():
            assert torch.equal(views[name], parameter)


def test_paper_sizes() -> None:
    flipes = FAMILIES[FLIPES](5000)
    assert isinstance(flipes, Flipout)
    assert (flipes.base, flipes.bases) == ("gaussian", 125)
    assert len(Flat(Task("fc", 512, 1, "cpu").module()).vector) == 669_706
    assert sum(p.numel() for p in Task("conv", 1.0, 1, "cpu").module().parameters() if p.ndim > 1) == 3_273_504
    assert PAPER["fc"][512] == (0.18, 5.10)


def test_table_says_what_was_extrapolated(tmp_path: Path) -> None:
    for method, processes, seconds in ((FLIPES, 1, 0.5), (CPU_ES, 2, 4.0)):
        row = {"network": "fc", "size": 32, "method": method, "samples": 1000, "processes": processes}
        report.append_csv(tmp_path / "runs.csv", [{**row, "round": 0, "seconds": seconds, "commit": "abc"}])
    (tmp_path / "config.json").write_text('{"device": "cpu", "batch": 64, "processes": 2}')
    text = table(tmp_path)
    # 2.5 s against 20 s on 2 cores, which is 1 s on 40: 16 cores do the work of the one.
    assert "| FC 32 | 0.12 s | 0.51 s | 4.2 | 170 | 2.5 s | 20 s | 1 s | 0.4 | 16 |" in text
    assert "FC 32 from 1,000" in text


def test_what_is_wrong_is_one_line(tmp_path: Path) -> None:
    command = [sys.executable, update_time.__file__, "--out", str(tmp_path), "--samples", "1"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stderr == "update_time.py: --samples must be at least 2, got 1\n"


@pytest.mark.slow
def test_quick(tmp_path: Path) -> None:
    subprocess.run([sys.executable, update_time.__file__, "--quick", "--out", str(tmp_path)], check=True)
    names = {"config.json", "environment.json", "figure.png", "runs.csv", "table.md"}
    assert {p.name for p in tmp_path.iterdir()} == names
    with (tmp_path / "runs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {(r["network"], r["method"]) for r in rows} == {(n, m) for n in ("fc", "conv") for m in METHODS}
    assert all(float(r["seconds"]) > 0 for r in rows)
