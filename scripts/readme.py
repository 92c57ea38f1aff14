"""Copy the generated tables of results/ into README.md and docs/, between their markers.

python scripts/readme.py            # rewrite them
python scripts/readme.py --check    # exit 1 if one would change
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
_BLOCK = re.compile(r"(<!-- begin (?P<path>\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(readme: str) -> str:
    """The text with every marked block replaced by the file that its marker names."""
    return _BLOCK.sub(lambda block: block[1] + (ROOT / block["path"]).read_text(encoding="utf-8") + block[3], readme)


def main() -> int:
    """Rewrite the pages, or check that they need no rewriting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    before = [page.read_text(encoding="utf-8") for page in PAGES]
    after = [filled(text) for text in before]
    if not check:
        for page, text in zip(PAGES, after, strict=True):
            page.write_text(text, encoding="utf-8")
    return int(check and before != after)


if __name__ == "__main__":
    sys.exit(main())
