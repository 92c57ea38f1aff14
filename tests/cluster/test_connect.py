"""Connecting: errors are reported in one line, within seconds."""

import builtins
import socket
import time
from typing import Any

import pytest

from es_flipout.cluster.connect import Connection, import_ray
from es_flipout.errors import UserError


def test_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *arguments: Any, **keywords: Any) -> Any:
        if name == "ray":
            raise ImportError("No module named 'ray'")
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"pip install 'es-flipout\[ray\]'"):
        import_ray()


@pytest.mark.parametrize("address", ["here", "ray://", "host:", ":1", "host:port", "ray://host:1x"])
def test_an_address_that_is_none(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    with pytest.raises(UserError, match="ray-address must be host:port"):
        Connection(address)


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_an_address_where_nobody_is(monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, but does not listen
        started = time.monotonic()
        with pytest.raises(UserError, match=r"no Ray cluster answers at .*127\.0\.0\.1.*ray start --head"):
            Connection(f"{scheme}127.0.0.1:{taken.getsockname()[1]}")
        assert time.monotonic() - started < 30


def test_what_ray_says_of_a_cluster_it_cannot_join(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**options: Any) -> None:
        raise RuntimeError("Version mismatch: The cluster was started with:\n    Ray: 1.0")

    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", refuse)
    with pytest.raises(UserError, match=r"cannot join the Ray cluster at auto: Version mismatch: .* Ray: 1\.0$"):
        Connection("auto")


def test_a_ray_that_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def time_out(**options: Any) -> None:
        raise Exception("The current node timed out during startup.\nThe raylet failed.")

    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", time_out)
    with pytest.raises(UserError, match=r"Ray does not start on this machine: .*startup\. The raylet failed\.$"):
        Connection()


def test_a_ray_that_is_there_is_used_and_left(connection: Connection) -> None:
    other = Connection()
    assert other.cores == connection.cores == 4
    other.close()
    assert connection.ray.is_initialized()
