"""Run directories for tests, without training."""

from pathlib import Path
from typing import Any

import torch

from es_flipout.config import TrainConfig
from es_flipout.rollout.builder import make_agent, make_one_env
from es_flipout.training import run_directory
from es_flipout.training.checkpoint import Progress, save_checkpoint


def write_run(run_dir: Path, env_id: str, generations: tuple[int, ...] = (), **options: Any) -> Path:
    """Write the run directory of a random policy, with checkpoints of other random policies."""
    config = TrainConfig.of(env_id, **{"hidden": (8,), **options})
    env = make_one_env(config)
    agent = make_agent(config, env)
    env.close()
    run_directory.create(run_dir, config)
    generator = torch.Generator().manual_seed(1)

    def tensors() -> dict[str, torch.Tensor]:
        """Draw weights so large that actions differ, and observation statistics that are no identity."""
        found = agent.state_dict()
        for name, value in found.items():
            drawn = torch.randn(value.shape, generator=generator, dtype=torch.float64)
            if name.startswith("observation_norm."):
                drawn = drawn.abs() + 1 if name != "observation_norm.count" else torch.tensor(1.0)
            found[name] = drawn.to(value.dtype)
        return found

    for generation in generations:
        state = {name.replace("policy.", "module.", 1): value for name, value in tensors().items()}
        progress = Progress(generation, 10 * generation, 1.0, 1.5, best_score=1.5, best_generation=generation)
        save_checkpoint(run_dir / "checkpoints", state, progress, len(generations))
    run_directory.save_policy(run_dir, tensors(), "last")
    run_directory.save_policy(run_dir, tensors(), "best")
    return run_dir
