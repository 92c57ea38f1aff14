"""What is recorded about versions and hardware."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from typing import Any

import pytest
import torch

from es_flipout import runinfo


def test_everything_that_computes_on_a_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runinfo, "version", lambda package: "1.2")
    assert {"torch", "triton", "mujoco-warp", "warp-lang"} <= set(runinfo.versions())


def answers(text: str) -> Callable[..., Any]:
    return lambda command, **options: subprocess.CompletedProcess(command, 0, text, "")


def has_none(command: list[str], **options: Any) -> Any:
    raise FileNotFoundError(command[0])


@pytest.mark.parametrize(
    ("run", "driver"), [(answers("580.65.06\n580.65.06\n"), "580.65.06"), (answers("\n"), None), (has_none, None)]
)
def test_the_driver_is_recorded_with_the_gpu(run: Any, driver: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "driver" not in runinfo.hardware() or torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(subprocess, "run", run)
    found = runinfo.hardware()
    assert (found["gpu"], found["cuda"], found.get("driver")) == ("a card", "13.0", driver)
