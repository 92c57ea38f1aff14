"""Videos show whole episodes of the trained policy, with the numbers that evaluate gives."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium
import imageio.v3 as imageio
import mujoco
import numpy as np
import pytest
from gymnasium.spaces import Box
from tools.runs import write_run

from es_flipout import cli
from es_flipout.envs.base import EnvironmentFailureError
from es_flipout.errors import UserError
from es_flipout.tools.episode import make_rendered_env
from es_flipout.tools.policy import load_policy
from es_flipout.tools.render import Clip, render
from es_flipout.tools.video import grid
from es_flipout.training.evaluate import evaluate

# imageio leaves the pipes of ffmpeg to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")


class Lamp(gymnasium.Env):
    """A picture whose brightness is the number of the step; episodes last as many steps as their seed says."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 50}  # noqa: RUF012
    observation_space = Box(-1, 1, (2,), np.float32)
    action_space = Box(-1, 1, (1,), np.float32)

    def __init__(self, render_mode: str | None = None, fault: str | None = None) -> None:
        self.render_mode, self.fault = render_mode, fault

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.t, self.length = 0, seed
        return np.zeros(2, np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        if self.fault == "step":
            raise RuntimeError("the bulb\nburst")
        self.t += 1
        return np.ones(2, np.float32), 2.0, self.t == self.length, False, {}

    def render(self) -> Any:
        if self.fault == "render":
            raise RuntimeError("the bulb\nburst")
        if self.fault == "package":
            raise gymnasium.error.DependencyNotInstalled("no pygame")
        return np.full((100, 100, 3), 10 * self.t, np.uint8)


class Dark(Lamp):
    metadata = {"render_modes": ["ansi"]}  # noqa: RUF012


@pytest.fixture(autouse=True)
def lamps() -> Iterator[None]:
    gymnasium.register("Lamp-v0", lambda **kwargs: Lamp(**kwargs))
    gymnasium.register("Dark-v0", lambda **kwargs: Dark(**kwargs))
    yield
    gymnasium.registry.pop("Lamp-v0")
    gymnasium.registry.pop("Dark-v0")


def brightness(frames: np.ndarray, rows: int = 1, columns: int = 1) -> list[list[int]]:
    """Return the number of the step that every panel of every frame shows."""
    height, width = frames.shape[1] // rows, frames.shape[2] // columns
    corners = [(r * height + height - 4, c * width + width - 4) for r in range(rows) for c in range(columns)]
    return [[round(float(frame[y, x].mean()) / 10) for y, x in corners] for frame in frames]


@pytest.mark.parametrize("ending", [".mp4", ".gif"])
def test_every_step_is_shown_side_by_side(ending: str, tmp_path: Path) -> None:
    policy = load_policy(write_run(tmp_path / "run", "Lamp-v0"))
    output = tmp_path / f"clip{ending}"
    done = render([("", policy)], output, Clip(episodes=3, seed=6, rows=1, columns=2))
    assert done.returns == [12.0, 14.0, 16.0]
    stride = 2 if ending == ".gif" else 1  # browsers show at most 25 pictures of a gif per second
    assert done.fps == 50 / stride
    shown = brightness(imageio.imread(output, index=None), columns=2)
    first = [[min(t, 6), t] for t in range(8) if t % stride == 0 or t == 7]
    second = [[t, 0] for t in range(9) if t % stride == 0]
    distinct = [panel for panel, before in zip(shown, [None, *shown], strict=False) if panel != before]
    assert distinct == [*first, *second]


def test_grid_fills_rows_and_has_even_sides() -> None:
    panels = [(np.full((30, 20, 3), value, np.uint8), "") for value in (50, 100, 150)]
    canvas = grid(panels, columns=2, width=21)
    assert canvas.shape == (64, 42, 3)
    assert brightness(canvas[None], 2, 2) == [[5, 10, 15, 0]]
    assert not np.array_equal(canvas, grid([(frame, "return 1") for frame, _ in panels], 2, 21))


def test_returns_are_those_of_evaluate(tmp_path: Path) -> None:
    policy = load_policy(write_run(tmp_path / "run", "MinAtar/Breakout-v1", policy="convnet"))
    done = render([("", policy)], tmp_path / "clip.gif", Clip(episodes=2, seed=5))
    scored = evaluate(policy.agent, policy.config, 2, first_seed=5)
    assert (min(done.returns), max(done.returns)) == (scored.min_return, scored.max_return)


def test_progress_shows_every_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = write_run(tmp_path / "run", "Lamp-v0", generations=(10, 20))
    common = [str(run_dir), "--seed", "3", "--output"]
    assert cli.main(["render", *common, str(tmp_path / "a.gif"), "--progress"]) == 0
    assert "returns: 6.0, 6.0\n" in capsys.readouterr().out
    assert cli.main(["render", *common, str(tmp_path / "b.gif"), "--checkpoint", "15"]) == 2
    assert "it has those of 10, 20" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("env_id", "fault", "error", "message"),
    [
        ("Dark-v0", None, UserError, "Dark-v0 cannot be rendered: its render modes are ansi, not rgb_array"),
        ("Lamp-v0", "render", UserError, "cannot be rendered here .*the bulb.*MUJOCO_GL=osmesa"),
        ("Lamp-v0", "package", UserError, r"pip install 'es-flipout\[render\]' \(no pygame"),
        ("Lamp-v0", "step", EnvironmentFailureError, "the bulb"),
    ],
)
def test_faults_are_named_and_nothing_is_left(
    env_id: str, fault: str | None, error: type[Exception], message: str, tmp_path: Path
) -> None:
    kwargs = "{}" if fault is None else f'{{"fault": "{fault}"}}'
    policy = load_policy(write_run(tmp_path / "run", env_id, env_kwargs=kwargs))
    for ending in ("gif", "mp4"):
        with pytest.raises(error, match=message):
            render([("", policy)], tmp_path / f"clip.{ending}", Clip(seed=9))
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_mp4_without_ffmpeg_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = load_policy(write_run(tmp_path / "run", "Lamp-v0"))
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(UserError, match=r"pip install 'es-flipout\[render\]'"):
        render([("", policy)], tmp_path / "clip.mp4")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["render", "RUN", "--output", "old.gif"],
            "old.gif exists: choose another --output, or overwrite it with --force",
        ),
        (["render", "RUN", "--output", "clip.avi"], r"output must end with \.mp4 or \.gif, got clip\.avi"),
        (["render", "RUN", "--output", "no/clip.gif"], "directory no does not exist"),
        (["render", "RUN", "--output", "clip.gif", "--grid", "0", "2"], "grid must be at least 1, got 0"),
        (["render", "elsewhere", "--output", "clip.gif"], "run directory elsewhere does not exist"),
        (["render", "RUN"], "--output is required"),
        (["play", "RUN"], "there is no display for a window: es-flipout render"),
        (["export", "RUN", "--output", "policy.txt"], r"output must end with \.onnx or \.pt2"),
    ],
)
def test_wrong_requests_are_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "SDL_VIDEODRIVER"):
        monkeypatch.delenv(name, raising=False)
    write_run(tmp_path / "RUN", "Lamp-v0")
    (tmp_path / "old.gif").write_bytes(b"old")
    assert cli.main(arguments) == 2
    err = capsys.readouterr().err
    assert re.fullmatch(f"error: .*{message}.*\n", err), err
    assert (tmp_path / "old.gif").read_bytes() == b"old"


