from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from es_flipout.cli import entry
from es_flipout.errors import UserError
from es_flipout.training.signals import Handler, raise_stopped, stop_on_signals

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


class Swallows:
    """Python ignores an exception that is raised while an object is finalized, that of a signal's handler, too."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGTERM)


def test_a_signal_whose_exception_was_ignored_counts_later() -> None:
    numbers: list[int] = []
    with stop_on_signals(raise_stopped):
        Swallows()
        with stop_on_signals(numbers.append):
            assert numbers == [signal.SIGTERM]
            signal.raise_signal(signal.SIGHUP)
    assert numbers == [signal.SIGTERM], "once"


def test_an_error_after_such_a_signal_ends_as_the_signal_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(_: list[str]) -> int:
        Swallows()
        raise UserError("only 0 of 2 workers started")

    monkeypatch.setattr(entry, "_run", run)
    assert entry.main(["train"]) == 128 + signal.SIGTERM
    assert capsys.readouterr().err == "error: only 0 of 2 workers started\n"


@pytest.mark.parametrize("code", [0, 128 + signal.SIGTERM])
def test_ctrl_c_while_the_process_ends_changes_nothing(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    @contextmanager
    def leaves_late(*args: Any, **kwargs: Any) -> Iterator[Handler]:
        with stop_on_signals(*args, **kwargs) as handler:
            yield handler
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    def run(_: list[str]) -> int:
        if code:
            signal.raise_signal(signal.SIGTERM)
        return 0

    monkeypatch.setattr(entry, "stop_on_signals", leaves_late)
    monkeypatch.setattr(entry, "_run", run)
    assert entry.main(["train"]) == code
