"""A hook of MkDocs: files of the repository that a page links to, outside docs/, become pages of the site."""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
#: Words, target and anchor of a link of Markdown that leads to a file.
_LINK = re.compile(r"(!?\[[^\]]*\])\((?!\w+:|#)([^)\s#]+)(#[^)\s]*)?\)")
_FOLDER, _DOCS = "files", "docs"


def place_of(target: str) -> str:
    """Where a file of the repository stands in the site's sources."""
    if target.startswith(f"{_DOCS}/"):
        return target.removeprefix(f"{_DOCS}/")
    return f"{_FOLDER}/{target}" if target.endswith(".md") else f"{_FOLDER}/{target}.md"


def target_of(source: str, link: str) -> str:
    """Where the link of a file leads to; both are paths in the repository."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), link))


def as_page(target: str) -> str:
    """A file's text as Markdown: a page or a notebook as it is, anything else as code under its name."""
    text = (ROOT / target).read_text(encoding="utf-8")
    kind = PurePosixPath(target).suffix[1:]
    if kind == "md":
        return text
    if kind == "ipynb":
        return "\n\n".join(_cells(json.loads(text)))
    return f"# {PurePosixPath(target).name}\n\n`{target}`\n\n~~~~{kind}\n{text}~~~~\n"


def _cells(notebook: dict[str, list[dict[str, list[str]]]]) -> Iterator[str]:
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        yield text if cell["cell_type"] == "markdown" else f"~~~~python\n{text}\n~~~~"


def led(source: str, text: str) -> str:
    """The text of a file with its links to files as links to their pages; one that leads to none loses its link."""
    here = place_of(source)

    def lead(found: re.Match[str]) -> str:
        target = target_of(source, found[2])
        if not (ROOT / target).is_file():
            return found[0] if source.startswith(f"{_DOCS}/") else found[1].strip("![]")
        if target.startswith(f"{_DOCS}/") and source.startswith(f"{_DOCS}/"):
            return found[0]
        return f"{found[1]}({posixpath.relpath(place_of(target), posixpath.dirname(here))}{found[3] or ''})"

    return _LINK.sub(lead, text)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for every file that is linked to, and for those that it links to in turn."""
    from mkdocs.structure.files import File, InclusionLevel

    waiting = [(f"{_DOCS}/{page.src_uri}", page.content_string) for page in files.documentation_pages()]
    while waiting:
        source, text = waiting.pop()
        for _, link, _ in _LINK.findall(text):
            target = target_of(source, link)
            if target.startswith(f"{_DOCS}/") or not (ROOT / target).is_file():
                continue
            if files.get_file_from_path(place_of(target)) is None:
                made = as_page(target)
                page = File.generated(config, place_of(target), content=led(target, made))
                page.inclusion = InclusionLevel.NOT_IN_NAV
                files.append(page)
                waiting.append((target, made if target.endswith((".md", ".ipynb")) else ""))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links out of docs/ to these pages."""
    uri = page.file.src_uri
    return markdown if uri.startswith(f"{_FOLDER}/") else led(f"{_DOCS}/{uri}", markdown)
