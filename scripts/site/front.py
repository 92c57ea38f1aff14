"""The picture at the top of the README: policies of ``results/policies`` side by side, as docs/images/policies.gif.

python scripts/site/front.py
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import es_flipout as esf
from es_flipout.tools.episode import Episode, make_rendered_env
from es_flipout.tools.source import find_run
from es_flipout.tools.video import Frame, grid, write_video
from scripts import report

OUTPUT = Path(__file__).parents[2] / "docs" / "images" / "policies.gif"
TASKS = ("HalfCheetah-v5", "Hopper-v5", "Swimmer-v5", "CartPole-v1")
FPS = 12.5


def main() -> None:
    """Play an episode of every task, and write its first seconds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--seconds", type=float, default=4.0, help="of the episodes, and of the picture")
    parser.add_argument("--width", type=int, default=150, help="of an episode, in pixels")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        shown = []
        for env_id in TASKS:
            policy = esf.load(find_run(f"zoo:{env_id}"))
            env = make_rendered_env(policy.config, "rgb_array")
            stack.callback(env.close)
            shown.append((env_id, Episode(policy, env, seed=0), float(env.metadata["render_fps"])))

        def frames() -> Iterator[Frame]:
            for index in range(round(options.seconds * FPS)):
                for _, episode, fps in shown:
                    while not episode.ended and episode.steps < index * fps / FPS:
                        episode.step()
                panels = [(episode.frame(), f"{env_id}  {episode.total:,.0f}") for env_id, episode, _ in shown]
                yield grid(panels, len(TASKS), options.width)

        write_video(options.output, frames(), FPS)


if __name__ == "__main__":
    report.run_script(main)
