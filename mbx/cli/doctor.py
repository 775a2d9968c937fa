"""`mbx doctor`: what this machine and installation offer."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from pathlib import Path
from typing import Any

import typer

from converters.errors import MbxError, UsageError
from mbx.cli.groups import grouped
from mbx.cli.options import Output, epilog
from mbx.cli.output import out, paint
from mbx.extras import install_line
from mbx.text import aligned, human_bytes, human_memory

EPILOG = epilog("mbx doctor", "mbx doctor --json")

#: Distribution → what mbx does with it; the core comes with every installation.
_CORE = {"numpy": "convert", "typer": "convert", "rich": "convert", "huggingface-hub": "hub models"}
_OPTIONAL = {
    "torch": "casts, codecs, parity, train",
    "megatron-core": "forward parity, train",
    "transformers": "forward parity, train",
    "psutil": "train",
    "transformer-engine": "train in FP8",
    "peft": "answers and baselines of adapters",
    "pillow": "train on images",
    "flash-linear-attention": "train gated delta nets",
    "mamba-ssm": "train Mamba layers",
    "causal-conv1d": "train Mamba layers, gated delta nets in less memory",
}
#: Distribution → its package, where that has another name.
_MODULES = {"flash-linear-attention": "fla", "pillow": "PIL"}
#: Job → the extra that brings what it needs, and the distributions; each needs those of the jobs before it too.
_JOBS = {
    "convert": (None, tuple(_CORE)),
    "cast and decode": ("torch", ("torch",)),
    "prove by forward pass": ("verify", ("megatron-core", "transformers")),
    "train": ("train", ("psutil",)),
    "train in FP8": ("gpu", ("transformer-engine",)),
    "train in MXFP8 and NVFP4": ("gpu", ()),
}
#: Job → the recipe that a GPU has to run, and what that is called.
_SCALINGS = {"train in FP8": ("tensorwise", "FP8"), "train in MXFP8 and NVFP4": ("mxfp8", "MXFP8 and NVFP4")}
_VARIABLES = (
    *("MBX_DEBUG", "MBX_NO_PROGRESS", "MBX_NO_CONFIG", "NO_COLOR", "FORCE_COLOR", "MBX_CACHE_DIR", "MBX_CACHE_MAX"),
    *("HF_ENDPOINT", "HF_HOME", "HF_HUB_OFFLINE", "CUDA_VISIBLE_DEVICES"),
)


@grouped
def doctor(output: Output) -> None:
    """Show versions, devices, settings and their origins.

    Ends with a verdict for each job. Exit code 1 if conversion lacks a package or a setting cannot be used.
    """
    output.configure()
    doc = _examine()
    out.result(doc, lambda: _lines(doc))
    raise typer.Exit(0 if doc["ok"] else 1)


def _examine() -> dict[str, Any]:
    from mbx.cli import settings
    from mbx.installed import core_release, core_version, unknown_core
    from mbx.version import __version__

    found = [{"name": s.name, "value": s.value, "origin": s.origin, "fault": _fault(s.name)} for s in settings.every()]
    packages = {}
    for name, use in (*_CORE.items(), *_OPTIONAL.items()):
        version = core_version() if name == "megatron-core" else _installed(name)  # a checkout has no metadata
        packages[name] = {"version": version, "needed": name in _CORE, "used_for": use}
    gpu = _gpus() if packages["torch"]["version"] else {"cuda": None, "devices": [], "fault": None}
    return {
        "ok": all(p["version"] for p in packages.values() if p["needed"]) and not any(s["fault"] for s in found),
        "mbx": __version__,
        "python": platform.python_version(),
        "executable": sys.executable,
        "platform": platform.platform(),
        "packages": packages,
        "megatron_core": {"taken_for": core_release().version, "unknown": unknown_core()},
        "gpu": gpu,
        "jobs": _verdicts({name for name, package in packages.items() if package["version"]}, gpu),
        "cpu_cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "free_disk_bytes": shutil.disk_usage(Path.cwd()).free,
        "cache": _cache(),
        "settings": {s.pop("name"): s for s in found},
        "environment": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
    }


def _verdicts(installed: set[str], gpu: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Of each job: whether it can be done here, what lacks, and what brings it."""
    from mbx.train.model.fp8 import runs_on, span

    verdicts: dict[str, dict[str, Any]] = {}
    lacks: list[str] = []
    for job, (extra, names) in _JOBS.items():
        lacks = lacks + [name for name in names if name not in installed]
        hint = install_line(extra) if lacks and extra else "install mbx again" if lacks else None
        verdicts[job] = {"ok": not lacks, "lacks": list(lacks), "hint": hint}
    for job, (recipe, kind) in _SCALINGS.items():
        if not any(runs_on(recipe, tuple(device["capability"])) for device in gpu["devices"]):
            lacks = [*verdicts[job]["lacks"], f"a GPU with {kind} (compute capability {span(recipe)})"]
            verdicts[job].update(ok=False, lacks=lacks)
    return verdicts


def _cache() -> dict[str, Any]:
    """Where prepared data lies, what it takes and may take."""
    from mbx.train.data.cache import cache_folder, most_bytes, taken_bytes

    try:
        return {"folder": str(cache_folder()), "bytes": taken_bytes(), "most_bytes": most_bytes(), "fault": None}
    except MbxError as error:
        return {"folder": None, "bytes": 0, "most_bytes": 0, "fault": error.fact}


def _fault(setting: str) -> str | None:
    """Why a command that uses the setting would refuse it; None where it would not."""
    from mbx.cli import settings

    try:
        settings.number(setting, None)
    except UsageError as error:
        return error.fact
    return None


def _installed(name: str) -> str | None:
    """A distribution's version; None where it is not installed or its package is not found."""
    from importlib.metadata import PackageNotFoundError, version  # 10 ms, which every command would wait for
    from importlib.util import find_spec

    if find_spec(_MODULES.get(name, name.replace("-", "_"))) is None:
        return None
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
            "devices": [
                {"name": d.name, "memory_bytes": d.total_memory, "capability": [d.major, d.minor]} for d in devices
            ],
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
    cache = doc["cache"]
    sizes = f"{human_bytes(cache['bytes'])} of {human_bytes(cache['most_bytes'])}"
    rows.append(
        ("prepared data", "not used", cache["fault"]) if cache["fault"] else ("prepared data", sizes, cache["folder"])
    )
    rows += [(name, entry["value"], entry["origin"]) for name, entry in doc["settings"].items()]
    rows += [(name, value, "environment") for name, value in doc["environment"].items()]
    lines = aligned(rows)
    if doc["megatron_core"]["unknown"]:
        lines.append(paint(doc["megatron_core"]["unknown"], "yellow"))
    for job, verdict in doc["jobs"].items():
        words = "yes" if verdict["ok"] else f"no: lacks {', '.join(verdict['lacks'])}"
        lines.append(paint(f"{job}: {words}", "green" if verdict["ok"] else "yellow"))
        if verdict["hint"]:
            lines.append(f"  {verdict['hint']}")
    faults = [entry["fault"] for entry in doc["settings"].values() if entry["fault"]]
    lines += [paint(fault, "red") for fault in faults]
    return lines
