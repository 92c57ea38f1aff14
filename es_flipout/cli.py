"""The command line: ``es-flipout train | resume | evaluate | envs | bench``.

Importing this module and showing help must stay fast, so torch is imported inside the commands.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

import tyro
from rich.console import Console

from es_flipout.config import TrainConfig
from es_flipout.errors import UserError
from es_flipout.presets import preset

if TYPE_CHECKING:
    from es_flipout.trainer import Trainer

Options = TypeVar("Options")
WithConfig = TypeVar("WithConfig", "TrainOptions", "PlanOptions")


@dataclass(frozen=True)
class TrainOptions:
    """Train a policy; the environment's preset fills what is not given."""

    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    run_dir: Path | None = None
    """Directory of the run, made new; by default under runs/."""


@dataclass(frozen=True)
class PlanOptions:
    """Predict the memory of a training run, without running it."""

    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    json: bool = False
    """Print the result as JSON."""


@dataclass(frozen=True)
class ResumeOptions:
    """Continue a run to the bit as if it had never stopped."""

    run_dir: Annotated[Path, tyro.conf.arg(metavar="RUN_DIR")]
    """Directory of the run."""
    backend: Literal["local", "ray"] | None = None
    """One machine, or a Ray cluster; by default as before, and so with the next two. None of them changes the result."""
    workers: int | None = None
    """Ray workers."""
    ray_address: str | None = None
    """Ray cluster to join."""


@dataclass(frozen=True)
class EvaluateOptions:
    """Score the mean policy of a run in the real single Gymnasium environment."""

    run_dir: Annotated[Path, tyro.conf.arg(metavar="RUN_DIR")]
    """Directory of the run."""
    episodes: int = 100
    """Episodes to play."""
    json: bool = False
    """Print the result as JSON."""


@dataclass(frozen=True)
class EnvsOptions:
    """List what can be trained, and on which backend."""


def train(arguments: Sequence[str]) -> int:
    """``es-flipout train ENV_ID [options]``."""
    arguments = list(arguments)
    if not arguments:
        raise UserError("which environment? es-flipout train ENV_ID; `es-flipout envs` lists them")
    _refuse_unknown_options(TrainOptions, arguments, "train")
    options = _parse_with_preset(TrainOptions, arguments, "train")
    config = options.config
    given = {argument.partition("=")[0].replace("_", "-") for argument in arguments}
    if "--generations" in given and "--env-steps" not in given:
        config = dataclasses.replace(config, env_steps=None)

    from es_flipout.metrics import TerminalReporter
    from es_flipout.trainer import Trainer

    run_dir = options.run_dir if options.run_dir is not None else _new_run_dir(config)
    console = Console(stderr=True)
    trainer = Trainer(config, run_dir, TerminalReporter(console, config.env_id))
    try:
        trainer.create()
    except BaseException:
        trainer.close()
        raise
    return _train(trainer, run_dir, console)


def resume(arguments: Sequence[str]) -> int:
    """``es-flipout resume RUN_DIR``."""
    options = _parse(ResumeOptions, arguments, "resume")

    from es_flipout.metrics import TerminalReporter
    from es_flipout.trainer import Trainer, read_config

    console = Console(stderr=True)
    reporter = TerminalReporter(console, read_config(options.run_dir).env_id)
    moved = {name: getattr(options, name) for name in ("backend", "workers", "ray_address")}
    changes = {name: value for name, value in moved.items() if value is not None}
    return _train(Trainer.resume(options.run_dir, reporter, changes), options.run_dir, console)


def _train(trainer: Trainer, run_dir: Path, console: Console) -> int:
    """Train to the end, score in the real environment, and say where everything lies."""
    from es_flipout.evaluate import evaluate as play
    from es_flipout.trainer import write_evaluation

    try:
        trainer.train()
    finally:
        trainer.close()
    if trainer.interrupted:
        at = trainer.progress
        print(f"stopped after generation {at.generation} ({at.env_steps:,} environment steps)")
        print(f"continue with: es-flipout resume {run_dir}")
        return 0
    config = trainer.config
    try:
        with console.status(f"scoring in {config.env_id}, {config.evaluation_episodes} episodes"):
            evaluation = play(trainer.trained_agent(), config, config.evaluation_episodes)
    except KeyboardInterrupt:
        print(f"stopped while scoring; score with: es-flipout resume {run_dir}")
        return 0
    write_evaluation(run_dir, evaluation)
    print(
        f"score {evaluation.mean_return:,.1f} (sd {evaluation.std_return:,.1f}, median {evaluation.median_return:,.1f}) "
        f"over {evaluation.episodes} episodes of {config.env_id} in Gymnasium {evaluation.versions['gymnasium']}"
    )
    print(f"trained on {trainer.progress.env_steps:,} environment steps in {trainer.progress.wall_s:,.0f} s")
    print(f"everything lies in {run_dir}")
    return 0


