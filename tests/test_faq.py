"""The messages that docs/faq.md explains are those that users see."""

import json
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import gymnasium
import pytest
import torch

import es_flipout as esf
from es_flipout import cli

HEADINGS = re.findall(
    r"^### `(.+)`$", (Path(__file__).parents[1] / "docs" / "faq.md").read_text(encoding="utf-8"), re.M
)

ENVIRONMENT = """
import gymnasium, numpy as np

class Broken(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)

    def __init__(self, words=False):
        if words:
            self.action_space = gymnasium.spaces.Text(3)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action):
        1 / 0

def without():
    raise gymnasium.error.DependencyNotInstalled("pip install no_such_package")

gymnasium.register("Broken-v0", Broken)
gymnasium.register("Words-v0", Broken, kwargs={"words": True})
gymnasium.register("Without-v0", without)
"""
TINY = shlex.split(
    "--population-size 4 --generations 1 --hidden 4 --score-episodes 1 --evaluation-episodes 1 --checkpoint-every 1"
)


class Branching(torch.nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) if input.sum() > 0 else -super().forward(input)


def strategy(*layers: torch.nn.Module) -> esf.EvolutionStrategy:
    return esf.EvolutionStrategy(torch.nn.Sequential(*layers), 64, 0.1)


def tell_without_ask() -> None:
    strategy(torch.nn.Linear(2, 1)).tell(torch.zeros(64))


def tell_wrong_shape() -> None:
    told = strategy(torch.nn.Linear(2, 1))
    told.ask()
    told.tell(torch.zeros(64, 1))


CALLS: list[Callable[[], object]] = [
    lambda: strategy(torch.nn.Linear(2, 4), torch.nn.BatchNorm1d(4)),
    lambda: strategy(Branching(2, 1)).ask()(torch.zeros(64, 2)),
    tell_without_ask,
    tell_wrong_shape,
]
COMMANDS = [
    "train HalfCheeta-v5",
    "train my_env:MyEnv-v0",
    "train faq_env:Without-v0",
    "train faq_env:Words-v0",
    "train faq_env:Broken-v0",
    "train CartPole-v1 --device cuda",
    "train CartPole-v1 --backend ray --ray-address 127.0.0.1:9",
    "train CartPole-v1 --population-size 33",
    "train CartPole-v1 --sgima 0.1",
    "train HalfCheetah-v5 --env-kwargs {healthy_reward:2}",
    "train CartPole-v1 --policy recurrent --hidden 8 --horizon 10",
    "train CartPole-v1 --run-dir here",
    "evaluate module",
    "evaluate old",
    "resume damaged",
    "evaluate .",
]


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    """A folder with runs: finished, of a module, of an old version, and damaged."""
    monkeypatch.chdir(tmp_path)
    Path("faq_env.py").write_text(ENVIRONMENT, encoding="utf-8")
    for name in ("here", "module", "old", "damaged"):
        assert cli.main(["train", "CartPole-v1", *TINY, "--run-dir", name]) == 0
    config = json.loads(Path("module/config.json").read_text())
    config["task"]["env_id"] = "faq_env:Broken-v0"
    Path("module/config.json").write_text(json.dumps(config))
    Path("old/config.json").write_text(json.dumps({"version": "0.1.0"}))
    environment = json.loads(Path("old/environment.json").read_text())
    environment["versions"]["es-flipout"] = "0.1.0"
    Path("old/environment.json").write_text(json.dumps(environment))
    for path in Path("damaged/checkpoints").glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-1] + b"!")
    before = set(gymnasium.registry)
    yield
    sys.modules.pop("faq_env", None)
    for name in set(gymnasium.registry) - before:
        gymnasium.registry.pop(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="one of the messages is about a missing GPU")
@pytest.mark.usefixtures("runs")
def test_every_message_of_the_page_appears_and_no_other(capsys: pytest.CaptureFixture[str]) -> None:
    shown: dict[str, str] = {}
    for call in CALLS:
        with pytest.raises((ValueError, RuntimeError)) as raised:
            call()
        shown[str(raised.value)] = getattr(call, "__name__", "")
    capsys.readouterr()
    for command in COMMANDS:
        assert (
            cli.main([*command.split(), *(TINY if command.startswith("train") and "33" not in command else [])]) == 2
        ), command
        shown[capsys.readouterr().err.strip().splitlines()[-1].removeprefix("error: ")] = command
    shown = {re.sub(r" \(see es-flipout \w+ --help\)$", "", message): command for message, command in shown.items()}
    patterns = {
        heading: ".*".join(map(re.escape, heading.split("..."))).replace("\\ .*", "\\ ?.*") for heading in HEADINGS
    }
    for heading, pattern in patterns.items():
        assert any(re.fullmatch(pattern, message, re.DOTALL) for message in shown), f"nothing says: {heading}\n{shown}"
    for message, command in shown.items():
        assert any(re.fullmatch(pattern, message, re.DOTALL) for pattern in patterns.values()), f"{command}: {message}"
