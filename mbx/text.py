"""Figures and lists in words, for reports and errors; and sizes in words, as figures."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Iterable
from difflib import get_close_matches
from html import escape

from converters.errors import UsageError

_WIDEST, _NARROWEST = 80, 40
_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{p}B": 1000**n for n, p in enumerate("KMGT", 1)}
_UNITS |= {unit: 1024**n for n, p in enumerate("KMGT", 1) for unit in (p, f"{p}iB".upper())}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)")
MIN_MEMORY = 16 << 20
#: What makes a link, an image or a link's definition of the brackets before it (CommonMark 0.31, 4.7 and 6.3).
_LINKS = re.compile(r"\](\(|\[|:)")
#: Who asks, in a URL, and tokens of the hub.
_SECRETS = re.compile(r"(?<=://)[^/\s@]+(?=@)|\bhf_[A-Za-z0-9]{8,}")


def redacted(text: str) -> str:
    """`text` without passwords in URLs and without hub tokens."""
    return _SECRETS.sub("…", text)


def printable(text: str) -> str:
    """`text` with every character that is no plain printable one as an escape: controls, line breaks, direction marks.

    Names of a stranger's checkpoint may hold what a terminal obeys, or what makes a line of its own.
    """
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def in_markdown(text: str) -> str:
    """Text as Markdown shows it: no HTML, no end of a cell or line, no link or image."""
    return _LINKS.sub(r"]\\\1", escape(printable(text), quote=False).replace("|", "\\|"))


def human_bytes(count: float) -> str:
    """Bytes in decimal units, as disks and safetensors shards are sold: `1.24 GB`."""
    return _scaled(count, 1000, ("B", "kB", "MB", "GB", "TB", "PB"))


def human_memory(count: float) -> str:
    """Bytes in binary units, as memory is: `1.0 GiB`."""
    return _scaled(count, 1024, ("B", "KiB", "MiB", "GiB", "TiB", "PiB"))


def human_count(count: float) -> str:
    """`1.24B`, `168M`: a number of parameters."""
    power = min(4, max(0, int(math.log10(max(1.0, count * 1.0005)) // 3)))  # 999.6M is 1B at three digits
    return f"{count / 1000**power:.3g}{('', 'K', 'M', 'B', 'T')[power]}"


def human_time(seconds: float) -> str:
    """`45 s`, `3 min 20 s`, `2 h 5 min`: a time that is still to wait."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"


def near_miss(word: str, known: Iterable[str], otherwise: str) -> str:
    """A hint at what `word` may have meant, of what is `known`; `otherwise` where nothing is near."""
    close = get_close_matches(word, list(known), n=3)
    return f"did you mean {', '.join(close)}?" if close else otherwise


def plural(count: int, noun: str) -> str:
    """`1 tensor`, `2 tensors`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def aligned(rows: Iterable[tuple[str, ...]], *, right: tuple[int, ...] = ()) -> list[str]:
    """Rows as columns two spaces apart; columns in `right` are set flush right."""
    table = list(rows)
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))] if table else []
    lines = []
    for row in table:
        sized = enumerate(zip(row, widths, strict=True))
        lines.append("  ".join(cell.rjust(w) if i in right else cell.ljust(w) for i, (cell, w) in sized).rstrip())
    return lines


def screen_width() -> int:
    """Columns that words are set in: the terminal's, 80 at most; 80 where there is none."""
    columns = shutil.get_terminal_size((_WIDEST, 24)).columns
    return min(_WIDEST, max(_NARROWEST, columns))


def wrapped(items: Iterable[str], beside: int = 0) -> list[str]:
    """Items with commas, in lines as wide as the screen less what stands `beside`, unless one item is longer."""
    lines: list[str] = []
    width = screen_width() - beside
    for item in items:
        if lines and len(lines[-1]) + len(item) + 2 <= width:
            lines[-1] += f", {item}"
        else:
            lines.append(item)
    return lines


def _scaled(count: float, base: int, units: tuple[str, ...]) -> str:
    steps = 0
    while round(count) >= base and steps < len(units) - 1:
        count, steps = count / base, steps + 1
    return f"{count:.0f} {units[steps]}" if steps == 0 or count >= 99.95 else f"{count:#.3g} {units[steps]}"


def parse_size(text: str) -> int:
    """Bytes of `512MiB`, `2G` (binary) or `5GB` (decimal); UsageError for anything else."""
    match = _SIZE.fullmatch(text.strip())
    unit = match and _UNITS.get(match[2].upper())
    if match is None or unit is None or (size := int(float(match[1]) * unit)) < 1:
        raise UsageError(f"{text!r} is not a size", hint="write 512MiB, 1GiB or 2G (binary), or 5GB (decimal)")
    return size


def parse_memory(text: str) -> int:
    """Bytes of a memory limit; UsageError below 16 MiB, which the engine's pieces do not fit in."""
    if (size := parse_size(text)) < MIN_MEMORY:
        raise UsageError(f"a memory limit of {text!r} is too small", hint="16MiB is the least; 1GiB is the default")
    return size
