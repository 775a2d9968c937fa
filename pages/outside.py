"""A hook of MkDocs: files of the repository that a page links to, outside docs/, become pages of the site."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
#: Target and anchor of a link of Markdown that climbs.
_CLIMBING = re.compile(r"\]\((\.\./[^)\s#]+)(#[^)\s]*)?\)")
_FOLDER = "files"


def target_of(page: str, link: str) -> PurePosixPath | None:
    """Where the link of a page, by its path below docs/, leads to in the repository; None where that is in docs/."""
    parts: list[str] = ["docs", *PurePosixPath(page).parent.parts]
    for part in PurePosixPath(link).parts:
        parts = parts[:-1] if part == ".." else [*parts, part]
    return None if parts[:1] == ["docs"] else PurePosixPath(*parts)


def place_of(target: PurePosixPath) -> str:
    """Where such a file stands in the site's sources: a page, whatever it is."""
    return f"{_FOLDER}/{target}" if target.suffix == ".md" else f"{_FOLDER}/{target}.md"


def as_page(target: PurePosixPath) -> str:
    """Its text as Markdown: a page as it is, links out of it as words; anything else as code under its name."""
    text = (ROOT / target).read_text(encoding="utf-8")
    if target.suffix == ".md":
        return re.sub(r"\[([^\]]*)\]\((?!https?:)[^)]*\)", r"\1", text)
    return f"# {target.name}\n\n`{target}`\n\n~~~~{target.suffix[1:]}\n{text}~~~~\n"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for every file that is linked to; a link to one that is not there is left for MkDocs to find."""
    from mkdocs.structure.files import File, InclusionLevel

    for source in files.documentation_pages():
        for link, _ in _CLIMBING.findall(source.content_string):
            target = target_of(source.src_uri, link)
            if target is None or not (ROOT / target).is_file() or files.get_file_from_path(place_of(target)):
                continue
            page = File.generated(config, place_of(target), content=as_page(target))
            page.inclusion = InclusionLevel.NOT_IN_NAV
            files.append(page)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links out of docs/ to these pages."""
    up = "../" * (len(PurePosixPath(page.file.src_uri).parts) - 1)

    def led(found: re.Match[str]) -> str:
        target = target_of(page.file.src_uri, found[1])
        if target is None or files.get_file_from_path(place_of(target)) is None:
            return found[0]
        return f"]({up}{place_of(target)}{found[2] or ''})"

    return _CLIMBING.sub(led, markdown)
