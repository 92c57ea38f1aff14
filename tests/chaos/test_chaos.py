"""Killed, signalled and contested runs end like undisturbed ones; ``make chaos`` does this for as long as one likes."""

from pathlib import Path

import pytest

from scripts.checks import chaos


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_a_disturbed_run(tmp_path: Path, seed: int) -> None:
    counts = chaos.Counts()
    chaos.one_run(tmp_path, seed, counts)
    assert counts.runs == 1
    assert not counts.problems
    assert sum(counts.events.values()) > 0


def test_a_difference_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(chaos.TASKS, "CartPole-v1", ("--generations", "3", "--seed", "1"))
    for name, more in {"one": (), "same": (), "other": ("--learning-rate", "0.06")}.items():
        folder = tmp_path / name
        folder.mkdir()
        process = chaos.start(folder, *chaos.command(folder, "CartPole-v1", 1), *more)
        process.communicate(timeout=100)
        assert process.returncode == 0
    assert chaos.difference(tmp_path / "same" / "run", tmp_path / "one" / "run") is None
    assert chaos.difference(tmp_path / "other" / "run", tmp_path / "one" / "run") is not None
