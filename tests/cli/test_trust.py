"""A run directory of someone else: nothing that it names is imported or joined before the user trusts it."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from command_line import SMALL

from es_flipout import cli
from es_flipout.errors import UserError
from es_flipout.training.run_directory import load_agent
from es_flipout.training.setup import resume_trainer

PAYLOAD = "from pathlib import Path\nPath(__file__).with_name('executed').touch()\n"


@pytest.fixture
def strange(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a finished run whose configuration was changed by someone; the module that it names leaves a file."""
    run_dir = tmp_path / "run"
    assert cli.main(["train", "CartPole-v1", *SMALL, "--generations", "1", "--run-dir", str(run_dir)]) == 0
    sys.modules.pop("payload", None)
    (tmp_path / "payload.py").write_text(PAYLOAD, encoding="utf-8")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    return run_dir


def change(run_dir: Path, subject: str, **values: Any) -> None:
    path = run_dir / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config[subject] |= values
    path.write_text(json.dumps(config), encoding="utf-8")


@pytest.mark.parametrize("env_id", ["payload:CartPole-v1", "es_flipout/payload:CartPole-v1"])
def test_a_module_is_imported_only_with_trust(strange: Path, refused: Any, capsys: Any, env_id: str) -> None:
    change(strange, "task", env_id=env_id)
    capsys.readouterr()
    for command in ("evaluate", "resume"):
        said = refused(command, strange)
        assert "imports, and so executes, the Python module payload;" in said
        assert "--trust" in said
    with pytest.raises(UserError, match="trust=True"):
        load_agent(strange)
    with pytest.raises(UserError, match="trust=True"):
        resume_trainer(strange)
    assert not (strange.parent / "executed").exists()
    assert cli.main(["evaluate", str(strange), "--episodes", "1", "--trust"]) == 0
    assert (strange.parent / "executed").exists()
    assert cli.main(["resume", str(strange), "--trust"]) == 0


def test_a_cluster_is_joined_only_if_the_user_names_it(strange: Path, refused: Any, capsys: Any) -> None:
    change(strange, "compute", backend="ray", ray_address="127.0.0.1:1")
    capsys.readouterr()
    said = refused("resume", strange)
    assert "trained on the Ray cluster at 127.0.0.1:1" in said
    assert "--trust" in said
    assert "no Ray cluster answers" in refused("resume", strange, "--trust")
    assert "no Ray cluster answers" in refused("resume", strange, "--ray-address", "127.0.0.1:1")
    assert cli.main(["resume", str(strange), "--backend", "local"]) == 0


def test_the_advice_for_a_run_of_ones_own_has_the_option(
    oddities: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def pressed(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("es_flipout.cli.session.evaluate", pressed)
    run_dir = oddities / "a run"
    assert cli.main(["train", "oddities:Nan-v0", *SMALL, "--run-dir", str(run_dir)]) == 0
    assert capsys.readouterr().out.endswith(f"es-flipout resume '{run_dir}' --trust\n")
