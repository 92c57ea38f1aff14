"""One run of one method, in a process of its own: ``python _rl_worker.py SPEC``, where SPEC is a JSON object (:class:`Spec`).

Trains for some seconds of wall time, saving the policy at marks; then plays every saved policy in real Gymnasium environments,
and prints one line of JSON for each. A policy that is there already is neither trained nor, if ``evaluated`` names its mark,
played again. Only public interfaces of the methods. Runs with the Python that has the method (see ``against_rl.py``): of this
repository it imports the settings of rl-zoo and, for its own method, the engine.

The clock runs from the first to the last step of training, with everything that the method does in between. Imports, the creation
of environments, processes and networks, and the writing of the snapshots are outside it.
"""

# The peers are installed in another environment.
# pyright: reportMissingImports=false
from __future__ import annotations

import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np

from scripts.learning._rl_zoo import SETTINGS

FIRST_SEED = 1_000_000  # of the start states, as `es-flipout evaluate` has it
PACKAGES = ("stable-baselines3", "sb3-contrib", "torch", "gymnasium", "mujoco", "numpy")

Act = Callable[[np.ndarray], np.ndarray]  # observations (n, O) to actions (n, A)


@dataclass(frozen=True)
class Vector:
    """How PPO steps its environments, and the threads of its update."""

    kind: str = "dummy"
    n_envs: int = 1
    threads: int = 1


@dataclass(frozen=True)
class Spec:
    """What to run.

    Attributes:
        method: es_flipout, ppo, sac or ars.
        env_id, seed: the task, and the seed of the run.
        cores: numbers of the cores that the process may use.
        marks: seconds of training after which the policy is saved; the last one ends the run.
        folder: where the policies are saved.
        episodes, final_episodes: episodes of an evaluation, and of the last one.
        vector: PPO's environments; None leaves them to rl-zoo.
        evaluated: marks that need no evaluation.
        trial: only count PPO's steps per second, for as long as the last mark.
    """

    method: str
    env_id: str
    seed: int
    cores: list[int]
    marks: list[float]
    folder: str
    episodes: int = 20
    final_episodes: int = 100
    vector: Vector | None = None
    evaluated: list[float] = field(default_factory=list)
    trial: bool = False

    def text(self) -> str:
        """Everything that the training depends on, as text."""
        values = asdict(self)
        without = ("evaluated", "episodes", "final_episodes", "folder")
        return json.dumps({name: value for name, value in values.items() if name not in without}, sort_keys=True)


class TimeIsUp(Exception):  # noqa: N818  (not an error)
    """Ends a training that has no other way to be ended."""


