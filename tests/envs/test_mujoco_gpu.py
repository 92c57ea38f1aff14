"""The MuJoCo environments in mujoco-warp, on warp's CPU device, compared with the CPU backend (equal to Gymnasium)."""

import functools
import inspect
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from no_synchronization import no_synchronization
from numpy.typing import NDArray
from populations import agent_of

from es_flipout.envs import UnsupportedEnvironmentError, make_env
from es_flipout.envs.mujoco_cpu import MujocoBatchEnv
from es_flipout.envs.mujoco_tasks import MUJOCO_TASKS
from es_flipout.envs.native import build_task
from es_flipout.policies.networks import MLP
from es_flipout.rollout.device import DeviceRollout, LaunchOptions
from es_flipout.rollout.host import run
from es_flipout.strategy.evolution_strategy import EvolutionStrategy
from tests.envs.oracle import random_action

wp = pytest.importorskip("warp")
pytest.importorskip("mujoco_warp")
if not torch.cuda.is_available():
    wp.config.optimization_level = 0  # less than half the compilation time, which dominates here

from es_flipout.envs import plane_capsule, warp_physics  # noqa: E402
from es_flipout.envs.mujoco_gpu import MujocoWarpBatchEnv, make_warp_env  # noqa: E402
from es_flipout.envs.warp_physics import Sizes, missing_driver  # noqa: E402
from es_flipout.rollout.episodes import Episodes  # noqa: E402

QUICK = ("HalfCheetah-v5", "Ant-v5", "Humanoid-v5")
ALL = [pytest.param(env_id, marks=() if env_id in QUICK else pytest.mark.slow) for env_id in MUJOCO_TASKS]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def cpu_env(env_id: str, num_envs: int, **kwargs: Any) -> MujocoBatchEnv:
    env = make_env(env_id, num_envs, **kwargs)
    assert isinstance(env, MujocoBatchEnv)
    return env


def fields(env: MujocoBatchEnv | MujocoWarpBatchEnv) -> dict[str, NDArray[np.float64]]:
    """Return copies of the simulations' fields as float64 NumPy arrays."""
    arrays = {n: v.cpu().numpy() if isinstance(v, torch.Tensor) else v for n, v in env._fields.items()}
    return {name: array.astype(np.float64) for name, array in arrays.items()}


@functools.cache
def trajectory(env_id: str) -> tuple[NDArray[np.float64], torch.Tensor]:
    """Return 64 consecutive states of one slot, ``(64, K)``, rounded to float32, and its actions ``(64, A)``."""
    env, rng = cpu_env(env_id, 1), np.random.default_rng(0)
    env.reset(torch.tensor([3]))
    states, actions = [], []
    for step in range(64):
        at = fields(env)
        states.append(np.concatenate((at["qpos"][0], at["qvel"][0])).astype(np.float32))
        actions.append(torch.from_numpy(random_action(env, rng)))
        if env.step(actions[-1])[2].any():
            env.reset(torch.tensor([4 + step]))
    return np.stack(states).astype(np.float64), torch.cat(actions)


