"""Policies on the Hugging Face Hub: upload and download (extra ``hub``)."""

from __future__ import annotations

import difflib
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from es_flipout.config import TrainConfig
from es_flipout.errors import UserError
from es_flipout.tools.card import card, read_json
from es_flipout.training.run_directory import Which, generation_of, policy_file, read_config

_DOWNLOADED = ("config.json", "environment.json", "evaluation.json", "policy.safetensors")
_TAG = "es-flipout"


def push(run_dir: Path, name: str, which: Which = "best", private: bool = False) -> str:
    """Upload one policy of a run, its configuration, evaluation and card, and videos in the run directory.

    Args:
        run_dir: directory of the run.
        name: ``USER/NAME`` of the repository, which is created if it does not exist.
        which: the mean policy with the best score of training, or the last one.
        private: whether a new repository is private.

    Returns:
        The address of the repository.

    Raises:
        UserError: the run is incomplete, or the Hub refuses the upload or cannot be reached.
    """
    _check(name)
    hub = _import()
    config = read_config(run_dir, trust=True)  # nothing of it is imported here
    # One run has two evaluations if its best policy is not its last one.
    evaluation = run_dir / "evaluation.json"
    if which == "last" and generation_of(run_dir, "best") != generation_of(run_dir, "last"):
        evaluation = run_dir / "evaluation_last.json"
    policy = policy_file(run_dir, which)
    if not policy.exists():
        raise UserError(f"{policy} is missing")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        shutil.copyfile(policy, folder / "policy.safetensors")
        for path in (run_dir / "config.json", run_dir / "environment.json", *_videos(run_dir)):
            if path.exists():
                shutil.copyfile(path, folder / path.name)
        if evaluation.exists():
            shutil.copyfile(evaluation, folder / "evaluation.json")
        environment = read_json(run_dir / "environment.json") or {}
        scored = read_json(evaluation)
        text = _front_matter(config, scored) + card(config, f"hub:{name}", scored, environment.get("commit"))
        (folder / "README.md").write_text(text, encoding="utf-8")
        try:
            api = hub.HfApi(library_name="es-flipout")
            url = api.create_repo(name, private=private, exist_ok=True)
            message = f"{config.task.env_id}, seed {config.schedule.seed}"
            api.upload_folder(repo_id=name, folder_path=folder, commit_message=message)
        except Exception as error:
            raise UserError(f"{name} could not be pushed: {_line(error)}") from error
    return str(url)


def find(name: str) -> Path:
    """Download a policy into the cache of huggingface_hub, and return its directory.

    Args:
        name: ``USER/NAME``, or ``USER/NAME@REVISION``.

    Raises:
        UserError: there is no such repository or it holds no policy, or the Hub cannot be reached.
    """
    repository, _, revision = name.partition("@")
    _check(repository)
    hub = _import()
    try:
        folder = hub.snapshot_download(repository, revision=revision or None, allow_patterns=list(_DOWNLOADED))
    except hub.errors.RevisionNotFoundError:
        raise UserError(f"hub:{repository} has no revision {revision}") from None
    except hub.errors.RepositoryNotFoundError:
        near = difflib.get_close_matches(repository, _names_of(hub, repository.partition("/")[0]), n=1)
        hint = f"did you mean hub:{near[0]}?" if near else "if it is private, log in with `hf auth login`"
        raise UserError(f"the Hub has no {repository}: {hint}") from None
    except Exception as error:
        raise UserError(f"hub:{name} could not be downloaded: {_line(error)}") from error
    if not (Path(folder) / "policy.safetensors").exists():
        raise UserError(f"hub:{repository} holds no policy of es_flipout: it has no policy.safetensors")
    return Path(folder)


def _names_of(hub: Any, user: str) -> list[str]:
    try:
        return [model.id for model in hub.HfApi().list_models(author=user, filter=_TAG, limit=100)]
    except Exception:  # only a hint
        return []


def _front_matter(config: TrainConfig, evaluation: dict[str, Any] | None) -> str:
    """Return the metadata that the Hub reads from the top of a model card."""
    lines = ["---", f"library_name: {_TAG}", "tags:", f"- {_TAG}", "- reinforcement-learning", "- evolution-strategies"]
    if evaluation is not None:
        env_id = config.task.env_id
        lines += [
            "model-index:",
            f'- name: "ES, {env_id}"',
            "  results:",
            "  - task: {type: reinforcement-learning, name: reinforcement-learning}",
            f'    dataset: {{type: "{env_id}", name: "{env_id}"}}',
            f'    metrics: [{{type: mean_reward, value: "{evaluation["mean_return"]:.2f} +/- {evaluation["std_return"]:.2f}"}}]',
        ]
    return "\n".join([*lines, "---", "", ""])


def _videos(run_dir: Path) -> list[Path]:
    return sorted(path for ending in ("mp4", "gif") for path in run_dir.glob(f"*.{ending}"))


def _check(name: str) -> None:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise UserError(f"a repository of the Hub is named USER/NAME, got {name!r}")


def _import() -> Any:
    try:
        import huggingface_hub  # pyright: ignore[reportMissingImports]  (an extra)
    except ImportError as error:
        raise UserError(f"the Hub needs huggingface_hub: pip install 'es-flipout[hub]' ({error})") from None
    return huggingface_hub


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
