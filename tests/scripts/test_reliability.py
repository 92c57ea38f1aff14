"""The table of the reliability checks counts what their files say."""

import json
from pathlib import Path

from scripts.checks import reliability

MADE = {"environment": {"commit": "0123456789abcdef"}}
FUZZ = {
    "command": "fuzz.py --cases 5",
    "ends": {"ran": 3, "refused": 1, "traceback": 1},
    "by_kind": {"options": {"ran": 3}, "config.json": {"refused": 1, "traceback": 1}},
    "failures": [{"kind": "config.json", "end": "traceback"}],
}
CHAOS = {
    "command": "chaos.py --seed 7",
    "runs": 4,
    "events": {"ray": 9},
    "kills_in": {},
    "kills_of_ray": {"raylet": 9},
    "disk_full_at": {},
    "not_done": ["cannot mount a tmpfs: permission denied"],
    "problems": ["seed 7: rows differs"],
}
ALONE = CHAOS | {"command": "chaos.py", "kills_of_ray": {}, "not_done": [], "problems": [], "kills_in": {"training": 3}}
DISKS = ALONE | {"runs": 0, "events": {}, "kills_in": {}, "disk_full_at": {"config.json": 2}}


def test_table(tmp_path: Path) -> None:
    (tmp_path / "fuzz.json").write_text(json.dumps(FUZZ | MADE), encoding="utf-8")
    (tmp_path / "chaos_ray.json").write_text(json.dumps(CHAOS | MADE), encoding="utf-8")
    (tmp_path / "chaos_disks.json").write_text(json.dumps(DISKS | MADE), encoding="utf-8")
    for name in ("chaos_a", "chaos_b"):
        (tmp_path / f"{name}.json").write_text(json.dumps(ALONE | MADE), encoding="utf-8")
    table = reliability.table(tmp_path)
    for row in (
        "| malformed inputs | 5 | 1 |",
        "| malformed input: options | 3 | 0 |",
        "| on Ray, disturbed runs | 4 | 1 |",
        "| on Ray, process killed: raylet | 9 |  |",
        "| disturbed runs | 10 | 0 |",
        "| killed in: training | 6 |  |",
        "| disk full at: config.json | 2 |  |",
        "| not done: cannot mount a tmpfs: permission denied |  |  |",
        "- `chaos.py --seed 7` at commit 0123456789ab",
        "- `chaos_ray.json`: seed 7: rows differs",
    ):
        assert row in table.splitlines(), row