def error(got: NDArray[np.float64], expected: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the largest error of each slot, relative for large values."""
    return (np.abs(got - expected) / (1 + np.abs(expected))).reshape(len(got), -1).max(1)


def stepped(env_id: str, device: str, every: int, **kwargs: Any) -> tuple[Any, Any, Any, Any]:
    """Step both backends once from each ``every``-th state of the trajectory; return them and the outcomes."""
    states, actions = trajectory(env_id)
    states, actions = states[::every], actions[::every]
    rows = np.arange(len(states))
    cpu, gpu = cpu_env(env_id, len(states), **kwargs), make_warp_env(env_id, len(states), device, **kwargs)
    started = [env.restart(rows, states).cpu().numpy() for env in (cpu, gpu)]
    assert error(started[1], started[0]).max() < 1e-5
    expected, got = ([value.cpu().numpy() for value in env.step(actions.to(env.device))] for env in (cpu, gpu))
    assert gpu.overflow() == 0
    assert not gpu.diverged.any()
    return cpu, gpu, expected, got


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("env_id", ALL)
def test_one_physics_step_is_that_of_mujoco(env_id: str, device: str) -> None:
    """With the bug that plane_capsule corrects, the error of Ant's velocities is 0.2."""
    cpu, gpu, expected, got = stepped(env_id, device, 1, frame_skip=1)
    at_cpu, at_gpu = fields(cpu), fields(gpu)
    assert error(at_gpu["qpos"], at_cpu["qpos"]).max() < 1e-5
    assert error(at_gpu["qvel"], at_cpu["qvel"]).max() < 1e-4
    for name in cpu._task.derived_fields():
        assert np.abs(at_gpu[name] - at_cpu[name]).max() < 1e-4 * (1 + np.abs(at_cpu[name]).max()), name
    np.testing.assert_allclose(got[1], expected[1], rtol=0, atol=1e-4)
    np.testing.assert_array_equal(got[2], expected[2])
    np.testing.assert_array_equal(got[3], expected[3])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("env_id", ALL)
def test_ten_physics_steps_are_those_of_mujoco(env_id: str, device: str) -> None:
    """Up to float32 rounding, which a contact can amplify a thousand times."""
    cpu, gpu, expected, got = stepped(env_id, device, 3, frame_skip=10)
    errors = error(fields(gpu)["qvel"], fields(cpu)["qvel"])
    assert np.quantile(errors, 0.9) < 1e-4
    assert errors.max() < 1e-2
    np.testing.assert_allclose(got[1], expected[1], rtol=0, atol=1e-3)
    np.testing.assert_array_equal(got[2], expected[2])


@pytest.mark.parametrize("env_id", ALL)
def test_torch_computes_the_task_as_numpy_does(env_id: str) -> None:
    states, actions = trajectory(env_id)
    env = make_warp_env(env_id, 64, "cpu", frame_skip=2)
    numpy_env = cpu_env(env_id, 1, frame_skip=2)
    env.restart(np.arange(64), states)
    before = env._task.before(np, numpy_env._model, fields(env))
    observation, reward, terminated, _ = env.step(actions)
    at = fields(env)
    assert observation.dtype == torch.float32
    assert reward.dtype == torch.float64
    expected = env._task.observation(np, numpy_env._model, at)
    np.testing.assert_allclose(observation.numpy(), expected, rtol=1e-5, atol=1e-5)
    expected = env._task.outcome(np, numpy_env._model, at, before, actions.numpy())
    # velocities are differences of float32 positions over a few milliseconds
    np.testing.assert_allclose(reward.numpy(), expected[0], rtol=1e-4, atol=2e-4)
    assert expected[1] is None or np.array_equal(terminated.numpy(), expected[1])


def test_describes_itself_as_the_cpu_does() -> None:
    env, other = make_warp_env("HalfCheetah-v5", 2, "cpu", max_episode_steps=2), make_env("HalfCheetah-v5", 2)
    assert (env.backend, env.max_episode_steps, env.kwargs) == ("mujoco-warp", 2, {"max_episode_steps": 2})
    assert (env.device, env.terminates) == (other.device, other.terminates) == (torch.device("cpu"), False)
    assert env.action_space == other.action_space
    assert env._physics._model.opt.deterministic == 0  # otherwise the documentation promises too little
    assert env.observation_space.shape == other.observation_space.shape
    assert env.observation_space.dtype == np.float32
    assert torch.equal(env.reset(torch.arange(2)), other.reset(torch.arange(2)).float())
    assert env.step(torch.zeros(2, 6))[3].tolist() == [False, False]
    env.reset(torch.arange(2), torch.tensor([True, False]))
    assert env.step(torch.zeros(2, 6))[3].tolist() == [False, True]
    with pytest.raises(ValueError, match=r"must have shape \(2, 6\), got \(6,\)"):
        env.step(torch.zeros(6))
    with pytest.raises(UnsupportedEnvironmentError, match="unsupported keyword 'gravity'"):
        make_warp_env("HalfCheetah-v5", 2, "cpu", gravity=3)
    with pytest.raises(UnsupportedEnvironmentError, match="CartPole-v1 is not one of"):
        make_warp_env("CartPole-v1", 2, "cpu")


@pytest.mark.parametrize("env_id", QUICK)
def test_frozen_slots_are_parked(env_id: str) -> None:
    """They return no rewards, stay finite and do not drift; the others are not affected."""
    env, alone = (make_warp_env(env_id, 3, "cpu", frame_skip=1) for _ in range(2))
    for each in (env, alone):
        each.reset(torch.arange(3))
    live, rng = torch.tensor([True, False, True]), np.random.default_rng(0)
    shown = []
    for step in range(4):
        action = torch.from_numpy(random_action(env, rng))
        expected = alone.step(action)
        if step == 3:
            action[1] = torch.nan
        observation, reward, terminated, truncated = env.step(action, live)
        assert torch.equal(observation[::2], expected[0][::2])
        assert torch.equal(reward[::2], expected[1][::2])
        assert observation.isfinite().all()
        assert not reward[1]
        assert not (terminated | truncated | env.diverged)[1]
        shown.append(observation[1])
    assert torch.equal(shown[0], shown[1])
    assert torch.equal(shown[1], shown[2])


@pytest.mark.parametrize("env_id", QUICK)
def test_restart_where_leaves_the_others_alone(env_id: str) -> None:
    env, alone, new = (make_warp_env(env_id, 4, "cpu", frame_skip=1) for _ in range(3))
    for each in (env, alone):
        each.reset(torch.arange(4))
    starts = env.starts(torch.tensor([7, 8, 7, 9]))
    assert starts.dtype == torch.float64
    assert torch.equal(starts[0], starts[2])
    assert not torch.equal(starts[0], starts[1])
    fresh = new.reset(torch.tensor([7, 8, 7, 9]))
    mask, rng = torch.tensor([False, True, False, True]), np.random.default_rng(0)
    starts[~mask] = torch.nan
    where = {name: view.data_ptr() for name, view in env._fields.items()}
    shown = env.reset(torch.arange(4))
    for _ in range(3):
        for _ in range(2):
            action = torch.from_numpy(random_action(env, rng))
            shown, expected = env.step(action), alone.step(action)
            assert all(torch.equal(a[~mask], b[~mask]) for a, b in zip(shown, expected, strict=True))
        observation = env.restart_where(mask, starts)
        assert torch.equal(observation[~mask], shown[0][~mask])
        assert torch.equal(observation[mask], fresh[mask])
    assert env._elapsed.tolist() == [6, 0, 6, 0]
    assert {name: view.data_ptr() for name, view in env._fields.items()} == where


@pytest.mark.parametrize("env_id", ["InvertedPendulum-v5", "Ant-v5"])  # without and with a cost of the action
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, 1e30])
def test_bad_actions_end_the_slot(env_id: str, poison: float) -> None:
    env, clean = (make_warp_env(env_id, 3, "cpu", frame_skip=1) for _ in range(2))
    for each in (env, clean):
        each.reset(torch.arange(3))
    action = torch.zeros(3, *(env.action_space.shape or ()))
    expected = clean.step(action)
    action[1] = poison
    observation, reward, terminated, _ = env.step(action)
    assert env.diverged.tolist() == terminated.tolist() == [False, True, False]
    assert reward[1] == 0
    assert observation.isfinite().all()
    assert torch.equal(observation[::2], expected[0][::2])
    assert torch.equal(reward[::2], expected[1][::2])