class Clock:
    """Seconds of training; stands still while a snapshot is written.

    Attributes:
        left: the marks that are still to come.
    """

    def __init__(self, spec: Spec) -> None:
        self.folder, self.left, self.limit = Path(spec.folder), list(spec.marks), spec.marks[-1]
        self._began = 0.0

    def start(self) -> None:
        """Start at zero."""
        self._began = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds so far."""
        return time.perf_counter() - self._began

    def look(self, env_steps: int, save: Callable[[Path], None]) -> None:
        """Save the policy if a mark has passed (under the last one, if several have)."""
        now = self.seconds
        if self.left and now >= self.left[0]:
            passed = [mark for mark in self.left if mark <= now]
            self.left = self.left[len(passed) :]
            self._write(passed[-1], now, env_steps, save)

    def finish(self, env_steps: int, save: Callable[[Path], None]) -> None:
        """Save the last policy, if the training ended before the last mark."""
        if self.left:
            self.left = []
            self._write(self.limit, self.seconds, env_steps, save)

    def _write(self, mark: float, now: float, env_steps: int, save: Callable[[Path], None]) -> None:
        save(self.folder / name_of(mark))
        with (self.folder / "snapshots.jsonl").open("a", encoding="utf-8") as file:
            row = {"mark_s": mark, "wall_s": round(now, 2), "env_steps": int(env_steps), "final": mark == self.limit}
            file.write(json.dumps(row) + "\n")
        self._began += self.seconds - now


def name_of(mark: float) -> str:
    """The folder of the policy that was saved at a mark."""
    return f"at_{mark:g}s"


def snapshots(folder: Path) -> list[dict[str, Any]]:
    """What was saved in a folder, in order."""
    path = folder / "snapshots.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def trained(spec: Spec) -> bool:
    """Whether the folder holds a complete training of this specification."""
    folder = Path(spec.folder)
    path, saved = folder / "spec.json", snapshots(folder)
    return path.exists() and path.read_text(encoding="utf-8") == spec.text() and bool(saved) and saved[-1]["final"]


# This engine


def train_es_flipout(spec: Spec, clock: Clock) -> None:
    """The preset; its schedules end where the time ends."""
    from es_flipout.presets import preset
    from es_flipout.training import run_directory
    from es_flipout.training.metrics import Metrics, Silent
    from es_flipout.training.setup import make_trainer

    # A GPU is left out of a comparison on cores. One update, before the rate is known, has the preset's length of run.
    config = preset(spec.env_id).replace(seed=spec.seed, device="cpu", physics="cpu", threads=len(spec.cores))
    config = config.replace(env_steps=config.schedule.env_steps or 1_000_000, generations=None)

    def save(folder: Path) -> None:
        run_directory.create(folder, trainer.config)
        for which in ("best", "last"):
            run_directory.save_policy(folder, trainer.trained_agent(which).state_dict(), which)

    class Watch(Silent):
        """After every generation: save at marks, and set the steps of the run to what fits into the time."""

        before = 0.0

        def show(self, metrics: Metrics, progress: float) -> None:
            """See the class."""
            now, steps = clock.seconds, metrics.env_steps
            took, self.before = now - self.before, now
            if now >= clock.limit:
                trainer.interrupt()
            elif not trainer.finished:
                clock.look(steps, save)
                total = math.ceil(steps * clock.limit / now)
                if now + 2 * took > clock.limit:  # the next generation is the last one that fits
                    total = steps + 1
                trainer.config = trainer.config.replace(env_steps=max(total, steps + 1))

    trainer = make_trainer(config, None, Watch())
    try:
        clock.start()
        trainer.train()
        if trainer.interrupted and clock.seconds < clock.limit:
            raise KeyboardInterrupt
        clock.finish(trainer.progress.env_steps, save)
    finally:
        trainer.close()


def load_es_flipout(spec: Spec, folder: Path, rows: int) -> Act:
    """The best mean policy by the engine's own scores, which is what `es-flipout evaluate` takes."""
    import torch

    from es_flipout.training.run_directory import load_agent

    agent, _ = load_agent(folder)
    state = agent.initial_state(rows)

    def act(obs: np.ndarray) -> np.ndarray:
        nonlocal state
        actions, state = agent.act(torch.as_tensor(obs), state)
        return actions.numpy()

    return act


# stable-baselines3 and sb3-contrib


def algorithm(method: str) -> Any:
    """The class of an algorithm."""
    if method == "ars":
        from sb3_contrib import ARS

        return ARS
    import stable_baselines3

    return getattr(stable_baselines3, method.upper())


def build(spec: Spec, settings: dict[str, Any]) -> tuple[Any, Callable[[int], Any]]:
    """The model with rl-zoo's settings, and what makes more environments like its own by their seeds."""
    import torch
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecNormalize

    n_envs, normalize, vector = settings.pop("n_envs"), settings.pop("normalize"), spec.vector
    if vector is not None:  # as many steps per update as rl-zoo has, divided among more environments
        settings["n_steps"] = n_envs * settings["n_steps"] // vector.n_envs
        n_envs = vector.n_envs
    kind = SubprocVecEnv if vector is not None and vector.kind == "subproc" else DummyVecEnv

    def make(seed: int, number: int = 1) -> Any:
        env = make_vec_env(spec.env_id, number, seed, vec_env_cls=kind)
        if normalize is None:
            return env
        discount = {"gamma": settings["gamma"]} if "gamma" in settings else {}
        return VecNormalize(env, **normalize, **discount)

    # ARS has one small forward per step, and SAC's products are all there is to spread over the cores.
    torch.set_num_threads(vector.threads if vector is not None else len(spec.cores) if spec.method == "sac" else 1)
    model = algorithm(spec.method)(env=make(spec.seed, n_envs), seed=spec.seed, device="cpu", **settings)
    return model, make


def train_peer(spec: Spec, clock: Clock) -> None:
    """PPO, SAC or ARS until the time is up."""
    from stable_baselines3.common.callbacks import BaseCallback

    class Watch(BaseCallback):
        """Saves the policy at marks, and ends the run."""

        def _on_step(self) -> bool:
            if not asynchronous:
                self._look()
            return True

        def _on_rollout_start(self) -> None:
            if asynchronous:  # its steps are counted when all candidates have been evaluated
                self._look()

        def _look(self) -> None:
            clock.look(self.model.num_timesteps, self._save)
            if not clock.left:
                raise TimeIsUp

        def _save(self, folder: Path) -> None:
            folder.mkdir()
            self.model.save(folder / "model.zip")
            normalization = self.model.get_vec_normalize_env()
            if normalization is not None:
                normalization.save(str(folder / "normalization.pkl"))

    model, make = build(spec, SETTINGS[spec.method](spec.env_id))
    more, close, asynchronous = {}, model.env.close, spec.method == "ars" and len(spec.cores) > 1
    if asynchronous:
        from sb3_contrib.common.vec_env import AsyncEval

        seeds = [spec.seed + 1 + number for number in range(len(spec.cores))]
        more["async_eval"] = AsyncEval([lambda seed=seed: make(seed) for seed in seeds], model.policy)
        more["async_eval"].get_obs_rms()  # when this answers, the processes have started
        close = more["async_eval"].close
    clock.start()
    try:
        model.learn(10**12, callback=Watch(), log_interval=None, **more)
    except TimeIsUp:
        close()