def test_play_prints_the_return_of_every_episode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    run_dir = write_run(tmp_path / "run", "CartPole-v1", env_kwargs='{"max_episode_steps": 5}')
    assert cli.main(["play", str(run_dir), "--episodes", "2", "--seed", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("episode")] == [
        f"episode {number}: return 5.0 after 5 steps" for number in (1, 2)
    ]


@pytest.mark.slow  # rendering in software takes seconds
def test_mujoco_is_rendered_without_a_display_and_the_camera_follows(tmp_path: Path) -> None:
    policy = load_policy(write_run(tmp_path / "run", "HalfCheetah-v5", policy="linear"))
    try:
        env = make_rendered_env(policy.config, "rgb_array")
        env.reset(seed=0)
        before = np.asarray(env.render())
    except Exception as error:
        pytest.skip(f"no OpenGL: {error}")
    data = env.unwrapped.data  # type: ignore[attr-defined]
    data.qpos[0] += 50.0
    mujoco.mj_forward(env.unwrapped.model, data)  # type: ignore[attr-defined]
    after = np.asarray(env.render())
    env.close()
    # The cheetah is orange and in the middle of both pictures; the floor has no color.
    for image in (before, after):
        colored = np.ptp(image[180:320, 100:380].astype(int), axis=2) > 60
        assert colored.mean() > 0.02