@pytest.mark.parametrize("env_id", ["HalfCheetah-v5", "Ant-v5"])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, 1e20])
@pytest.mark.parametrize("name", ["qpos", "qvel"])
def test_a_diverged_slot_can_be_used_again(env_id: str, poison: float, name: str) -> None:
    env, clean = (make_warp_env(env_id, 3, "cpu", frame_skip=1) for _ in range(2))
    for each in (env, clean):
        each.reset(torch.arange(3))
    reference = make_warp_env(env_id, 1, "cpu")._observe()
    action = torch.zeros(3, *(env.action_space.shape or ()))
    env._fields[name][1] = poison
    observation, reward, terminated, _ = env.step(action)
    expected = clean.step(action)
    assert env.diverged.tolist() == terminated.tolist() == [False, True, False]
    assert reward[1] == 0
    assert torch.equal(observation[1], reference[0])
    assert torch.equal(observation[::2], expected[0][::2])
    assert env.step(action)[0].isfinite().all()
    assert not env.diverged.any()
    mask = torch.tensor([False, True, False])
    assert torch.equal(env.reset(torch.arange(3), mask)[1], clean.reset(torch.arange(3))[1])
    assert torch.equal(env.step(action)[0][1], clean.step(action)[0][1])


@pytest.mark.parametrize("sizes", [Sizes(contacts=1, constraints=48), Sizes(contacts=12, constraints=2)])
def test_overflow_is_counted(sizes: Sizes) -> None:
    task = build_task(MUJOCO_TASKS["HalfCheetah-v5"], "HalfCheetah-v5", {})
    env = MujocoWarpBatchEnv("HalfCheetah-v5", task, 4, {}, torch.device("cpu"), sizes)
    assert env.overflow() == 0
    env.reset(torch.arange(4))
    for _ in range(15):
        env.step(torch.ones(4, 6))
    assert 1 <= env.overflow() <= 4
    assert env.overflow() == 0


