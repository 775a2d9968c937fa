"""A virtual environment with another release of Megatron Core: `python tests/another_core.py 0.19.2 FOLDER`.

Nothing else is installed twice. The new environment holds that release's package alone, in front of everything that
the running interpreter's environment has: its torch (a CPU build where pip finds one), Transformers, pytest. Two
things make that possible under any Python and without CUDA:

- the package is Python but for one helper of its datasets, compiled for Python 3.12. Its source is compared with the
  installed release's, and that one's build is taken;
- Megatron Core 0.19 imports Triton, which PyTorch's CPU builds come without: its wheel (200 MB) goes beside;
- the package of Muon is Python for 3.12 as well, of which an older one lacks the decorator `typing.override` alone.
"""

from __future__ import annotations

import filecmp
import importlib.util
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
#: Newton–Schulz iterations of Megatron Core's Muon, and what they log by.
MUON = ["emerging-optimizers==0.3.0", "absl-py"]
PIP = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--target"]


def main(version: str, folder: Path) -> None:
    base = Path(sysconfig.get_paths()["purelib"])
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, symlinks=True)
    packages = next(folder.glob("lib/python3*/site-packages")).resolve()
    wheel = ["--ignore-requires-python", "--python-version", "3.12", "--only-binary=:all:"]
    subprocess.run([*PIP, str(packages), *wheel, f"megatron-core=={version}", *MUON], check=True)
    if importlib.util.find_spec("triton") is None:
        subprocess.run([*PIP, str(packages), "-c", str(ROOT / "constraints.txt"), "triton"], check=True)
    here, there = (place / "megatron" / "core" / "datasets" for place in (base, packages))
    if not filecmp.cmp(here / "helpers.cpp", there / "helpers.cpp", shallow=False):
        sys.exit(f"megatron-core {version} has another helpers.cpp: the installed release's build of it does not fit")
    for built in here.glob("helpers_cpp*.so"):
        shutil.copy(built, there)
    lines = [f"import site; site.addsitedir({str(base)!r})\n"]
    if sys.version_info < (3, 12):
        lines.append("import typing, typing_extensions; typing.override = typing_extensions.override\n")
    (packages / "base.pth").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
