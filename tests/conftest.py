import os
import random
import sys
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch

# Without a GPU the interpreter runs the kernels. Triton reads this when it is imported, so it must be set before.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from es_flipout.perturbations import Dense, Family, Flipout, LowRank

# Helpers that lie beside the tests can be imported by their own name, also with --import-mode=importlib.
sys.path.append(str(Path(__file__).parent))
# So can what the scripts share.
sys.path.append(str(Path(__file__).parents[1] / "scripts"))

# More than one intra-op thread can stall at every barrier on small machines.
torch.set_num_threads(1)
hypothesis.settings.register_profile("default", derandomize=True, deadline=None)
hypothesis.settings.load_profile("default")


@pytest.fixture(autouse=True)
def seeds() -> None:
    """Each test starts from the same global random state, whatever ran before it."""
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
    """Every perturbation family, with the settings that change how it computes."""
    return request.param


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