def test_the_rollout_without_the_host_is_that_with_it() -> None:
    """More episodes than slots, so that slots are restarted while others continue."""
    kwargs = {"frame_skip": 1, "healthy_z_range": (0.7, 1.0)}  # some episodes are short
    env, other = (make_warp_env("Ant-v5", 4, "cpu", **kwargs) for _ in range(2))
    module = MLP(env.observation_space.shape[0], 8, (8,))
    population = EvolutionStrategy(module, population_size=10, sigma=0.3).ask()
    episodes = Episodes(torch.arange(10)[:, None], step_cap=6)
    rollout = DeviceRollout(env, agent_of(env), population, episodes, LaunchOptions(4))  # pyright: ignore[reportArgumentType]
    got = rollout.play(population, episodes)
    expected = run(population, other, episodes)
    assert torch.equal(got.returns, expected.returns)
    assert torch.equal(got.lengths, expected.lengths)
    assert got.lengths.min() < 4
    assert got.lengths.max() == 6


@pytest.mark.parametrize(
    "env_id",
    ["HalfCheetah-v5", *(pytest.param(env_id, marks=pytest.mark.slow) for env_id in ("Ant-v5", "Humanoid-v5"))],
)
def test_parts_of_a_step_can_be_compiled_whole(env_id: str) -> None:
    """``fullgraph`` raises where the host is needed."""
    torch.compiler.reset()
    env = make_warp_env(env_id, 4, "cpu")
    begin = torch.compile(env.begin_step, fullgraph=True, backend="aot_eager")
    end = torch.compile(env.end_step, fullgraph=True, backend="aot_eager")
    action, live = torch.full_like(env.controls, 0.3), torch.tensor([True, True, False, True])
    states = env.states()
    outcomes = []
    for first, last in ((env.begin_step, env.end_step), (begin, end)):
        env.restart_where(torch.ones_like(live), states)
        first(action, live)
        env.run_physics()
        outcomes.append(last())
    for one, other in zip(*outcomes, strict=True):
        assert torch.equal(one, other)


