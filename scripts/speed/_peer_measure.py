"""One measurement of one engine, in a process of its own: ``python _peer_measure.py NAME ENV_ID POPULATION SECONDS CORES``.

Prints one line of JSON. Only public interfaces; a 64-64 tanh policy unless the name says linear; the learning rate is so small
that the policy stays untrained and the work the same. The first generation is warm-up; then whole generations for at least
SECONDS. Runs with the Python that has the engine (see ``peers.py``), so it imports nothing else of this repository.
"""

# The peers are installed in another environment.
# pyright: reportMissingImports=false
from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

RATE = 1e-9
SIGMA = 0.03
HIDDEN = (64, 64)
ARS_CANDIDATES = 64
LEARNING_RATE, MOST_GENERATIONS, ENOUGH = (
    0.05,
    300,
    0.95,
)  # of the training before a measurement around a trained policy

Counts = dict[str, float]  # env_steps, seconds and more


def generations(step: Callable[[], float], seconds: float) -> Counts:
    """Call ``step``, which returns the environment steps so far, once to warm up and then for some seconds."""
    before = step()
    started, steps, calls = time.perf_counter(), before, 0
    while calls == 0 or time.perf_counter() - started < seconds:
        steps = step()
        calls += 1
    return {"env_steps": steps - before, "seconds": time.perf_counter() - started, "generations": calls}


def evotorch(env_id: str, population: int, seconds: float, cores: int) -> Counts:
    """EvoTorch, in its fastest setup: PGPE around the vectorized problem, one actor for each core."""
    import torch
    from evotorch.algorithms import PGPE
    from evotorch.neuroevolution import VecGymNE

    torch.set_num_threads(1)
    problem = VecGymNE(
        f"gym::{env_id}",
        "Linear(obs_length, 64) >> Tanh() >> Linear(64, 64) >> Tanh() >> Linear(64, act_length)",
        observation_normalization=True,
        num_actors=cores,
        num_gpus_per_actor=0,
    )
    searcher = PGPE(
        problem,
        popsize=population,
        center_learning_rate=RATE,
        stdev_learning_rate=RATE,
        stdev_init=SIGMA,
        optimizer="adam",
        ranking_method="centered",
    )

    def step() -> float:
        searcher.step()
        return float(problem.status["total_interaction_count"])

    try:
        return generations(step, seconds)
    finally:
        problem.kill_actors()


def ars(policy: str, env_id: str, population: int, seconds: float, cores: int) -> Counts:
    """ARS of sb3-contrib in its fastest setup: candidates evaluated in one process for each core."""
    import gymnasium
    import torch
    from sb3_contrib import ARS
    from sb3_contrib.common.vec_env import AsyncEval
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

    torch.set_num_threads(1)

    class Enough(Exception):  # noqa: N818  (not an error)
        pass

    class Clock(BaseCallback):
        """Notes time and steps after every iteration, and ends the run after some seconds."""

        def __init__(self) -> None:
            super().__init__()
            self.notes: list[tuple[float, int]] = []

        def _on_step(self) -> bool:
            return True

        def _on_rollout_end(self) -> None:
            self.notes.append((time.perf_counter(), self.num_timesteps))
            if len(self.notes) > 1 and self.notes[-1][0] - self.notes[0][0] >= seconds:
                raise Enough

    def make() -> VecNormalize:
        return VecNormalize(DummyVecEnv([lambda: gymnasium.make(env_id)]), norm_reward=False)

    linear = policy == "LinearPolicy"
    model = ARS(
        policy,
        make(),
        n_delta=ARS_CANDIDATES // 2,
        learning_rate=RATE,
        delta_std=SIGMA,
        zero_policy=linear,
        policy_kwargs={} if linear else {"net_arch": list(HIDDEN), "activation_fn": torch.nn.Tanh},
    )
    asynchronous, clock = AsyncEval([make for _ in range(cores)], model.policy), Clock()
    try:
        model.learn(10**12, callback=clock, async_eval=asynchronous, log_interval=None)
    except Enough:
        asynchronous.close()
    (start, before), (end, after) = clock.notes[0], clock.notes[-1]
    return {"env_steps": after - before, "seconds": end - start, "generations": len(clock.notes) - 1}


