"""Trackers hold configuration, metrics, scores and files, also after a resume; one that fails does not stop a run."""

from __future__ import annotations

import errno
import json
import os
import re
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import pytest
from gymnasium.envs.classic_control import CartPoleEnv
from PIL import Image
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from es_flipout.cli import train
from es_flipout.cli.session import going_on, train_to_the_end
from es_flipout.config import TrainConfig
from es_flipout.errors import UserError
from es_flipout.tools.policy import load_policy
from es_flipout.training.evaluate import evaluate
from es_flipout.training.metrics import COLUMNS, Metrics, Silent
from es_flipout.training.setup import make_trainer, resume_trainer
from es_flipout.training.trackers import TRACKERS, Outcome, TrackedRun
from es_flipout.training.trainer import Trainer

ME = f"{__name__}:Recording"
CONFIG = TrainConfig.of(
    "CartPole-v1",
    population_size=4,
    hidden=(4,),
    generations=4,
    score_every=2,
    score_episodes=2,
    evaluation_episodes=2,
    checkpoint_every=2,
    threads=1,
    device="cpu",
)
SCORES = {f"evaluation/{name}" for name in ("mean_return", "std_return", "median_return")}
FILES = {"config.json", "environment.json", "evaluation.json", "metrics.csv", "policy.safetensors", "best.safetensors"}


class Crash(Exception):  # noqa: N818
    """A run that dies."""


class Watching(Silent):
    """Collects messages, and calls a function after a generation."""

    def __init__(self, generation: int = 0, then: Callable[[], object] = lambda: None) -> None:
        self.generation, self.then = generation, then
        self.messages: list[str] = []

    def show(self, metrics: Metrics, progress: float) -> None:
        if metrics.generation == self.generation:
            self.then()

    def say(self, message: str) -> None:
        self.messages.append(message)


class Recording:
    """A tracker of one's own, as ``--track module:Class`` creates it."""

    calls: ClassVar[list[tuple[str, Any]]] = []
    fails: ClassVar[str] = ""

    def _record(self, name: str, value: Any) -> None:
        self.calls.append((name, value))
        if name == self.fails:
            raise RuntimeError("no\nconnection")

    def start(self, run: TrackedRun) -> str:
        self._record("start", run)
        return "an id"

    def log(self, metrics: Metrics) -> None:
        self._record("log", metrics)

    def finish(self, outcome: Outcome) -> None:
        self._record("finish", outcome)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    monkeypatch.setattr(Recording, "calls", [])
    return Recording.calls


def new_run(run_dir: Path, config: TrainConfig, reporter: Watching | None = None) -> Trainer:
    trainer = make_trainer(config, run_dir, reporter)
    trainer.create()
    return trainer


def dies(run_dir: Path, config: TrainConfig) -> None:
    """Train until the third generation, of which there is no checkpoint."""

    def crash() -> None:
        raise Crash

    with pytest.raises(Crash):
        train_to_the_end(new_run(run_dir, config, Watching(3, crash)), run_dir, Console(quiet=True))


def died_and_resumed(run_dir: Path, config: TrainConfig) -> None:
    dies(run_dir, config)
    train_to_the_end(resume_trainer(run_dir, trust=True), run_dir, Console(quiet=True))


def measured(run_dir: Path) -> float:
    return json.loads((run_dir / "evaluation.json").read_text(encoding="utf-8"))["mean_return"]


# One's own tracker, and what all have in common.


def test_own_tracker_sees_a_run_and_its_resume(tmp_path: Path, calls: list[tuple[str, Any]]) -> None:
    run_dir, config = tmp_path / "run", CONFIG.replace(track=(ME,))
    died_and_resumed(run_dir, config)
    assert [name for name, _ in calls] == ["start", *["log"] * 3, "finish", "start", *["log"] * 2, "finish"]
    first, *_, died, again, third, fourth, done = [value for _, value in calls]
    assert first == TrackedRun(run_dir, config.replace(physics="cpu", compile="off"), 0, None)
    assert (again.generation, again.id) == (2, "an id")
    assert (third.generation, fourth.generation) == (3, 4)
    assert (died.state, died.scores, done.state, set(done.scores)) == ("failed", {}, "finished", SCORES)
    assert done.scores["evaluation/mean_return"] == measured(run_dir)
    assert {path.name for path in done.files} == FILES
    assert not (run_dir / "tensorboard").exists(), "only what is asked for"


def test_own_code_of_a_run_is_executed_only_if_it_is_trusted(tmp_path: Path, calls: list[tuple[str, Any]]) -> None:
    new_run(tmp_path / "run", CONFIG.replace(track=(ME,)))
    with pytest.raises(
        UserError, match=r"executes, the trackers .*:Recording: choose others with --track, or use --trust"
    ):
        resume_trainer(tmp_path / "run")
    resume_trainer(tmp_path / "run", changes={"track": ()}).train()
    assert not calls


