"""Pictures of docs/ that are taken of real pages: `python -m pages.pictures docs/assets` needs chromium."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from pages.outside import ROOT
from tests.browser import run


def take(folder: Path) -> Path:
    """Convert the tiny Llama, compare both sides with both models, and take a picture of the report."""
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        (work / "llama").symlink_to(ROOT / "fixtures" / "tiny" / "llama")
        for command in (
            ("convert", "hf-to-mcore", "llama", "ckpt", "--tp", "2"),
            ("verify", "parity", "llama", "ckpt", "--forward", "--html", "report.html"),
        ):
            subprocess.run([sys.executable, "-m", "mbx", *command], cwd=work, check=True)
        run(work, "--window-size=900,720", f"--screenshot={work / 'report.png'}", (work / "report.html").as_uri())
        return Path(shutil.move(work / "report.png", folder / "report.png"))


if __name__ == "__main__":
    sys.stdout.write(f"{take(Path(sys.argv[1]))}\n")
