"""A headless browser, for tests that look at a page after layout."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from html import unescape
from pathlib import Path

#: Debian's package is called chromium.
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_ASKED = """<script>document.title = JSON.stringify({
  wide: document.documentElement.scrollWidth, window: window.innerWidth,
  paper: getComputedStyle(document.body).backgroundColor, ink: getComputedStyle(document.body).color,
  stops: document.querySelectorAll('[tabindex="0"], summary, a').length,
  cut: [...document.querySelectorAll('.wide')]
    .filter(e => e.getBoundingClientRect().right > window.innerWidth + 1).length
})</script>"""


@dataclass(frozen=True)
class Seen:
    """A page after layout: its width and the window's in pixels, colours, places that Tab reaches, parts cut off."""

    wide: int
    window: int
    paper: str
    ink: str
    stops: int
    cut: int


def look(page: Path, work: Path, width: int, *, dark: bool = False) -> Seen:
    """Lay `page` out in a window of that width."""
    asking = work / f"asking-{width}-{dark}.html"
    asking.write_text(page.read_text(encoding="utf-8").replace("</body>", f"{_ASKED}</body>"), encoding="utf-8")
    colours = ["--blink-settings=preferredColorScheme=0"] if dark else []
    dom = run(work, *colours, f"--window-size={width},900", "--dump-dom", asking.as_uri())
    return Seen(**json.loads(unescape(re.search("<title>(.*?)</title>", dom, re.S)[1])))  # type: ignore[index]


def run(work: Path, *arguments: str) -> str:
    """Run the browser, whose profile lies in `work`, and give what it prints."""
    assert BROWSER is not None
    flags = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--user-data-dir={work / 'profile'}",
    ]
    environment = {**os.environ, "HOME": str(work)}
    done = subprocess.run(
        [BROWSER, *flags, *arguments], capture_output=True, text=True, timeout=120, env=environment, check=True
    )
    return done.stdout
