"""`mbx doctor`: what this machine and installation offer."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from pathlib import Path
from typing import Any

import typer

from converters.errors import UsageError
from mbx.cli.groups import grouped
from mbx.cli.options import Output, epilog
from mbx.cli.output import out, paint
from mbx.text import aligned, human_bytes, human_memory

EPILOG = epilog("mbx doctor", "mbx doctor --json")

#: Distribution → what mbx does with it; the first ones are needed to convert.
_NEEDED = {
    "numpy": "convert",
    "typer": "convert",
    "rich": "convert",
    "huggingface-hub": "hub models",
    "torch": "forward parity, train",
    "megatron-core": "forward parity, train",
}
_OPTIONAL = {"transformers": "forward parity, train", "transformer-engine": "train in FP8", "peft": "adapters"}
_VARIABLES = (
    *("MBX_DEBUG", "MBX_NO_PROGRESS", "MBX_NO_CONFIG", "NO_COLOR", "FORCE_COLOR"),
    *("HF_ENDPOINT", "HF_HOME", "HF_HUB_OFFLINE", "CUDA_VISIBLE_DEVICES"),
)


@grouped
def doctor(output: Output) -> None:
    """Show versions, devices, settings and their origins.

    Exit code 1 if a needed package is missing or a setting cannot be used.
    """
    output.configure()
    doc = _examine()
    out.result(doc, lambda: _lines(doc))
    raise typer.Exit(0 if doc["ok"] else 1)


def _examine() -> dict[str, Any]:
    from mbx.cli import settings
    from mbx.version import __version__

    found = [{"name": s.name, "value": s.value, "origin": s.origin, "fault": _fault(s.name)} for s in settings.every()]
    packages = {}
    for name, use in (*_NEEDED.items(), *_OPTIONAL.items()):
        packages[name] = {"version": _installed(name), "needed": name in _NEEDED, "used_for": use}
    return {
        "ok": all(p["version"] for p in packages.values() if p["needed"]) and not any(s["fault"] for s in found),
        "mbx": __version__,
        "python": platform.python_version(),
        "executable": sys.executable,
        "platform": platform.platform(),
        "packages": packages,
        "gpu": _gpus(),
        "cpu_cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "free_disk_bytes": shutil.disk_usage(Path.cwd()).free,
        "settings": {s.pop("name"): s for s in found},
        "environment": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
    }


def _fault(setting: str) -> str | None:
    """Why a command that uses the setting would refuse it; None where it would not."""
    from mbx.cli import settings

    try:
        settings.number(setting, None)
    except UsageError as error:
        return error.fact
    return None


def _installed(name: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version  # 10 ms, which every command would wait for

    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _gpus() -> dict[str, Any]:
    """What torch sees; a torch that does not import is a finding, not a crash."""
    try:
        import torch

        count = torch.cuda.device_count()
        devices = [torch.cuda.get_device_properties(n) for n in range(count)]
        return {
            "cuda": torch.version.cuda,
            "devices": [{"name": d.name, "memory_bytes": d.total_memory} for d in devices],
            "fault": None,
        }
    except (ImportError, OSError, RuntimeError) as error:
        return {"cuda": None, "devices": [], "fault": f"{type(error).__name__}: {error}"}


def _lines(doc: dict[str, Any]) -> list[str]:
    rows = [("mbx", doc["mbx"], ""), ("python", doc["python"], doc["executable"])]
    for name, package in doc["packages"].items():
        missing = "missing" if package["needed"] else "not installed"
        rows.append((name, package["version"] or missing, package["used_for"]))
    gpu = doc["gpu"]
    if gpu["fault"]:
        rows.append(("gpu", "torch fails", gpu["fault"]))
    rows += [("gpu", device["name"], human_memory(device["memory_bytes"])) for device in gpu["devices"]]
    if not gpu["devices"] and not gpu["fault"]:
        rows.append(("gpu", "none", "conversion and CPU parity need none"))
    rows.append(("cpu", f"{doc['cpu_cores']} cores", f"{human_memory(doc['memory_bytes'])} of memory"))
    rows.append(("disk", f"{human_bytes(doc['free_disk_bytes'])} free", "where you are"))
    rows += [(name, entry["value"], entry["origin"]) for name, entry in doc["settings"].items()]
    rows += [(name, value, "environment") for name, value in doc["environment"].items()]
    lines = aligned(rows)
    if any(package["needed"] and not package["version"] for package in doc["packages"].values()):
        lines.append(paint("a needed package is missing: install mbx again", "red"))
    faults = [entry["fault"] for entry in doc["settings"].values() if entry["fault"]]
    lines += [paint(fault, "red") for fault in faults]
    return lines
