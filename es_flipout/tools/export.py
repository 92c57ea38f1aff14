"""Export of a trained policy as ONNX or as a program of ``torch.export``, checked against the agent."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import es_flipout
from es_flipout.envs.base import EnvironmentFailureError, described
from es_flipout.errors import UserError
from es_flipout.policies.agent import Agent
from es_flipout.tools.output import written
from es_flipout.tools.policy import TrainedPolicy, make_gymnasium_env
from es_flipout.training.evaluate import FIRST_SEED

Array = NDArray[Any]
Exported = Callable[[Array, Array | None], tuple[Array, Array | None]]
"""Maps observations and the state, if there is one, to actions and the next state."""

ENDINGS = (".onnx", ".pt2")

# Actions of an exported policy and of the agent may differ by this fraction of the action's range: rounding, which
# other kernels do differently, stays far below.
_TOLERANCE = 1e-3
# Fraction of different discrete actions that is still rounding: two outputs may be equal up to it.
_TIES = 0.01


@dataclass(frozen=True)
class Signature:
    """What an exported policy maps to what; in the metadata of the file, as the JSON text ``es_flipout``.

    Attributes:
        version: version of this package.
        env_id, env_kwargs: the environment.
        generation: the generation that the policy is of, if that is known.
        observation: shape of one observation, without the batch dimension.
        observation_dtype: its type; that of the environment's observations.
        action: shape of one action; ``()`` for a discrete one.
        action_dtype: its type.
        state: size of the memory, which is zero at the start of an episode; None for a policy without memory.
        state_dtype: its type.
    """

    version: str
    env_id: str
    env_kwargs: dict[str, Any]
    generation: int | None
    observation: tuple[int, ...]
    observation_dtype: str
    action: tuple[int, ...]
    action_dtype: str
    state: int | None
    state_dtype: str | None

    @property
    def inputs(self) -> list[str]:
        """Names of the inputs."""
        return ["observation"] if self.state is None else ["observation", "state"]

    @property
    def outputs(self) -> list[str]:
        """Names of the outputs."""
        return ["action"] if self.state is None else ["action", "next_state"]


@dataclass(frozen=True)
class Check:
    """Comparison of an exported policy with the agent over one episode in the Gymnasium environment.

    Attributes:
        steps: steps of the episode.
        difference: largest absolute difference of an action's entry (of other spaces than ``Box``: the fraction of
            steps with different actions).
    """

    steps: int
    difference: float


def export(policy: TrainedPolicy, output: Path, generation: int | None = None) -> tuple[Signature, Check]:
    """Write a policy as ``.onnx`` or ``.pt2``, after an episode in which it acted like the agent.

    The file maps a batch of observations, as the Gymnasium environment returns them, to actions that it takes.
    Dictionaries and other composite observations are expected as ``gymnasium.spaces.flatten`` returns them. A policy with
    memory has a second input and a second output, its state.

    Args:
        policy: the policy.
        output: the file; it is replaced if it exists.
        generation: for the metadata.

    Raises:
        UserError: a package of the extra ``export`` is missing, a layer cannot be exported, or the exported policy does
            not act like the agent.
    """
    if output.suffix == ".onnx":
        _require_onnx()
    network = _Deployed(policy)
    signature = _signature(policy, network, generation)
    program = _program(network, signature)
    with written(output) as temporary:
        if output.suffix == ".onnx":
            _write_onnx(program, signature, temporary)
            exported = load_onnx(temporary)
        else:
            metadata = {"es_flipout": json.dumps(asdict(signature))}
            torch.export.save(program, temporary, extra_files=metadata)
            exported = load_program(temporary)
        check = compare(policy, exported)
        _accept(policy, check)
    return signature, check


def compare(policy: TrainedPolicy, exported: Exported, seed: int = FIRST_SEED) -> Check:
    """Play an episode with the agent, and compare its actions with those of the exported policy.

    Each of the two keeps its own state; both see the observations that the agent's actions lead to.

    Raises:
        EnvironmentFailureError: the environment's own code raised an exception.
    """
    env, env_id = make_gymnasium_env(policy.config), policy.config.task.env_id
    differences: list[float] = []
    discrete = not isinstance(policy.action_space, gymnasium.spaces.Box)
    policy.reset()
    try:
        observation, _ = env.reset(seed=seed)
        state, ended = _zeros(policy.agent), False
        while not ended:
            row = _expected(policy, observation)[None]
            action, (other, state) = policy.act(observation), exported(row, state)
            difference = np.abs(np.asarray(action, np.float64) - np.asarray(other[0], np.float64))
            differences.append(float((difference > 0).any()) if discrete else float(difference.max()))
            observation, _, terminated, truncated, _ = env.step(action)
            ended = terminated or truncated
    except (Exception, SystemExit) as error:
        raise EnvironmentFailureError(f"{env_id} failed: {described(error)}") from error
    finally:
        env.close()
    return Check(len(differences), float(np.mean(differences) if discrete else np.max(differences)))


def load_onnx(path: Path) -> Exported:
    """Load an exported ``.onnx`` file in onnxruntime, on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])

    def act(observation: Array, state: Array | None) -> tuple[Array, Array | None]:
        inputs = {"observation": observation} | ({} if state is None else {"state": state})
        action, *after = session.run(None, inputs)
        return np.asarray(action), np.asarray(after[0]) if after else None

    return act


def load_program(path: Path) -> Exported:
    """Load an exported ``.pt2`` file."""
    module = torch.export.load(path).module()

    def act(observation: Array, state: Array | None) -> tuple[Array, Array | None]:
        inputs = [torch.as_tensor(each) for each in (observation, state) if each is not None]
        with torch.no_grad():
            action, *after = module(*inputs)
        return action.numpy(), after[0].numpy() if after else None

    return act