def load_peer(spec: Spec, folder: Path, rows: int) -> Act:
    """The deterministic policy with the observation statistics of its time."""
    import gymnasium
    from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

    model = algorithm(spec.method).load(folder / "model.zip", device="cpu")
    path = folder / "normalization.pkl"
    if not path.exists():
        return lambda obs: model.predict(obs, deterministic=True)[0]
    normalization = VecNormalize.load(str(path), DummyVecEnv([lambda: gymnasium.make(spec.env_id)]))
    return lambda obs: model.predict(normalization.normalize_obs(obs), deterministic=True)[0]


def pace(spec: Spec) -> float:
    """PPO's environment steps per second, rollouts and updates, without the first."""
    from stable_baselines3.common.callbacks import BaseCallback

    class Count(BaseCallback):
        """Notes time and steps where a rollout begins."""

        notes: list[tuple[float, int]]

        def _on_training_start(self) -> None:
            self.notes = []

        def _on_step(self) -> bool:
            return True

        def _on_rollout_start(self) -> None:
            self.notes.append((time.perf_counter(), self.num_timesteps))
            if len(self.notes) > 2 and self.notes[-1][0] - self.notes[0][0] >= spec.marks[-1]:
                raise TimeIsUp

    model, _ = build(spec, SETTINGS["ppo"](spec.env_id))
    count = Count()
    try:
        model.learn(10**12, callback=count, log_interval=None)
    except TimeIsUp:
        model.env.close()
    (start, before), (end, after) = count.notes[1], count.notes[-1]
    return (after - before) / (end - start)


# Evaluation


def play(act: Act, env_id: str, episodes: int) -> np.ndarray:
    """Undiscounted returns ``(episodes,)`` in as many environments of Gymnasium, which take their steps together."""
    import gymnasium

    envs = [gymnasium.make(env_id) for _ in range(episodes)]
    obs = np.stack([env.reset(seed=FIRST_SEED + number)[0] for number, env in enumerate(envs)])
    returns, alive = np.zeros(episodes), list(range(episodes))
    while alive:
        actions = act(obs)
        for number in alive.copy():
            obs[number], reward, terminated, truncated, _ = envs[number].step(actions[number])
            returns[number] += float(reward)
            if terminated or truncated:
                alive.remove(number)
                envs[number].close()
    return returns


def evaluate(spec: Spec, say: Callable[[dict[str, Any]], None]) -> None:
    """Play the saved policies, and say a row for each."""
    load = load_es_flipout if spec.method == "es_flipout" else load_peer
    run = {"env_id": spec.env_id, "method": spec.method, "cores": len(spec.cores), "seed": spec.seed}
    for saved in snapshots(Path(spec.folder)):
        if saved["mark_s"] not in spec.evaluated:
            episodes = spec.final_episodes if saved["final"] else spec.episodes
            act = load(spec, Path(spec.folder) / name_of(saved["mark_s"]), episodes)
            returns = play(act, spec.env_id, episodes)
            score = {"mean_return": float(returns.mean()), "std_return": float(returns.std()), "episodes": episodes}
            say({**run, **saved, **score})


def versions() -> dict[str, str]:
    """Versions of the packages that are installed here."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def main() -> None:
    """Train, and evaluate."""
    values = json.loads(sys.argv[1])
    vector = values.pop("vector", None)
    spec = Spec(**values, vector=None if vector is None else Vector(**vector))
    os.sched_setaffinity(0, spec.cores)  # first: what is made from here on inherits it

    def say(row: dict[str, Any]) -> None:
        print(json.dumps(row), flush=True)

    say({"versions": versions()})
    if spec.trial:
        say({"steps_per_s": round(pace(spec), 1)})
        return
    if not trained(spec):
        folder = Path(spec.folder)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / "spec.json").write_text(spec.text(), encoding="utf-8")
        (train_es_flipout if spec.method == "es_flipout" else train_peer)(spec, Clock(spec))
    evaluate(spec, say)


if __name__ == "__main__":
    main()
