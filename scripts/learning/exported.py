"""Returns of the policies that come along: ``es-flipout evaluate`` beside ``es_flipout.load`` and an exported ONNX file.

python scripts/learning/exported.py --out results/exported_<hardware>_<yyyy-mm>
python scripts/learning/exported.py --out ... --render                              # only table.md and sentence.md

All three play the same start states in the real Gymnasium environment, the ONNX file in onnxruntime alone.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

import es_flipout as esf
from es_flipout.tools import zoo
from es_flipout.tools.export import export, load_onnx
from es_flipout.tools.policy import make_gymnasium_env
from es_flipout.training.evaluate import FIRST_SEED, evaluate
from es_flipout.training.run_directory import load_agent
from scripts import report


@dataclass(frozen=True)
class Job(report.Job):
    """One policy of the zoo."""

    KEY = ("env_id",)
    env_id: str
    episodes: int


def compare(job: Job) -> dict[str, report.Rows]:
    """Play the episodes in the three ways."""
    folder = zoo.find(job.env_id)
    agent, config = load_agent(folder)
    policy = esf.load(folder)
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "policy.onnx"
        export(policy, path)
        exported = load_onnx(path)
    env = make_gymnasium_env(config)
    rows: report.Rows = []
    for seed in range(FIRST_SEED, FIRST_SEED + job.episodes):
        row = {
            "env_id": job.env_id,
            "seed": seed,
            "evaluate": evaluate(agent, config, 1, seed).mean_return,
            "load": play(env, policy.act, seed),
            "onnx": play(env, lambda observation: exported(np.asarray(observation)[None], None)[0][0], seed),
        }
        rows.append(row)
    env.close()
    return {"episodes": rows, "runs": [{"env_id": job.env_id, "episodes": job.episodes}]}


def play(env: Any, act: Callable[[Any], Any], seed: int) -> float:
    """The return of an episode of a policy without memory."""
    observation, _ = env.reset(seed=seed)
    total, ended = 0.0, False
    while not ended:
        observation, reward, terminated, truncated, _ = env.step(act(observation))
        total, ended = total + float(reward), terminated or truncated
    return total


def main() -> None:
    """Play, and write the table and the sentence of the documentation."""
    parser = report.script_parser(__doc__)
    parser.add_argument("--episodes", type=int, default=100, help="of each policy")
    options = report.parse(parser)
    if not options.render:
        report.begin(options.out, report.config_of(options))
        report.run_missing([Job(env_id, options.episodes) for env_id in zoo.policies()], compare, options.out)
    episodes = report.read_csv(options.out / "episodes.csv")
    report.write_table(options.out, table(episodes))
    (options.out / "sentence.md").write_text(sentence(episodes), encoding="utf-8")


def table(episodes: report.Frame) -> str:
    """Mean returns, and how many episodes have the same return as that of the ONNX file."""
    rows = []
    for env_id, own in report.groups(episodes, "env_id"):
        means = [f"{own[name].mean():,.1f}" for name in ("evaluate", "load", "onnx")]
        same = [f"{(own[name] == own['onnx']).sum()} of {len(own)}" for name in ("evaluate", "load")]
        rows.append((env_id, *means, *same, f"{(own['evaluate'] - own['onnx']).abs().max():.2g}"))
    header = "environment | evaluate | load | ONNX | evaluate = ONNX | load = ONNX | largest difference of an episode"
    return report.markdown(header, rows)


def sentence(episodes: report.Frame) -> str:
    """The two sentences of docs/after_training.md."""
    apart = {
        env_id: abs(own["evaluate"].mean() - own["onnx"].mean()) / abs(own["onnx"].mean())
        for env_id, own in report.groups(episodes, "env_id")
    }
    worst = max(apart, key=lambda env_id: apart[env_id])
    count, equal = len(episodes), int((episodes["load"] == episodes["onnx"]).sum())
    return (
        f"An exported ONNX file gives the returns of `es_flipout.load` from the same start states: {equal} of {count} "
        f"episodes of the {len(apart)} policies in the zoo had identical returns. `es-flipout evaluate` computes in "
        "float32, as training does, so expect its score and not its single episodes: the means over "
        f"{count // len(apart)} episodes differed by at most {apart[worst]:.2%} ({worst}).\n"
    )


if __name__ == "__main__":
    report.run_script(main)