def evosax(trained: bool, env_id: str, population: int, seconds: float, cores: int) -> Counts:
    """JAX compiles all of evosax on gymnax; its rollout goes on after episodes have ended, so both counts are given.

    ``trained``: its own strategy first learns until the members play 95 % of the longest possible episodes.
    """
    import jax
    import optax
    from evosax.algorithms import Open_ES
    from evosax.problems import GymnaxProblem
    from evosax.problems.networks import MLP, categorical_output_fn

    policy = MLP(layer_sizes=(*HIDDEN, 2), output_fn=categorical_output_fn)
    problem = GymnaxProblem(env_name=env_id, policy=policy)
    key = jax.random.key(0)
    solution = policy.init(key, jax.numpy.zeros(problem.observation_shape), key)

    def strategy_with(rate: float) -> Open_ES:
        return Open_ES(population, solution, optimizer=optax.adam(rate), std_schedule=optax.constant_schedule(SIGMA))

    strategy = strategy_with(LEARNING_RATE if trained else RATE)
    params = strategy.default_params
    state, problem_state = strategy.init(key, solution, params), problem.init(key)
    live = 0.0

    def step() -> float:
        nonlocal key, state, problem_state, live
        key, ask_key, eval_key, tell_key = jax.random.split(key, 4)
        members, state = strategy.ask(ask_key, state, params)
        fitness, problem_state, _ = problem.eval(eval_key, members, problem_state)
        state, _ = strategy.tell(tell_key, members, -fitness, state, params)
        live += float(fitness.sum())  # each live step of CartPole pays 1
        return live

    steps_of_one = population * problem.episode_length
    if trained:
        for _ in range(MOST_GENERATIONS):
            if -live + step() >= ENOUGH * steps_of_one:
                break
        strategy = strategy_with(RATE)
        state = strategy.init(key, strategy.get_mean(state), params)
        live = 0.0
    counts = generations(step, seconds)
    return counts | {"computed_steps": counts["generations"] * steps_of_one}


def ours(kind: str, env_id: str, population: int, seconds: float, cores: int, trained: bool = False) -> Counts:
    """This engine (``kind`` is the value of ``--compile``), or its classic workers on Ray (``kind`` is classic).

    ``trained``: around a policy that the engine learned before the measurement.
    """
    from es_flipout.bench.classic.player import build_classic
    from es_flipout.config import TrainConfig
    from es_flipout.training.setup import build_engine, make_trainer

    config = TrainConfig.of(
        env_id,
        population_size=population,
        hidden=HIDDEN,
        sigma=SIGMA,
        learning_rate=RATE,
        generations=2**31,
        **(
            {"backend": "ray", "worker_kind": "classic", "workers": cores}
            if kind == "classic"
            else {"threads": cores, "compile": kind}
        ),
    )
    trainer, total = make_trainer(config, build=build_classic if kind == "classic" else build_engine), 0
    if trained:
        module, norm = learned(env_id)
        trainer.strategy.load_state_dict({**trainer.strategy.state_dict(), "module": module})
        trainer.agent.norm.load_state_dict(norm.state_dict())  # pyright: ignore[reportAttributeAccessIssue]

    def step() -> float:
        nonlocal total
        total += trainer.generation().env_steps
        return total

    try:
        return generations(step, seconds)
    finally:
        trainer.close()


def learned(env_id: str) -> tuple[dict[str, Any], Any]:
    """Train a policy until its members play 95 % of the longest possible episodes; return it and its normalization."""
    from es_flipout.config import TrainConfig
    from es_flipout.training.setup import make_trainer

    config = TrainConfig.of(
        env_id,
        population_size=64,
        hidden=HIDDEN,
        sigma=0.1,
        learning_rate=LEARNING_RATE,
        generations=MOST_GENERATIONS,
        device="cpu",
        compile="off",
    )
    teacher = make_trainer(config)
    for _ in range(MOST_GENERATIONS):
        rollout = teacher.generation()
        if rollout.lengths.double().mean() >= ENOUGH * (teacher.player.max_episode_steps or 1):
            break
    teacher.close()
    return teacher.strategy.mean_module().state_dict(), teacher.agent.norm


PACKAGES = ("es-flipout", "evotorch", "sb3-contrib", "evosax", "gymnax", "jax", "torch", "gymnasium", "mujoco", "ray")
MEASURES: dict[str, Callable[[str, int, float, int], Counts]] = {
    "es_flipout": partial(ours, "off"),
    "es_flipout_classic_ray": partial(ours, "classic"),
    "trained_eager": partial(ours, "off", trained=True),
    "trained_compiled": partial(ours, "on", trained=True),
    "trained_classic": partial(ours, "classic", trained=True),
    "trained_evosax": partial(evosax, True),
    "evotorch": evotorch,
    "ars_linear": partial(ars, "LinearPolicy"),
    "ars_mlp": partial(ars, "MlpPolicy"),
    "evosax": partial(evosax, False),
}


def main() -> None:
    """Measure, and print the counts and the versions that made them."""
    name, env_id, population, seconds, cores = sys.argv[1:]
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(cores)])  # also for threads and processes of its own
    counts = MEASURES[name](env_id, int(population), float(seconds), int(cores))
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    print(json.dumps({**counts, "versions": found}))


if __name__ == "__main__":
    main()