class _Deployed(nn.Module):
    """A policy as one module, from the environment's observations to its actions."""

    def __init__(self, policy: TrainedPolicy) -> None:
        super().__init__()
        self._agent = policy.agent
        self._observed = policy.config.task.observed
        self._space = policy.action_space
        self.policy = policy.agent.module  # named in errors

    def forward(self, observation: Tensor, state: Tensor | None = None) -> tuple[Tensor, ...]:
        row = observation.flatten(1)
        if self._observed is not None:
            row = row[:, list(self._observed)]
        action, after = self._agent.act(row, state)
        if isinstance(self._space, gymnasium.spaces.Discrete):
            action = action + int(self._space.start)
        else:
            assert self._space.shape is not None
            action = action.unflatten(1, self._space.shape)
        if isinstance(self._space, gymnasium.spaces.MultiDiscrete):
            action = action + torch.as_tensor(self._space.start)
        return (action,) if after is None else (action, after)


def _expected(policy: TrainedPolicy, observation: Any) -> Array:
    """Return an observation as an exported policy takes it."""
    space = policy.observation_space
    return np.asarray(
        observation if isinstance(space, gymnasium.spaces.Box) else gymnasium.spaces.flatten(space, observation)
    )


def _zeros(agent: Agent, rows: int = 1) -> Array | None:
    state = agent.initial_state(rows)
    return None if state is None else state.numpy()


def _example(policy: TrainedPolicy) -> Array:
    space = policy.observation_space
    flat = space if isinstance(space, gymnasium.spaces.Box) else gymnasium.spaces.flatten_space(space)
    assert isinstance(flat, gymnasium.spaces.Box)
    return np.zeros(flat.shape, flat.dtype)


def _signature(policy: TrainedPolicy, network: _Deployed, generation: int | None) -> Signature:
    observation, state = _example(policy), policy.agent.initial_state(1)
    with torch.no_grad():
        action = network(torch.as_tensor(observation)[None], state)[0][0]
    task = policy.config.task
    return Signature(
        es_flipout.__version__,
        task.env_id,
        task.parsed_env_kwargs(),
        generation,
        observation.shape,
        str(observation.dtype),
        tuple(action.shape),
        str(action.numpy().dtype),
        None if state is None else state.shape[1],
        None if state is None else str(state.numpy().dtype),
    )


def _program(network: _Deployed, signature: Signature) -> torch.export.ExportedProgram:
    """Trace the network for batches of any size."""
    rows = 2  # a batch of one would be traced as a constant
    inputs = [torch.zeros(rows, *signature.observation, dtype=getattr(torch, signature.observation_dtype))]
    if signature.state is not None and signature.state_dtype is not None:
        inputs.append(torch.zeros(rows, signature.state, dtype=getattr(torch, signature.state_dtype)))
    batch = torch.export.Dim("batch")
    inside: list[str] = []  # names of the modules whose forward is running

    def leave(*_: object) -> None:
        inside.pop()

    hooks = []
    for name, module in network.named_modules():
        hooks.append(module.register_forward_pre_hook(lambda *_, name=name: inside.append(name)))
        hooks.append(module.register_forward_hook(leave))
    try:
        with torch.no_grad(), _quiet():
            return torch.export.export(
                network, tuple(inputs), dynamic_shapes=[{0: batch} for _ in inputs], strict=False
            )
    except Exception as error:
        name = inside[-1] if inside else ""
        reason = str(error).strip().partition("\n")[0]
        raise _refusal(name, type(network.get_submodule(name)).__name__, reason) from error
    finally:
        for hook in hooks:
            hook.remove()


def _write_onnx(program: torch.export.ExportedProgram, signature: Signature, path: Path) -> None:
    try:
        with _quiet():
            onnx = torch.onnx.export(
                program,
                input_names=signature.inputs,
                output_names=signature.outputs,
                dynamic_shapes=tuple({0: "batch"} for _ in signature.inputs),
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        # The exporter names the node of its graph, and the program knows the modules that a node comes from.
        found = re.search(r"translating node %(\w+)", str(error.__cause__))
        operator = found[1] if found else ""
        nodes = [node for node in program.graph.nodes if operator and operator in node.name]
        modules = list(nodes[0].meta["nn_module_stack"].values()) if nodes else []
        name, kind = modules[-1] if modules else ("policy", "")
        raise _refusal(name, str(kind), f"ONNX has no operator {operator or 'for it'}") from error
    assert onnx is not None
    onnx.model.metadata_props["es_flipout"] = json.dumps(asdict(signature))
    onnx.save(path)


def _refusal(name: str, kind: str, reason: str) -> UserError:
    """Return an error that names the layer that cannot be exported."""
    return UserError(f"layer {name or 'policy'} ({kind.rpartition('.')[2]}) cannot be exported: {reason}")


def _accept(policy: TrainedPolicy, check: Check) -> None:
    """Raise unless differences are those of rounding."""
    limit = _TIES
    if isinstance(policy.action_space, gymnasium.spaces.Box):
        extent = policy.action_space.high - policy.action_space.low
        limit = _TOLERANCE * float(np.where(np.isfinite(extent), extent, 1).max())
    if not check.difference <= limit:
        raise UserError(
            f"the exported policy does not act like the agent: over an episode of {check.steps} steps, actions differ by "
            f"{check.difference:.2g} (allowed {limit:.2g}); nothing was written"
        )


def _require_onnx() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"export to ONNX needs the extra export: pip install 'es-flipout[export]' ({error})") from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporters' progress and deprecation messages."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        said = io.StringIO()
        with warnings.catch_warnings(), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