def test_temporary_memory_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    env = make_warp_env("HalfCheetah-v5", 16, "cpu")
    solver_alone = 16 * 48 * 5 * 4  # five numbers per constraint
    assert solver_alone < env.temporary_bytes() < 20 * solver_alone

    def allocate() -> None:
        one = wp.empty(300_000, dtype=float)
        del one
        two, three = wp.empty(200_000, dtype=float), wp.empty(250_000, dtype=float)
        del two, three

    monkeypatch.setattr(env._physics, "_enqueue_step", allocate)
    assert env.temporary_bytes() == pytest.approx(4 * 450_000, rel=0.01), "the most at the same time"


def test_returned_tensors_are_not_overwritten() -> None:
    env = make_warp_env("Ant-v5", 2, "cpu")
    outcome = [env.reset(torch.arange(2)), *env.step(torch.ones(2, 8))]
    copies = [value.clone() for value in outcome]
    env.step(-torch.ones(2, 8))
    env.restart_where(torch.tensor([True, False]), env.starts(torch.arange(2)))
    assert all(torch.equal(a, b) for a, b in zip(outcome, copies, strict=True))


def test_the_correction_is_of_the_function_it_was_made_for() -> None:
    """If mujoco-warp's own function has changed, review it: the correction is then disabled and may be obsolete."""
    assert plane_capsule.needs_correction()
    assert plane_capsule.collision_primitive.plane_capsule is plane_capsule._aligned_plane_capsule
    wrapper = inspect.getsource(plane_capsule.collision_primitive.plane_capsule_wrapper.func)  # pyright: ignore[reportFunctionMemberAccess]
    assert "= plane_capsule(" in wrapper


def test_the_correction_steps_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plane_capsule, "_WRONG_COMPARISON", "something that mujoco-warp no longer says")
    monkeypatch.setattr(plane_capsule.collision_primitive, "plane_capsule", "its own")
    plane_capsule.correct_plane_capsule()
    assert plane_capsule.collision_primitive.plane_capsule == "its own"


