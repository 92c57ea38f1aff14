"""For tests of the command line: running it, what it says of mistakes, and environments as written by a user."""

import os
import re
import resource
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SMALL = [
    *("--population-size", "4", "--generations", "3", "--hidden", "4", "--checkpoint-every", "2"),
    *("--score-episodes", "2", "--evaluation-episodes", "3"),
]

# Environments as written by a user; `train oddities:NAME` imports the module, as gymnasium.make does.
ODDITIES = """
import gymnasium, numpy as np
from gymnasium.spaces import Box, Discrete, Sequence, Tuple

class Odd(gymnasium.Env):
    steps = 0

    def __init__(self, action=None, observation=None, nan=2.0, fail_at=None, init=None):
        if init:
            raise RuntimeError(init)
        self.action_space = action or Box(-1, 1, (1,), np.float32)
        self.observation_space = observation or Box(-1, 1, (1,), np.float32)
        self.nan, self.fail_at = nan, fail_at

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.t += 1
        Odd.steps += 1
        if Odd.steps == self.fail_at:
            raise RuntimeError("the gearbox\\nfell off")
        reward = float("nan") if action[0] > self.nan else float(np.sum(action))
        return np.zeros(1, np.float32), reward, self.t == 3, False, {}

for name, kwargs in {
    "TupleAction": {"action": Tuple((Discrete(2), Discrete(3)))},
    "SequenceObservation": {"observation": Sequence(Discrete(3))},
    "Unmakeable": {"init": "no license\\nfound"},
    "Raising": {"fail_at": 30},
    "Nan": {"nan": 0.0},
    "NanAlways": {"nan": -2.0},
}.items():
    gymnasium.register(f"{name}-v0", Odd, kwargs=kwargs)
"""


def run(
    *args: str | Path, cwd: Path, file_size: int | None = None, timeout: float = 100
) -> subprocess.CompletedProcess[str]:
    """Run the command line in a real process; with ``file_size``, files cannot grow beyond it."""

    def limit() -> None:
        if file_size is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))

    return subprocess.run(
        [sys.executable, "-m", "es_flipout", *map(str, args)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(cwd)))},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        preexec_fn=limit,
    )


def the_line(code: int, out: str, err: str) -> str:
    """Return the one line on stderr of a command that failed with a user error."""
    assert "Traceback" not in err, err
    assert code == 2, (code, out, err)
    assert out == ""
    assert err.endswith("\n")
    # On a busy machine, the run may have reported progress before.
    err = re.sub(r"^ *\d+%.*\n", "", err, flags=re.MULTILINE)
    assert err.count("\n") == 1, err
    assert err.startswith("error: ")
    assert not re.search("[│╭╰─]|---", err), "the line contains the frame of a box"
    return err.strip()
