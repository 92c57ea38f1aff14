"""What runs on a GPU, on device "cuda" without one: fake tensors raise at host values and at mixed devices.

Fake tensors have shapes and devices, but no data: ``.item()``, a branch on a value, a boolean index and an operation on
tensors of two devices are errors. The CPU build of torch lacks device "cuda"; ``scripts/checks/fake_cuda.py`` makes an
environment with the default build, and runs this file in it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, Literal

import mujoco
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from es_flipout.config import TrainConfig
from es_flipout.envs import make, make_env
from es_flipout.envs.base import BatchEnv
from es_flipout.envs.classic import CLASSIC_TASKS
from es_flipout.envs.mujoco_tasks import MUJOCO_TASKS
from es_flipout.envs.native import NativeBatchEnv
from es_flipout.envs.observed import ObservedBatchEnv
from es_flipout.perturbations import Family
from es_flipout.policies.agent import Agent
from es_flipout.rollout import device as device_module
from es_flipout.rollout import plan
from es_flipout.rollout.builder import make_agent, make_one_env, make_strategy
from es_flipout.rollout.device import DeviceRollout, LaunchOptions
from es_flipout.rollout.device_player import DevicePlayer
from es_flipout.rollout.episodes import Episodes, Segments
from es_flipout.strategy.estimator import estimate_gradient
from es_flipout.strategy.evolution_strategy import EvolutionStrategy

pytestmark = [
    pytest.mark.skipif(torch.version.cuda is None, reason='this build of torch has no device "cuda"'),
]

CUDA = torch.device("cuda:0")
MEMBERS, SLOTS = 16, 6
PARTS = ("_begin", "_before", "_physics", "_after", "_finish", "_whole_launch")


class NoWatch:
    """The look at the flag of live slots, which needs a driver; as if no slot were live after two launches."""

    def __init__(self, device: torch.device) -> None:
        self.forget()

    def forget(self) -> None:
        self.looks = 0

    @property
    def remaining(self) -> bool:
        return self.looks < 2

    def look(self, flag: torch.Tensor) -> None:
        assert flag.device == CUDA
        self.looks += 1


class FieldsOfWarp:
    """The torch views of mujoco-warp's fields, without its physics."""

    def __init__(self, model: mujoco.MjModel, num_worlds: int, device: torch.device, **options: Any) -> None:  # pyright: ignore[reportAttributeAccessIssue]
        data = mujoco.MjData(model)  # pyright: ignore[reportAttributeAccessIssue]
        shapes = {name: getattr(getattr(data, name), "shape", ()) for name in options["fields"]}
        self.views = {name: torch.empty(num_worlds, *shape, device=device) for name, shape in shapes.items()}

    def step(self) -> None: ...

    def forward(self) -> None: ...

    def overflow(self) -> int:
        return 0

    def temporary_bytes(self) -> int:
        return 0


def starts(env: NativeBatchEnv, seeds: torch.Tensor) -> torch.Tensor:
    """Start states of the right shape; NumPy would draw them."""
    return torch.zeros(seeds.numel(), env.states().shape[1], dtype=torch.float64, device=env.device)


