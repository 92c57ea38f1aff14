"""Policies are found in the zoo and on the Hub (a stand-in on loopback), with what the run's policy scores."""

from __future__ import annotations

import base64
import hashlib
import importlib
import json
import shlex
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

import es_flipout
from es_flipout.cli import main
from es_flipout.config import TrainConfig
from es_flipout.errors import UserError
from es_flipout.presets import preset
from es_flipout.tools import zoo
from es_flipout.tools.card import train_command
from es_flipout.tools.source import find_run
from es_flipout.training.run_directory import load_agent
from scripts import report
from scripts.learning import policies
from scripts.learning._runs import Job, sweep

TINY = TrainConfig.of(
    "CartPole-v1",
    population_size=4,
    hidden=(4,),
    generations=2,
    score_every=1,
    score_episodes=2,
    evaluation_episodes=3,
    threads=1,
    device="cpu",
)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A learning table with three seeds."""
    out = tmp_path_factory.mktemp("results") / "learning"
    sweep([Job("CartPole-v1", TINY.replace(seed=seed)) for seed in (0, 1, 2)], out, 1)
    return out


def call_script(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["policies.py", *map(str, arguments), "--episodes", "3"])
    policies.main()


# The zoo.


def test_the_zoo_has_the_policy_of_the_median_seed(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    call_script(monkeypatch, "--table", table, "--out", tmp_path)
    monkeypatch.setattr(zoo, "_FOLDERS", (tmp_path,))
    folder = find_run("zoo:CartPole-v1")
    assert {path.name for path in folder.iterdir()} == {"policy.safetensors", "config.json", "card.md"}
    assert sum(path.stat().st_size for path in folder.iterdir()) < 100_000
    scores = sorted(report.read_csv(table / "runs.csv")["mean_return"])
    capsys.readouterr()
    assert main(["evaluate", "zoo:CartPole-v1", "--episodes", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["mean_return"] == scores[1]
    config = load_agent(folder)[1]
    text = (folder / "card.md").read_text(encoding="utf-8")
    for part in (f"| seed | {config.schedule.seed} |", f"{scores[1]:,.1f} (sd", "es-flipout evaluate zoo:CartPole-v1"):
        assert part in text
    assert es_flipout.load("zoo:CartPole-v1").agent.state_dict().keys()


def test_a_policy_that_does_not_score_as_its_table_says_is_refused(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = table / "runs" / "CartPole-v1_seed0"
    with pytest.raises(UserError, match=r"seed0 scores .*, but its table says -1"):
        policies.write(first, tmp_path, -1.0, 3)
    with pytest.raises(UserError, match=r"several runs of CartPole-v1: name one run per task"):
        call_script(monkeypatch, first, table / "runs" / "CartPole-v1_seed1", "--out", tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("zoo:CartPol-v1", "the zoo has no policy for 'CartPol-v1': did you mean zoo:CartPole-v1?"),
        ("zoo:Ant-v5", "the zoo has no policy for 'Ant-v5': it has CartPole-v1"),
        ("hub:nobody", "a repository of the Hub is named USER/NAME, got 'nobody'"),
    ],
)
def test_unknown_names_are_one_line(
    name: str,
    message: str,
    table: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    call_script(monkeypatch, table / "runs" / "CartPole-v1_seed0", "--out", tmp_path)
    monkeypatch.setattr(zoo, "_FOLDERS", (tmp_path,))
    assert main(["evaluate", name]) == 2
    assert capsys.readouterr().err == f"error: {message}\n"


def test_committed_policies_are_understood() -> None:
    for name, folder in zoo.policies().items():
        agent, config = load_agent(folder)
        assert zoo.folder_name(config.task.env_id) == name
        assert agent.state_dict()


def test_the_command_of_a_card_trains_that_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    config = preset("HalfCheetah-v5").replace(
        seed=3, remove_alive_bonus=False, hidden=(8, 4), env_kwargs='{"ctrl_cost_weight": 0}', threads=1, observed=None
    )
    words = shlex.split(train_command(config))
    assert words[:3] == ["es-flipout", "train", "HalfCheetah-v5"]
    from es_flipout.cli.parsing import parse_with_preset
    from es_flipout.cli.train import TrainOptions

    parsed = parse_with_preset(TrainOptions, words[2:], "train").config
    assert parsed.replace(threads=1) == config


# The Hub.


class StandIn(BaseHTTPRequestHandler):
    """The part of the Hub's protocol that is used: create, preupload, commit, revision, and files."""

    repositories: ClassVar[dict[str, dict[str, bytes]]] = {}
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def answer(self, value: object, status: int = 200, **headers: str) -> None:
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, content in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), content)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def missing(self) -> None:
        self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        path = self.path.split("?")[0]
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
            self.repositories.setdefault(name, {})
            return self.answer({"url": f"http://{self.headers['Host']}/{name}"})
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        name, _, action = path.removeprefix("/api/models/").rpartition("/main")[0].rpartition("/")
        if action == "preupload":
            files = [
                {"path": each["path"], "uploadMode": "regular", "shouldIgnore": False}
                for each in json.loads(body)["files"]
            ]
            return self.answer({"files": files})
        assert action == "commit", self.path
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                self.repositories[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        oid = self.sha(name)
        url = f"http://{self.headers['Host']}/{name}/commit/{oid}"
        return self.answer({"commitUrl": url, "commitOid": oid, "success": True})

    def do_GET(self) -> None:
        path = self.path.split("?")[0].strip("/")
        if path == "api/models":
            return self.answer([{"id": name, "modelId": name} for name in self.repositories])
        if path.startswith("api/models/"):
            parts = path.split("/")
            name = "/".join(parts[2:4])
            if name not in self.repositories:
                return self.missing()
            files = self.repositories[name]
            if parts[4:5] == ["tree"]:
                return self.answer([{"type": "file", "path": k, "size": len(v), "oid": k} for k, v in files.items()])
            siblings = [{"rfilename": each} for each in files]
            return self.answer({"id": name, "modelId": name, "sha": self.sha(name), "siblings": siblings})
        user, short, _, _, *rest = path.split("/")  # USER/NAME/resolve/REVISION/FILE
        data = self.repositories[f"{user}/{short}"]["/".join(rest)]
        etag = hashlib.sha1(data).hexdigest()
        return self.answer(data, ETag=f'"{etag}"', X_Repo_Commit=self.sha(f"{user}/{short}"))

    def do_HEAD(self) -> None:
        self.do_GET()

    def sha(self, name: str) -> str:
        files = self.repositories[name]
        return hashlib.sha1(b"".join(key.encode() + files[key] for key in sorted(files))).hexdigest()


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, dict[str, bytes]]]:
    pytest.importorskip("huggingface_hub", reason="the extra hub is not installed")
    constants, hf_api = (importlib.import_module(f"huggingface_hub.{name}") for name in ("constants", "hf_api"))
    importlib.import_module("huggingface_hub._snapshot_download")
    monkeypatch.setattr(StandIn, "repositories", {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), StandIn)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_test")
    for module in [each for name, each in sys.modules.items() if name.startswith("huggingface_hub")]:
        for name, value in (("ENDPOINT", endpoint), ("HF_HUB_CACHE", str(tmp_path / "cache"))):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(hf_api.api, "endpoint", endpoint)
    yield StandIn.repositories
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.filterwarnings("default")
def test_what_is_pushed_can_be_used(
    table: Path, tmp_path: Path, stand_in: dict[str, dict[str, bytes]], capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = table / "runs" / "CartPole-v1_seed0"
    assert main(["evaluate", str(run_dir), "--episodes", "3", "--json"]) == 0
    own = capsys.readouterr().out
    (run_dir / "evaluation.json").write_text(own, encoding="utf-8")
    assert main(["push", str(run_dir), "someone/cartpole"]) == 0
    assert "use it as hub:someone/cartpole" in capsys.readouterr().out
    files = stand_in["someone/cartpole"]
    assert set(files) == {"README.md", "config.json", "environment.json", "evaluation.json", "policy.safetensors"}
    assert files["policy.safetensors"] == (run_dir / "best.safetensors").read_bytes()
    text = files["README.md"].decode()
    score = json.loads(own)
    assert text.startswith("---\nlibrary_name: es-flipout\n")
    for part in (f'"{score["mean_return"]:.2f} +/- {score["std_return"]:.2f}"', "evaluate hub:someone/cartpole"):
        assert part in text
    assert main(["evaluate", "hub:someone/cartpole", "--episodes", "3", "--json"]) == 0
    downloaded = json.loads(capsys.readouterr().out)
    assert downloaded["mean_return"] == score["mean_return"]
    assert main(["evaluate", "hub:someone/cartpol"]) == 2
    assert capsys.readouterr().err == "error: the Hub has no someone/cartpol: did you mean hub:someone/cartpole?\n"


def test_without_huggingface_hub_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"pip install 'es-flipout\[hub\]'"):
        find_run("hub:someone/cartpole")
