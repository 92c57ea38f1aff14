"""Hooks of MkDocs (``mkdocs.yml``): files outside docs/ join the site, and formulas become MathML.

The pages link to files of the repository by relative paths, so that the links also work in a checkout and on a code host. Here,
every file that a page links to comes along: Markdown as a page, anything else as it is. Its path in the site is its path in the
repository, without ``docs/``.
"""

from __future__ import annotations

import html
import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import latex2mathml.converter

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
_LINK = re.compile(r"(\]\()(?!\w+:|#|/)([^)#\s]+)(#[^)\s]*)?(\))")
_CODE = re.compile(r"(^```.*?^```$|`[^`\n]+`)", re.MULTILINE | re.DOTALL)
_FORMULA = re.compile(r'<(span|div) class="arithmatex">(?:\\\((.*?)\\\)|\\\[(.*?)\\\])</\1>', re.DOTALL)
_LOADED = re.compile(
    r"<(?:script|img|iframe|source)\b[^>]*\bsrc=\"?(?:https?:)?//|<link\b[^>]*\bhref=\"?(?:https?:)?//"
)
_ROLE = re.compile(r":(?:class|meth|func|attr|mod|data|exc):<code>~?([\w.]+)</code>")
_ALSO = ("results/**/table.md", "results/**/*.png", "results/LOG.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")


def uri(path: Path) -> str:
    """Path of a file in the site; the README is its front page."""
    if path == ROOT / "README.md":
        return "index.md"
    return path.relative_to(DOCS if path.is_relative_to(DOCS) else ROOT).as_posix()


def target(page: Path, link: str) -> Path:
    """The file that a relative link of ``page`` leads to; of a folder, its README."""
    path = (page.parent / link).resolve()
    return path / "README.md" if path.is_dir() else path


def links(page: Path) -> list[Path]:
    """Existing files of the repository that a page links to."""
    text = _CODE.sub("", page.read_text(encoding="utf-8"))
    targets = (target(page, found[2]) for found in _LINK.finditer(text))
    return [path for path in targets if path.is_file() and path.is_relative_to(ROOT)]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what the pages link to, and what is linked from there."""
    from mkdocs.structure.files import File

    queue = [*DOCS.rglob("*.md"), *(path for pattern in _ALSO for path in sorted(ROOT.glob(pattern)))]
    seen: set[Path] = set()
    while queue:
        path = queue.pop(0)
        if path in seen or path == ROOT / "README.md":
            continue
        seen.add(path)
        if not path.is_relative_to(DOCS):
            files.append(File.generated(config, uri(path), abs_src_path=str(path)))
        if path.suffix == ".md":
            queue.extend(links(path))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Point links at paths in the site, and give the tables of results/ a title and their figure."""
    source = Path(page.file.abs_src_path or "").resolve()

    def relative(found: re.Match[str]) -> str:
        path = target(source, found[2])
        if not (path.is_file() and path.is_relative_to(ROOT)):
            return found[0]
        there = posixpath.relpath(uri(path), posixpath.dirname(page.file.src_uri))
        return f"{found[1]}{there}{found[3] or ''}{found[4]}"

    parts = _CODE.split(markdown)  # every second part is code
    markdown = "".join(part if i % 2 else _LINK.sub(relative, part) for i, part in enumerate(parts))
    if source.name == "table.md":
        figures = "".join(f"![{path.stem}]({path.name})\n\n" for path in sorted(source.parent.glob("*.png")))
        markdown = f"# {source.parent.name}\n\n{figures}{markdown}"
    return markdown


def on_page_content(html: str, **_: Any) -> str:
    """Replace formulas by MathML, which browsers show without a script, and roles of docstrings by links."""
    html = _ROLE.sub(r'<autoref optional identifier="\1"><code>\1</code></autoref>', html)
    return _FORMULA.sub(_mathml, html).replace("::</p>", ":</p>")


def on_post_page(output: str, page: Page, **_: Any) -> str:
    """Check that the page loads nothing from elsewhere.

    Raises:
        PluginError: it does; this ends the build.
    """
    from mkdocs.exceptions import PluginError

    if loaded := _LOADED.search(output):
        raise PluginError(f"{page.file.src_uri} loads something from elsewhere: {loaded[0]}")
    return output


def _mathml(found: re.Match[str]) -> str:
    inline, block = found[2], found[3]
    latex = html.unescape(inline or block).strip()
    return latex2mathml.converter.convert(latex, display="inline" if inline else "block")