def test_foreign_model(tmp_path: Any) -> None:
    """A user's model file runs, with larger sizes; unsupported models give a one-line error."""
    from gymnasium.envs.mujoco.mujoco_env import expand_model_path

    with open(expand_model_path("half_cheetah.xml"), encoding="utf-8") as shipped:
        text = shipped.read()
    (tmp_path / "mine.xml").write_text(text)
    own = make_warp_env("HalfCheetah-v5", 2, "cpu", xml_file=str(tmp_path / "mine.xml"))
    shipped_env = make_warp_env("HalfCheetah-v5", 2, "cpu")
    for each in (own, shipped_env):
        each.reset(torch.arange(2))
    torch.testing.assert_close(own.step(torch.ones(2, 6))[0], shipped_env.step(torch.ones(2, 6))[0])
    (tmp_path / "bad.xml").write_text(text.replace("<option ", '<option noslip_iterations="3" integrator="discrete" '))
    with pytest.raises(UnsupportedEnvironmentError, match=r"cannot run on mujoco-warp: .*not") as caught:
        make_warp_env("HalfCheetah-v5", 2, "cpu", xml_file=str(tmp_path / "bad.xml"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("toolkit", "driver", "fault"),
    [
        ((13, 4), (13, 0), None),
        ((12, 9), (12, 8), None),
        ((13, 4), (12, 8), r"supports CUDA 13\.0 \(580 or newer\); this one supports CUDA 12\.8"),
        ((12, 9), (12, 2), r"supports CUDA 12\.4 \(550 or newer\); this one supports CUDA 12\.2"),
        ((13, 4), None, r"there is none"),
        (None, None, "no CUDA"),
    ],
)
def test_driver(toolkit: tuple[int, int] | None, driver: tuple[int, int] | None, fault: str | None) -> None:
    said = missing_driver(toolkit, driver)
    assert (said is None) if fault is None else re.search(fault, said or "")


def test_an_old_driver_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(warp_physics.wp, "get_cuda_toolkit_version", lambda: (13, 4))
    monkeypatch.setattr(warp_physics.wp, "get_cuda_driver_version", lambda: (12, 8))
    with pytest.raises(UnsupportedEnvironmentError, match=r"cannot run on 'cuda:0': .* CUDA 13\.0 \(580"):
        make_env("HalfCheetah-v5", 1, device="cuda")


def eager(env: MujocoWarpBatchEnv, enqueue: Callable[[], None]) -> None:
    with wp.ScopedStream(env._physics._stream(), sync_enter=False):
        enqueue()


@pytest.mark.gpu
@pytest.mark.parametrize("env_id", ["HalfCheetah-v5", "Ant-v5", "Humanoid-v5"])
def test_graph_equals_eager(env_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to rounding: the order in which contacts are found is not fixed on a GPU."""
    states, actions = trajectory(env_id)
    env, other = make_warp_env(env_id, 64, "cuda"), make_warp_env(env_id, 64, "cuda")
    monkeypatch.setattr(other._physics, "_run", functools.partial(eager, other))
    starts = torch.from_numpy(states).cuda()
    everything = torch.ones(64, dtype=torch.bool, device="cuda")
    torch.testing.assert_close(env.restart_where(everything, starts), other.restart_where(everything, starts))
    got, expected = env.step(actions.cuda()), other.step(actions.cuda())
    assert error(fields(env)["qvel"], fields(other)["qvel"]).max() < 1e-3
    torch.testing.assert_close(got[1], expected[1], rtol=1e-3, atol=1e-3)
    assert torch.equal(got[2], expected[2])


@pytest.mark.gpu
@pytest.mark.parametrize("env_id", ["HalfCheetah-v5", "Ant-v5", "Humanoid-v5"])
def test_nothing_waits_for_the_host(env_id: str) -> None:
    env = make_warp_env(env_id, 64, "cuda")
    starts = env.starts(torch.arange(64))
    mask = torch.arange(64, device="cuda") % 2 == 0
    action = torch.zeros(64, *(env.action_space.shape or ()), device="cuda")
    with no_synchronization():
        env.restart_where(mask, starts)
        observation = env.step(action, mask)[0]
    assert observation.isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("env_id", ["HalfCheetah-v5", "Ant-v5"])
def test_steps_in_a_graph_of_torch(env_id: str, whole: bool) -> None:
    """Replaying the parts around warp's graph, or whole steps, equals running the steps."""
    states, actions = (values.cuda() for values in (torch.from_numpy(trajectory(env_id)[0]), trajectory(env_id)[1]))
    env, other = make_warp_env(env_id, 64, "cuda"), make_warp_env(env_id, 64, "cuda")
    everything = torch.ones(64, dtype=torch.bool, device="cuda")
    action = actions.clone()
    env.restart_where(everything, states)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):  # torch requires a warm-up before a capture
            env.step(action)
    torch.cuda.synchronize()
    begin, end, pool = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph(), torch.cuda.MemPool()
    if whole:
        with torch.cuda.use_mem_pool(pool), torch.cuda.graph(begin):
            outcome = env.step(action)
    else:
        with torch.cuda.graph(begin):
            env.begin_step(action)
        with torch.cuda.graph(end):
            outcome = env.end_step()
    env.restart_where(everything, states)
    other.restart_where(everything, states)
    for step in range(4):
        action.copy_(actions.roll(step, 0))
        begin.replay()
        if not whole:
            env.run_physics()
            end.replay()
        torch.empty(1 << 20, device="cuda").fill_(torch.nan)  # would overwrite memory that the graph uses by mistake
        expected = other.step(actions.roll(step, 0))
        assert error(fields(env)["qpos"], fields(other)["qpos"]).max() < 1e-3
        torch.testing.assert_close(outcome[1], expected[1], rtol=1e-2, atol=1e-2)
    assert torch.equal(env._elapsed, other._elapsed)
