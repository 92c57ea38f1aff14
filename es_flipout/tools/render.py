"""Videos of trained policies: episodes side by side, with return and step written on them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from es_flipout.tools.episode import Episode, make_rendered_env
from es_flipout.tools.policy import TrainedPolicy
from es_flipout.tools.video import Frame, grid, panel_width, stride_of, write_video
from es_flipout.training.evaluate import FIRST_SEED

_FPS = 20.0  # of environments that do not name theirs
_PAUSE_S = 0.5  # after the last step of an episode


@dataclass(frozen=True)
class Clip:
    """What a video shows.

    Attributes:
        episodes: number of episodes of every policy.
        seed: seed of the first start state; the next ones follow.
        rows, columns: episodes that are shown side by side.
        width: width of the video in pixels; None for the environment's own.
        steps: cut episodes after this many steps; None for whole episodes.
    """

    episodes: int = 1
    seed: int = FIRST_SEED
    rows: int = 1
    columns: int = 1
    width: int | None = None
    steps: int | None = None


@dataclass
class Rendered:
    """A video that was written.

    Attributes:
        frames: number of frames.
        fps: frames per second.
        returns: returns of the episodes, in the order in which they are shown.
    """

    frames: int = 0
    fps: float = 0.0
    returns: list[float] = field(default_factory=list)


def render(policies: Sequence[tuple[str, TrainedPolicy]], output: Path, clip: Clip | None = None) -> Rendered:
    """Write a video of the episodes of one or several policies, one after another.

    Args:
        policies: policies of one run, each with a text that is shown beside return and step (``""`` for none).
        output: the file, ``.mp4`` or ``.gif``; it is replaced if it exists.
        clip: what to show.

    Raises:
        UserError: the environment cannot be rendered, or a package is missing.
        EnvironmentFailureError: the environment's own code raised an exception.
    """
    clip, done = clip if clip is not None else Clip(), Rendered()
    config = policies[0][1].config
    with contextlib.ExitStack() as stack:
        envs = []
        for _ in range(min(clip.rows * clip.columns, clip.episodes)):
            envs.append(make_rendered_env(config, "rgb_array"))
            stack.callback(envs[-1].close)
        own_fps = float(envs[0].metadata.get("render_fps") or _FPS)
        stride = stride_of(output, own_fps)
        done.fps = own_fps / stride

        def frames() -> Iterator[Frame]:
            for label, policy in policies:
                for first in range(0, clip.episodes, len(envs)):
                    seeds = range(clip.seed + first, clip.seed + min(first + len(envs), clip.episodes))
                    page = [
                        Episode(policy, env, seed, clip.steps)
                        for env, seed in zip(envs[: len(seeds)], seeds, strict=True)
                    ]
                    yield from _page(page, clip, label, stride, round(_PAUSE_S * done.fps))
                    done.returns.extend(episode.total for episode in page)

        done.frames = write_video(output, frames(), done.fps)
    return done


def _page(episodes: Sequence[Episode], clip: Clip, label: str, stride: int, pause: int) -> Iterator[Frame]:
    """Play episodes side by side until the last one ends; those that ended before show their last frame."""
    shown = [episode.frame() for episode in episodes]
    width = panel_width(shown[0], clip.columns, clip.width)
    step, picture = 0, _picture(episodes, shown, clip.columns, width, label)
    yield picture
    while not all(episode.ended for episode in episodes):
        step += 1
        moving = [not episode.ended for episode in episodes]
        for episode in episodes:
            episode.step()
        if step % stride and not all(episode.ended for episode in episodes):
            continue
        for index, episode in enumerate(episodes):
            if moving[index] or stride > 1:
                shown[index] = episode.frame()
        picture = _picture(episodes, shown, clip.columns, width, label)
        yield picture
    for _ in range(pause):
        yield picture


def _picture(episodes: Sequence[Episode], shown: Sequence[Frame], columns: int, width: int, label: str) -> Frame:
    texts = [f"{label}return {episode.total:,.1f}   step {episode.steps:,}" for episode in episodes]
    return grid(list(zip(shown, texts, strict=True)), columns, width)