def test_the_tracker_of_the_documentation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = Path(__file__).parents[2] / "docs" / "trackers.md"
    (code,) = re.findall(r"```python[^\n]*\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "my_trackers.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    died_and_resumed(tmp_path / "run", CONFIG.replace(track=("my_trackers:JsonLines",)))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line.get("generation") for line in lines] == [None, 1, 2, 3, None, None, 3, 4, None]
    assert (lines[3]["mean_return"], lines[4]["state"], lines[5]["from_generation"]) == (
        lines[6]["mean_return"],
        "failed",
        2,
    )
    assert lines[-1]["evaluation/mean_return"] == measured(tmp_path / "run")


def test_an_interrupted_run_says_so(tmp_path: Path, calls: list[tuple[str, Any]]) -> None:
    reporter = Watching(1, lambda: trainer.interrupt())
    trainer = new_run(tmp_path / "run", CONFIG.replace(track=(ME,)), reporter)
    train_to_the_end(trainer, tmp_path / "run", Console(quiet=True))
    assert calls[-1][1].state == "interrupted"
    assert not calls[-1][1].scores


@pytest.mark.parametrize("fails", ["log", "finish"])
def test_a_failing_tracker_does_not_stop_the_run(
    fails: str, tmp_path: Path, calls: list[tuple[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Recording, "fails", fails)
    reporter = Watching()
    trainer = new_run(tmp_path / "run", CONFIG.replace(track=(ME, "tensorboard")), reporter)
    trainer.train()
    assert trainer.finished
    assert [name for name, _ in calls].count(fails) == 1
    assert reporter.messages == [
        f"warning: nothing more is sent to tracker {ME}, which failed: RuntimeError: no connection"
    ]
    assert events(tmp_path / "run").Scalars("score")


def test_a_tracker_that_cannot_start_is_one_line(
    tmp_path: Path, calls: list[tuple[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Recording, "fails", "start")
    trainer = new_run(tmp_path / "run", CONFIG.replace(track=(ME,)))
    with pytest.raises(UserError, match=r"Recording could not be started: RuntimeError: no connection"):
        trainer.train()


def test_a_disk_that_is_full_when_a_tracker_starts_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.add_text", full)
    run_dir, hook = tmp_path / "run", threading.excepthook
    trainer = new_run(run_dir, CONFIG.replace(track=("tensorboard",)))
    full_disk = r"No space left on device: '.*tensorboard'; free some space, .*resume"
    with pytest.raises(UserError, match=full_disk), going_on(trainer.config, run_dir):
        train_to_the_end(trainer, run_dir, Console(quiet=True))
    assert threading.excepthook is hook


@pytest.mark.parametrize(
    ("track", "message"),
    [
        ("wandbb", "unknown tracker 'wandbb': did you mean wandb?"),
        ("comet", "unknown tracker 'comet': choose from tensorboard, wandb, mlflow, trackio, or module:Class"),
        ("json:Tracker", "tracker json:Tracker cannot be created: module 'json' has no attribute 'Tracker'"),
        ("no_such:Tracker", "tracker no_such:Tracker cannot be created: No module named 'no_such'"),
        *((name, f"es-flipout\\[{name}\\]") for name in TRACKERS if name != "tensorboard"),
    ],
)
def test_what_cannot_be_tracked_is_refused_before_anything_is_written(
    track: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("wandb", "mlflow", "trackio"):
        monkeypatch.setitem(sys.modules, name, None)  # as if it was not installed
    with pytest.raises(UserError, match=message):
        new_run(tmp_path / "run", CONFIG.replace(track=("tensorboard", track)))
    assert not (tmp_path / "run").exists()


def test_the_same_tracker_twice_is_refused() -> None:
    with pytest.raises(UserError, match="track must be different trackers, got wandb wandb"):
        CONFIG.replace(track=("wandb", "wandb"))


# TensorBoard.


def events(run_dir: Path) -> EventAccumulator:
    found = EventAccumulator(str(run_dir / "tensorboard"))
    found.Reload()
    return found


def test_tensorboard_holds_the_run_and_forgets_what_was_undone(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    died_and_resumed(run_dir, CONFIG)
    found = events(run_dir)
    assert set(found.Tags()["scalars"]) == set(COLUMNS) - {"generation"} | SCORES
    assert [event.step for event in found.Scalars("mean_length")] == [1, 2, 3, 4]
    assert [event.step for event in found.Scalars("score")] == [2, 4]
    assert [(e.step, e.value) for e in found.Scalars("evaluation/mean_return")] == [(4, measured(run_dir))]
    (text,) = found.Tensors("config/text_summary")
    assert b"| population_size | 4 |" in text.tensor_proto.string_val[0]


# The other packages, in their offline modes. They are extras, which the tests of the project do not install.


class Tracked(NamedTuple):
    """What a tracker's storage holds."""

    config: dict[str, Any]
    steps: set[int]
    scores: dict[str, float]
    files: set[str]


def in_wandb(run_dir: Path) -> Tracked:
    pb: Any = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    config, steps, scores, files, ids = {}, set(), {}, set(), set()
    for path in sorted(run_dir.glob("wandb/offline-run-*/*.wandb")):
        ids.add(path.stem)
        for data in leveldb_records(path.read_bytes()):
            record = pb.Record()
            record.ParseFromString(data)
            config |= {each.key: json.loads(each.value_json) for each in record.run.config.update}
            steps |= {int(each.value_json) for each in record.history.item if each.nested_key == ["_step"]}
            scores |= {e.key: json.loads(e.value_json) for e in record.summary.update if e.key.startswith("evaluation")}
            files |= {each.path for each in record.artifact.manifest.contents}
    assert len(ids) == 1, "a resume continues the same run"
    return Tracked(config, steps, scores, files)


def leveldb_records(raw: bytes) -> Iterator[bytes]:
    """The records of a W&B file: LevelDB's log format, after a header of 7 bytes."""
    at, whole, block = 7, b"", 32768
    while at + 7 <= len(raw):
        if block - at % block < 7:
            at += block - at % block
            continue
        _, size, kind = struct.unpack_from("<IHB", raw, at)
        whole += raw[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):
            yield whole
            whole = b""


def in_mlflow(run_dir: Path) -> Tracked:
    client = pytest.importorskip("mlflow").MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("es-flipout").experiment_id])
    assert run.info.status == "FINISHED"
    assert run.info.run_name == run_dir.name
    steps = [each.step for each in client.get_metric_history(run.info.run_id, "mean_return")]
    assert len(set(steps)) == len(steps), "repeated generations are logged once"
    config = {"env_id": run.data.params["env_id"], "population_size": int(run.data.params["population_size"])}
    files = {each.path for each in client.list_artifacts(run.info.run_id)}
    return Tracked(config, set(steps), run.data.metrics, files)


def in_trackio(run_dir: Path) -> Tracked:
    del run_dir
    trackio = pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage  # pyright: ignore[reportMissingImports]

    (run,) = trackio.Api().runs("es-flipout")
    rows = SQLiteStorage.get_logs("es-flipout", run.name)
    scores = {name: value for row in rows for name, value in row.items() if name in SCORES}
    found: Any = SQLiteStorage.get_artifact_manifest("es-flipout", f"run-{run.name}", "latest")
    files = {each["path"] for each in found["manifest"]}
    return Tracked(run.config, {row["step"] for row in rows if "mean_return" in row}, scores, files)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("tracker", ["wandb", "mlflow", "trackio"])
def test_a_real_tracker_holds_the_run_also_after_a_resume(
    tracker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "MLFLOW_ALLOW_FILE_STORE": "true"}
    paths = {name: tmp_path / name.lower() for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "TRACKIO_DIR")}
    uri = {"MLFLOW_TRACKING_URI": (tmp_path / "mlruns").as_uri()}
    for name, value in {**values, **paths, **uri}.items():
        monkeypatch.setenv(name, str(value))
    pytest.importorskip(tracker, reason=f"the extra {tracker} is not installed")
    run_dir = tmp_path / "run"
    died_and_resumed(run_dir, CONFIG.replace(track=(tracker,)))
    held = {"wandb": in_wandb, "mlflow": in_mlflow, "trackio": in_trackio}[tracker](run_dir)
    assert (held.config["env_id"], held.config["population_size"]) == ("CartPole-v1", 4)
    assert held.steps == {1, 2, 3, 4}
    assert held.scores["evaluation/mean_return"] == measured(run_dir)
    assert held.files == FILES


# The video at the end of a run.


def test_trackers_get_the_video_of_the_run(tmp_path: Path, calls: list[tuple[str, Any]], capsys: Any) -> None:
    config = CONFIG.replace(track=(ME,), video="gif", hidden=())
    run_dir = tmp_path / "run"
    train_to_the_end(new_run(run_dir, config), run_dir, Console(quiet=True))
    assert f"video: {run_dir / 'video.gif'}" in capsys.readouterr().out
    done = calls[-1][1]
    assert {path.name for path in done.files} == FILES | {"video.gif"}
    with Image.open(run_dir / "video.gif") as film:
        steps = evaluate(load_policy(run_dir).agent, config, 1).mean_return
        assert getattr(film, "n_frames", 1) > steps / 2  # CartPole has 50 frames a second, a GIF 25 at most


def test_a_video_that_fails_is_a_warning(tmp_path: Path, capsys: Any) -> None:
    run_dir = tmp_path / "run"
    trainer = new_run(run_dir, CONFIG.replace(track=(), video="gif"))
    (run_dir / "video.gif").mkdir()
    train_to_the_end(trainer, run_dir, Console(quiet=True))
    printed = capsys.readouterr()
    assert printed.err == f"warning: no video: {run_dir / 'video.gif'} is a directory\n"
    assert measured(run_dir) > 0
    assert f"run directory: {run_dir}" in printed.out


def test_a_video_that_cannot_be_is_refused_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CartPoleEnv, "metadata", {"render_modes": []})
    run_dir = tmp_path / "run"
    with pytest.raises(UserError, match="CartPole-v1 cannot be rendered: its render modes are none, not rgb_array"):
        train.run(["CartPole-v1", "--video", "gif", "--run-dir", str(run_dir)])
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(UserError, match=r"mp4 needs ffmpeg, .*; .gif works without"):
        train.run(["CartPole-v1", "--video", "mp4", "--run-dir", str(run_dir)])
    assert not run_dir.exists()