class WithCard:
    """torch with a card of 80 GiB, for one module only: fake tensors themselves ask whether there is a card."""

    cuda = SimpleNamespace(is_available=lambda: True, mem_get_info=lambda *device: (80 << 30, 80 << 30))

    @staticmethod
    def device(name: str) -> torch.device:
        return CUDA if name == "cuda" else torch.device(name)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def moved(module: nn.Module, device: torch.device | str) -> nn.Module:
    """``Module.to``, which cannot exchange fake tensors."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(parameter.detach().to(device), parameter.requires_grad)
        for name, buffer in part._buffers.items():
            part._buffers[name] = None if buffer is None else buffer.to(device)
    return module


def copied(tensor: FakeTensor, memo: dict[int, Any]) -> torch.Tensor:
    """``copy.deepcopy`` of a fake tensor; torch's own corrupts memory."""
    if id(tensor) not in memo:
        copy = tensor.detach().clone()
        memo[id(tensor)] = nn.Parameter(copy, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copy
    return memo[id(tensor)]


@pytest.fixture(autouse=True)
def fakes(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTensorMode]:
    monkeypatch.setattr(device_module, "_Watch", NoWatch)
    monkeypatch.setattr(make, "_require_card", lambda device: None)
    monkeypatch.setattr(NativeBatchEnv, "starts", starts)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    with contextlib.suppress(ImportError):
        monkeypatch.setattr("es_flipout.envs.mujoco_gpu.WarpPhysics", FieldsOfWarp)
    monkeypatch.setattr(nn.Module, "to", moved)
    monkeypatch.setattr(FakeTensor, "__deepcopy__", copied)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        yield mode


def config_of(env_id: str = "CartPole-v1", **changes: Any) -> TrainConfig:
    settings: dict[str, Any] = {"population_size": MEMBERS, "hidden": (8,), "device": "cuda", "physics": "gpu"}
    return TrainConfig.of(env_id, **(settings | {"kernels": "torch", "slots": SLOTS, "generations": 1} | changes))


def env_of(config: TrainConfig, slots: int = SLOTS) -> Any:
    return make_env(config.task.env_id, slots, CUDA, observed=config.task.observed, **config.task.parsed_env_kwargs())


def agent_of(config: TrainConfig, *_: Any) -> Agent:
    """The agent of a run, made on the host: its bounds and initial weights are values."""
    with unset_fake_temporarily() as mode:
        agent = make_agent(config, make_one_env(config))
        assert isinstance(mode, FakeTensorMode)
        for module in agent.module.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(mode.from_tensor(parameter.detach()))
        return agent


def strategy_of(config: TrainConfig, module: nn.Module, family: Family | None = None) -> EvolutionStrategy:
    strategy = make_strategy(config, module, CUDA)
    if family is not None:
        strategy.family = family
    return strategy


def rollout_of(config: TrainConfig, family: Family | None = None, **episodes: Any) -> DeviceRollout:
    env, agent = env_of(config), agent_of(config)
    population = strategy_of(config, agent.module, family).ask()
    seeds = torch.zeros(MEMBERS, config.task.episodes, dtype=torch.int64)
    request = Episodes(seeds, **episodes)
    rollout = DeviceRollout(env, agent, population, request, LaunchOptions(captured=False))
    rollout._load(population, request)
    return rollout


def run_all_parts(rollout: DeviceRollout) -> None:
    for part in PARTS:
        getattr(rollout, part)()
    for name, value in vars(rollout).items():
        assert not isinstance(value, torch.Tensor) or value.device == CUDA, f"{name} is on {value.device}"


def test_fakes_raise_at_host_values_and_mixed_devices() -> None:
    """Otherwise the other tests would prove nothing."""
    x = torch.zeros(3, device=CUDA)
    with pytest.raises(DataDependentOutputException):
        int(x.sum())
    with pytest.raises(Exception, match="nonzero"):
        x.add_(x[x > 0].sum())
    with pytest.raises(RuntimeError, match="device"):
        x.add_(torch.zeros(3))
    with pytest.raises(RuntimeError, match="device"):
        x.index_select(0, torch.zeros(3, dtype=torch.int64))


def test_a_launch_with_every_family(family: Family) -> None:
    run_all_parts(rollout_of(config_of(), family, moment_jobs=4))


POLICIES: list[dict[str, Any]] = [
    {"policy": "linear"},
    {"policy": "mlp", "hidden": (8, 8), "activation": "gelu", "observation_norm": False},
    {"policy": "recurrent", "cell": "gru"},
    {"policy": "recurrent", "cell": "lstm", "observed": (0, 2)},
    {"policy": "mlp", "episodes": 3, "antithetic": False, "base": "gaussian", "bases": 3},
]


@pytest.mark.parametrize("changes", POLICIES)
@pytest.mark.parametrize("perturbation", ["flipout", "low_rank", "dense"])
def test_a_launch_with_every_policy(changes: dict[str, Any], perturbation: Literal["flipout", "low_rank"]) -> None:
    run_all_parts(rollout_of(config_of(perturbation=perturbation, **changes), moment_jobs=4))


@pytest.mark.parametrize("env_id", [*CLASSIC_TASKS, *MUJOCO_TASKS])
def test_a_launch_with_every_environment(env_id: str) -> None:
    if env_id in MUJOCO_TASKS:
        pytest.importorskip("mujoco_warp")
    rollout = rollout_of(config_of(env_id), moment_jobs=4)
    assert (rollout._parts is not None) == (env_id in MUJOCO_TASKS)
    run_all_parts(rollout)


def test_a_launch_with_parts_behind_a_partial_observation() -> None:
    pytest.importorskip("mujoco_warp")
    rollout = rollout_of(config_of("Hopper-v5", observed=(0, 3)))
    assert isinstance(rollout.env, ObservedBatchEnv)
    run_all_parts(rollout)


def test_segments_of_episodes() -> None:
    state = torch.zeros(MEMBERS, 1, 4, dtype=torch.float64)
    segments = Segments(state, torch.zeros(MEMBERS, 1, dtype=torch.int64))
    run_all_parts(rollout_of(config_of(), step_cap=3, segments=segments))


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Hopper-v5"])
def test_the_player(env_id: str) -> None:
    """It needs the first host value when it reads the results."""
    if env_id in MUJOCO_TASKS:
        pytest.importorskip("mujoco_warp")
    config, launched = config_of(env_id), []
    agent = agent_of(config)
    player = DevicePlayer(agent, lambda slots: env_of(config, slots), SLOTS, launch=LaunchOptions(captured=False))
    strategy = strategy_of(config, agent.module)
    episodes = Episodes(torch.zeros(MEMBERS, 1, dtype=torch.int64), moment_jobs=4)
    for generation in range(2):
        strategy.generation = generation
        with pytest.raises(DataDependentOutputException):
            player.play(strategy.ask(), episodes)
        (rollout,) = player._rollouts.values()
        launched.append(rollout)
        assert isinstance(rollout._watch, NoWatch)
        assert rollout._watch.looks == 2, "a host value was needed before the end"
    assert launched[0] is launched[1]


@pytest.mark.parametrize("shaping", ["differences", "ranks"])
def test_the_estimator(family: Family, shaping: Literal["differences", "ranks"], fakes: FakeTensorMode) -> None:
    """Ranks need the number of different values, once per generation; everything else needs no value."""
    config = config_of(shaping=shaping, weight_decay=0.01)
    strategy = strategy_of(config, agent_of(config).module, family)
    population = strategy.ask()
    gradient = estimate_gradient(population, torch.zeros(MEMBERS, device=CUDA))
    assert {value.device for value in gradient.values()} == {CUDA}
    if shaping == "ranks":
        fakes.shape_env = ShapeEnv()  # shapes that depend on data are symbols
    strategy.tell(torch.zeros(MEMBERS))  # on the host, as players return them
    assert strategy.generation == 1
    assert {parameter.device for parameter in population.member(3).parameters()} == {CUDA}


PLANS: list[dict[str, Any]] = [
    {},
    {"perturbation": "low_rank"},
    {"perturbation": "dense"},
    {"policy": "recurrent"},
    {"env_id": "HalfCheetah-v5"},
    {"env_id": "Humanoid-v5", "observed": (1, 2)},
]


@pytest.mark.parametrize("changes", PLANS)
def test_the_plan(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that a plan creates is on the GPU where there is one."""
    if changes.get("env_id"):
        pytest.importorskip("mujoco_warp")
    made: list[BatchEnv] = []

    def counted(*roots: Any) -> int:  # addresses are real tensors' only
        made.extend(root for root in roots if isinstance(root, BatchEnv))
        return 1000 * len(roots)

    monkeypatch.setattr(plan, "torch", WithCard())
    monkeypatch.setattr(plan, "stored_bytes", counted)
    monkeypatch.setattr(plan, "make_agent", agent_of)
    found = plan.make_plan(config_of(**changes, slots=None))
    assert math.isfinite(found.total)
    assert found.free == 80 << 30
    assert found.slots == MEMBERS
    assert {env.device for env in made} <= {CUDA, torch.device("cuda")}
    assert len(made) == 3
