"""``metrics.csv`` keeps its columns and drops rows that a resume undoes; the terminal shows progress and messages."""

import csv
import dataclasses
import io
import math
import re
from pathlib import Path

import pytest
from rich.console import Console

from es_flipout.training import metrics as metrics_module
from es_flipout.training.metrics import COLUMNS, EpisodeBar, Metrics, MetricsLog, TerminalReporter

CONTRACT = ("generation", "env_steps", "env_steps_per_s", "wall_s", "mean_return", "best_return", "score")
SECOND = Metrics(
    generation=2,
    env_steps=2**53 + 1,
    env_steps_per_s=1 / 3,
    wall_s=0.1 + 0.2,
    mean_return=-1e-300,
    best_return=99.06,
    score=12.5,
    mean_length=7.0,
    sigma=0.03,
    learning_rate=1e-9,
    diverged=3,
    nan_returns=4,
)


def row(generation: int, score: float | None = None) -> Metrics:
    return dataclasses.replace(SECOND, generation=generation, score=score)


def read(run_dir: Path) -> list[dict[str, str]]:
    with (run_dir / "metrics.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def write(run_dir: Path, after: int, *rows: Metrics) -> None:
    log = MetricsLog(run_dir, after)
    for metrics in rows:
        log.write(metrics)
    log.close()


def test_the_columns_of_the_contract_come_first() -> None:
    assert COLUMNS[: len(CONTRACT)] == CONTRACT
    assert len(set(COLUMNS)) == len(COLUMNS)


def test_an_empty_log_has_a_header(tmp_path: Path) -> None:
    write(tmp_path, 0)
    assert (tmp_path / "metrics.csv").read_bytes() == ",".join(COLUMNS).encode() + b"\n"


def test_numbers_come_back_to_the_bit(tmp_path: Path) -> None:
    write(tmp_path, 0, row(1), SECOND)
    first, second = read(tmp_path)
    assert first["score"] == ""
    for name, value in dataclasses.asdict(SECOND).items():
        assert type(value)(second[name]) == value, name


def test_what_is_not_finite_is_written_too(tmp_path: Path) -> None:
    write(tmp_path, 0, dataclasses.replace(row(1), mean_return=math.nan, best_return=-math.inf))
    (first,) = read(tmp_path)
    assert math.isnan(float(first["mean_return"]))
    assert float(first["best_return"]) == -math.inf


def test_a_row_is_on_disk_when_it_is_written(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0)
    log.write(row(1))
    assert [line["generation"] for line in read(tmp_path)] == ["1"]
    log.close()


def test_rows_after_the_checkpoint_are_dropped(tmp_path: Path) -> None:
    write(tmp_path, 0, *(row(n) for n in range(1, 13)))
    before = (tmp_path / "metrics.csv").read_text(encoding="utf-8").splitlines()
    write(tmp_path, 9, row(10, score=0.5))
    after = (tmp_path / "metrics.csv").read_text(encoding="utf-8").splitlines()
    assert after[:10] == before[:10]
    assert [line["generation"] for line in read(tmp_path)] == [str(n) for n in range(1, 11)]
    assert read(tmp_path)[-1]["score"] == "0.5"


def test_every_partial_line_is_dropped(tmp_path: Path) -> None:
    write(tmp_path, 0, row(1), row(2), row(3))
    path = tmp_path / "metrics.csv"
    *whole, last = path.read_text(encoding="utf-8").splitlines(keepends=True)
    for size in range(1, len(last)):
        path.write_text("".join(whole) + last[:size], encoding="utf-8")
        write(tmp_path, 3)
        assert path.read_text(encoding="utf-8") == "".join(whole), repr(last[:size])


@pytest.mark.parametrize("rubbish", ["\n", "x,y\n", ",,,,,,,,,,,\n", "-1" + ",0" * (len(COLUMNS) - 1) + "\n"])
def test_rubbish_is_dropped(tmp_path: Path, rubbish: str) -> None:
    write(tmp_path, 0, row(1))
    path = tmp_path / "metrics.csv"
    whole = path.read_text(encoding="utf-8")
    path.write_text(whole + rubbish, encoding="utf-8")
    write(tmp_path, 5)
    assert path.read_text(encoding="utf-8") == whole


def shown(terminal: bool, *rows: tuple[Metrics, float], say: str | None = None) -> str:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=terminal, width=160, color_system=None)
    with TerminalReporter(console, "CartPole-v1") as reporter:
        for metrics, progress in rows:
            reporter.show(metrics, progress)
        if say is not None:
            reporter.say(say)
    return screen.getvalue()


