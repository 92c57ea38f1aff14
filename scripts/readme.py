"""Copy the generated tables of results/ into README.md, between their markers.

python scripts/readme.py            # rewrite README.md
python scripts/readme.py --check    # exit 1 if it would change
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_BLOCK = re.compile(r"(<!-- begin (?P<path>\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(readme: str) -> str:
    """The text with every marked block replaced by the file that its marker names."""
    return _BLOCK.sub(lambda block: block[1] + (ROOT / block["path"]).read_text(encoding="utf-8") + block[3], readme)


def main() -> int:
    """Rewrite README.md, or check that it needs no rewriting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    path = ROOT / "README.md"
    before = path.read_text(encoding="utf-8")
    after = filled(before)
    if not check:
        path.write_text(after, encoding="utf-8")
    return int(check and before != after)


if __name__ == "__main__":
    sys.exit(main())