def evaluate(arguments: Sequence[str]) -> int:
    """``es-flipout evaluate RUN_DIR [--episodes N] [--json]``."""
    options = _parse(EvaluateOptions, arguments, "evaluate")
    if options.episodes < 1:
        raise UserError(f"episodes must be at least 1, got {options.episodes}")

    import torch

    from es_flipout.evaluate import evaluate as play
    from es_flipout.trainer import load_agent

    torch.set_num_threads(1)
    agent, config = load_agent(options.run_dir)
    result = play(agent, config, options.episodes).to_dict()
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        for name in ("env_id", "episodes", "mean_return", "std_return", "median_return", "min_return", "max_return"):
            value = result[name]
            print(f"{name:14} {value:,.2f}" if isinstance(value, float) else f"{name:14} {value}")
    return 0


def plan(arguments: Sequence[str]) -> int:
    """``es-flipout plan ENV_ID [options of train] [--json]``."""
    arguments = list(arguments)
    if not arguments:
        raise UserError("which environment? es-flipout plan ENV_ID [options of train]")
    _refuse_unknown_options(PlanOptions, arguments, "plan")
    options = _parse_with_preset(PlanOptions, arguments, "plan")

    from es_flipout.arrangement import planned
    from es_flipout.bench.forward import show_bytes
    from es_flipout.plan import make_plan

    result = make_plan(planned(options.config))
    if options.json:
        print(json.dumps(result.to_dict(), indent=2))
        return 0
    where = "GPU" if result.device == "cuda" else "CPU"
    print(f"{result.env_id}: {result.population_size:,} members, {result.episodes} episodes of each, on the {where}")
    print(
        f"{result.slots:,} environments side by side, policies in blocks of {result.row_block:,} rows ({result.blocks})"
    )
    for name, size in result.parts.items():
        print(f"  {name:32} {show_bytes(size):>12}")
    free = "" if result.free is None else f", of {show_bytes(result.free)} that are free"
    print(f"  {'together':32} {show_bytes(result.total):>12}{free}")
    return 0


def envs(arguments: Sequence[str]) -> int:
    """``es-flipout envs``."""
    _parse(EnvsOptions, arguments, "envs")

    from es_flipout.envs import native_env_ids

    for env_id, backend in native_env_ids().items():
        config = preset(env_id)
        print(
            f"{env_id:28} {backend:10} population {config.population_size:4}, {config.env_steps:>12,} environment steps"
        )
    print(
        "torch runs on CUDA too, and so does mujoco (pip install 'es-flipout[gpu]'). "
        "Any other registered Gymnasium id with one-dimensional observations runs through Gymnasium's vector API."
    )
    return 0


def bench(arguments: Sequence[str]) -> int:
    """``es-flipout bench forward|rollout|compare [options]``."""
    kinds = ("forward", "rollout", "compare")
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: es-flipout bench forward|rollout|compare [options]; each has --help")
        return 0
    if arguments[0] not in kinds:
        raise UserError(f"bench must be one of {', '.join(kinds)}, got {arguments[0]!r}")
    from es_flipout.bench import compare, forward, rollout

    console = Console()
    if arguments[0] == "forward":
        forward.run(_parse(forward.ForwardBench, arguments[1:], "bench forward"), console)
    elif arguments[0] == "compare":
        compare.run(_parse(compare.CompareBench, arguments[1:], "bench compare"), console)
    else:
        rollout.run(_parse(rollout.RolloutBench, arguments[1:], "bench rollout"), console)
    return 0


