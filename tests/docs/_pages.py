"""What the pages of docs/ and README.md hold: blocks of code, each with its place and what stands before it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
_FENCE = re.compile(r"(?P<indent> *)(?P<mark>```+|~~~+)(?P<language>[\w-]*)")
_NOT_RUN = re.compile(r"<!-- not run: (.+) -->")
#: How a command line of a page begins: variables, and a program.
_STARTS = re.compile(
    r"\s*(?:[A-Z_]+=\S+ +)*(?:mbx|python3?|pip|uv|pipx|conda|make|torchrun|docker|pytest|git|wget|apt-get)(?: |$)"
)


@dataclass(frozen=True)
class Block:
    """Code of a page. `language` is empty where it is indented alone; `not_run` says why nobody runs it."""

    page: Path
    line: int
    language: str
    text: str
    not_run: str = ""

    @property
    def place(self) -> str:
        return f"{named(self.page)}:{self.line}"


def named(page: Path) -> str:
    """A page by its path in the repository, or by its name elsewhere."""
    return str(page.relative_to(ROOT)) if page.is_relative_to(ROOT) else page.name


def pages() -> list[Path]:
    """Every page a person reads, README.md first."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path) -> list[Block]:
    """Code of a page, in its order: between fences, and indented by four behind an empty line."""
    lines = page.read_text(encoding="utf-8").splitlines()
    found: list[Block] = []
    at, reason = 0, ""
    while at < len(lines):
        line = lines[at]
        if fence := _FENCE.match(line):
            end = next(n for n in range(at + 1, len(lines)) if lines[n].strip() == fence["mark"])
            inside = [text[len(fence["indent"]) :] for text in lines[at + 1 : end]]
            found.append(Block(page, at + 2, fence["language"] or "text", "\n".join(inside), reason))
            at, reason = end + 1, ""
        elif line.startswith("    ") and (at == 0 or not lines[at - 1].strip() or found and _ends(found[-1], at)):
            found.append(Block(page, at + 1, "", line.strip(), reason))
            at += 1
        else:
            reason = told[1] if (told := _NOT_RUN.match(line.strip())) else reason if not line.strip() else ""
            at += 1
    return found


def _ends(block: Block, at: int) -> bool:
    """Whether an indented block ends right before the line."""
    return not block.language and block.line == at


def command_lines(block: Block) -> Iterator[tuple[str, list[str]]]:
    """The command lines of a block, by place, in words, continued lines joined; up to a pipe or what redirects."""
    if block.language not in ("", "sh", "console"):
        return
    text = block.text.replace("\\\n", "  ")
    for number, line in enumerate(text.split("\n")):
        words = shlex.split(line, comments=True) if _STARTS.match(line) else []
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words = words[1:]
        stops = [at for at, word in enumerate(words) if re.fullmatch(r"\|{1,2}|&{1,2}|;|\d?[<>]{1,2}&?\S*", word)]
        words = words[: stops[0]] if stops else words
        if words:
            yield f"{named(block.page)}:{block.line + number}", words
