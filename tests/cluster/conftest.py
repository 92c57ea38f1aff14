"""One Ray for all tests of the cluster: starting it takes seconds."""

import os
from collections.abc import Iterator
from typing import Any

import pytest

from es_flipout.cluster.connect import Connection


@pytest.fixture(scope="session")
def connection() -> Iterator[Connection]:
    # Workers must find the package under test, also where it is not installed from here.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    made = Connection(cores=4)
    yield made
    made.close()


@pytest.fixture
def ray(connection: Connection) -> Any:
    """The package, connected."""
    return connection.ray