_COMMANDS: dict[str, tuple[Callable[[Sequence[str]], int], str]] = {
    "train": (train, "train a policy: es-flipout train HalfCheetah-v5"),
    "resume": (resume, "continue a run to the bit: es-flipout resume RUN_DIR"),
    "evaluate": (evaluate, "score a run in the real Gymnasium environment: es-flipout evaluate RUN_DIR"),
    "envs": (envs, "list what can be trained"),
    "bench": (bench, "measure speed on this machine: es-flipout bench forward|rollout|compare"),
    "plan": (plan, "memory of a run, before running it: es-flipout plan Humanoid-v5"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code (2 for errors of the user's making)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: es-flipout COMMAND [options]; every command has --help\n")
        for name, (_, summary) in _COMMANDS.items():
            print(f"  {name:10} {summary}")
        return 0
    if arguments[0] == "--version":
        import es_flipout

        print(f"es-flipout {es_flipout.__version__}")
        return 0
    try:
        if arguments[0] not in _COMMANDS:
            near = difflib.get_close_matches(arguments[0], _COMMANDS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(_COMMANDS)}"
            raise UserError(f"unknown command {arguments[0]!r}: {hint}")
        return _COMMANDS[arguments[0]][0](arguments[1:])
    except BrokenPipeError:  # the reader, head for instance, has seen enough
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        return 0
    except (UserError, OSError) as error:
        return _fail(error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        # The environments' errors are the user's too, but importing them before they are needed would cost seconds.
        base = sys.modules.get("es_flipout.envs.base")
        if base and isinstance(error, (base.UnsupportedEnvironmentError, base.EnvironmentFailureError)):
            return _fail(error)
        torch = sys.modules.get("torch")
        if torch and isinstance(error, torch.OutOfMemoryError):
            return _fail(UserError("the GPU has too little memory for this; es-flipout plan shows what a run needs"))
        raise


def _fail(error: Exception) -> int:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2


def _parse_with_preset(options: type[WithConfig], arguments: Sequence[str], command: str) -> WithConfig:
    """Read options of which some are a run's configuration; the preset of its environment fills what is not given."""

    def parsed(env_id: str) -> WithConfig:
        preset_config = dataclasses.replace(preset(env_id), env_id=tyro.MISSING)
        return _parse(options, arguments, command, default=options(config=preset_config))

    env_id = arguments[0]
    if env_id.startswith("-"):
        # The environment comes after options, or help was asked for: read everything once with general defaults.
        env_id = parsed("CartPole-v1").config.env_id
    return parsed(env_id)


def _parse(options: type[Options], arguments: Sequence[str], command: str, default: Options | None = None) -> Options:
    """Read options with tyro; what tyro says of wrong ones becomes one line.

    Raises:
        UserError: an option is unknown, missing or malformed.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(
                options,
                args=list(arguments),
                prog=f"es-flipout {command}",
                default=default,  # type: ignore[arg-type]
                config=(tyro.conf.PositionalRequiredArgs,),
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UserError(_one_line(said.getvalue()) + f" (see es-flipout {command} --help)") from None


def _refuse_unknown_options(options: type[WithConfig], arguments: Sequence[str], command: str) -> None:
    """Name an option that does not exist, and the nearest that does."""
    own = [field.name for field in dataclasses.fields(options) if field.name != "config"]
    names = [*own, *(field.name for field in dataclasses.fields(TrainConfig) if field.name != "env_id")]
    known = ["--help", *(f"--{prefix}{name}".replace("_", "-") for name in names for prefix in ("", "no_"))]
    for argument in arguments:
        option = argument.partition("=")[0].replace("_", "-")
        if option.startswith("--") and option not in known:
            near = difflib.get_close_matches(option, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else f" (see es-flipout {command} --help)"
            raise UserError(f"unrecognized option {option}{hint}")


def _one_line(box: str) -> str:
    """The text of tyro's error box without its title and frame (which may be ASCII)."""
    kept: list[str] = []
    for line in box.splitlines()[1:]:
        text = line.strip("│|╭╮╰╯ ")
        if text.startswith("For full helptext"):
            break
        if text.strip("─-+="):
            kept.append(text)
    return " ".join(kept) or "the options could not be read"


def _new_run_dir(config: TrainConfig) -> Path:
    """A name under runs/ that is not taken."""
    name = config.env_id.replace("/", "_")
    path = Path("runs") / f"{name}_seed{config.seed}_{datetime.now().strftime('%Y-%m-%d_%H-%M-%S')}"
    return path if not path.exists() else path.with_name(f"{path.name}_{datetime.now().microsecond}")


if __name__ == "__main__":
    sys.exit(main())