def test_the_bar_shows_the_run() -> None:
    metrics = dataclasses.replace(
        SECOND, env_steps=1_234_567, env_steps_per_s=4321.0, mean_return=21.04, best_return=99.06, score=55.55
    )
    screen = shown(True, (metrics, 0.25))
    for part in ("CartPole-v1", "gen 2", "mean 21.0", "best 99.1", "score 55.5", "1.23M steps", "4.32k/s", "25%"):
        assert part in screen, part


def test_at_80_columns_the_bar_and_the_time_left_are_there() -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=80, color_system=None)
    metrics = dataclasses.replace(SECOND, generation=1234, env_steps=123_456_789, mean_return=-12345.6)
    with TerminalReporter(console, "InvertedDoublePendulum-v5") as reporter:
        reporter.show(metrics, 0.37)
    lines = screen.getvalue().splitlines()
    assert any(re.search(r"InvertedDoublePendulum-v5 .*━━.* 37% .*(-|\d):\S+ left", line) for line in lines), lines
    assert any("gen 1234  mean -12,345.6" in line for line in lines)


def test_scoring_shows_its_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr(metrics_module.time, "monotonic", lambda: clock[0])
    screens = {terminal: io.StringIO() for terminal in (True, False)}
    for terminal, screen in screens.items():
        console = Console(file=screen, force_terminal=terminal, width=80, color_system=None)
        with EpisodeBar(console, "scoring the best policy", 100) as bar:
            for played in range(1, 101):
                clock[0] += 0.3
                bar.show(played)
    assert screens[False].getvalue().splitlines()[0] == "scoring the best policy: 34 of 100 episodes"
    assert len(screens[False].getvalue().splitlines()) == 2
    assert "100/100" in screens[True].getvalue()


@pytest.mark.parametrize(
    ("count", "text"),
    [
        *((0, "0"), (950, "950"), (999.4, "999"), (1000, "1k"), (85_234, "85.2k"), (999_499, "999k")),
        *((999_999, "1M"), (999_999_999, "1G"), (2_000_000_000, "2G")),
    ],
)
def test_counts_are_short(count: float, text: str) -> None:
    screen = shown(True, (dataclasses.replace(SECOND, env_steps=1, env_steps_per_s=count), 0.25))
    assert f"  1 steps  {text}/s" in screen


def test_the_last_score_stays_in_sight() -> None:
    plain = dataclasses.replace(SECOND, env_steps=1000, score=None)
    rows = [dataclasses.replace(plain, generation=n, score=7.0 if n == 2 else None) for n in (1, 2, 3)]
    screen = shown(True, *((metrics, 0.1) for metrics in rows))
    assert "score 7.0" in screen[screen.rindex("gen 3") :]
    assert "score -" in shown(True, (plain, 0.1))


def test_without_a_terminal_lines_are_rare_but_the_last_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr(metrics_module.time, "monotonic", lambda: clock[0])
    screen = io.StringIO()
    console = Console(file=screen, width=40)
    with TerminalReporter(console, "CartPole-v1") as reporter:
        for generation in range(1, 101):
            clock[0] += 0.3
            reporter.show(row(generation), generation / 100)
    lines = screen.getvalue().splitlines()
    assert len(lines) == 3, lines
    assert lines[-1].startswith("100%")
    assert "gen 100" in lines[-1]


@pytest.mark.parametrize("terminal", [True, False])
def test_what_must_be_seen_is_one_line(terminal: bool) -> None:
    message = "warning: [3] of 8 members had a NaN return " + "x" * 200
    lines = shown(terminal, (row(1), 0.1), say=message).splitlines()
    assert any(message in line for line in lines)
