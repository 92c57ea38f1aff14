import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch

# Without a GPU, Triton's interpreter runs the kernels. Triton reads this variable on import, so it must be set before.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from es_flipout.cluster.connect import Connection
from es_flipout.perturbations import Dense, Family, Flipout, LowRank

# Makes helpers next to the tests importable by name, also with --import-mode=importlib.
sys.path.append(str(Path(__file__).parent))
# Scripts are imported as scripts.paper.es and so on.
sys.path.append(str(Path(__file__).parents[1]))

# On small machines, more than one intra-op thread can stall at every barrier.
torch.set_num_threads(1)
hypothesis.settings.register_profile("default", derandomize=True, deadline=None)
hypothesis.settings.load_profile("default")


@pytest.fixture(autouse=True)
def seeds() -> None:
    """Start each test from the same global random state."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 (the global state is what is being fixed)
    torch.manual_seed(0)


FAMILIES: dict[str, Family] = {
    "flipout": Flipout(),
    "flipout-3": Flipout(bases=3),
    "flipout-gaussian": Flipout(base="gaussian"),
    "flipout-gaussian-3": Flipout(base="gaussian", bases=3),
    "low_rank": LowRank(),
    "low_rank-3": LowRank(rank=3),
    "dense": Dense(),
}


@pytest.fixture(scope="session", params=FAMILIES.values(), ids=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> Family:
    """Return each perturbation family, with the settings that change how it computes."""
    return request.param


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def connection() -> Iterator[Connection]:
    """One connection for all tests that need Ray, because starting it takes seconds."""
    # Workers must find the package under test, even if it is not installed from here.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    made = Connection(cores=4, gpus=2)  # GPUs that do not exist: Ray only counts them
    yield made
    made.close()


@pytest.fixture
def ray(connection: Connection) -> Any:
    """The package ``ray``, connected."""
    return connection.ray
