"""Forward parity of every family on one device: `python tests/gpu/run_forward.py --device cuda --out DIR`.

Each family runs in a process of its own and none can stop another. DIR gets `forward.json`; a table goes to stdout.
`--record` also puts the figures into `mappings/measured.json`, from which docs/models.md is written. What another
release of Megatron Core alone runs is measured under that one and recorded with `--beside`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE)]

from _alone import run_alone  # noqa: E402
from _seeing_family import WITH_TOWER  # noqa: E402
from _verdict import judge  # noqa: E402

MEASURED = ROOT / "mappings" / "measured.json"
_PACKAGES = ("torch", "transformers", "megatron-core", "transformer-engine")


def versions(device: str) -> dict[str, str]:
    """What was measured with."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    if device == "cuda":
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        if shutil.which(query[0]):
            found["gpu"] = "".join(subprocess.run(query, capture_output=True, text=True).stdout.splitlines()[:1])
    return found


def line(name: str, found: dict[str, Any]) -> str:
    """One row of the table on stdout."""
    figures = found.get("against_transformers_on_cpu", {})
    columns = [f"{name:18}", f"{found.get('table', '-'):15}"]
    columns += [f"{found.get(leg, {}).get('status', '-'):8}" for leg in ("cover", "weights")]
    columns += [f"{found['status']:8}", _number(figures.get("max_abs")), _number(figures.get("mean_kl_nats"))]
    columns.append(_number(found.get("against_transformers_on_cuda", {}).get("max_abs")))
    columns.append(_number(found.get("control", {}).get("max_abs")))
    keys = found.get("extra_state", {})
    counts = [len(keys[kind]) for kind in keys if kind != "asked"]
    columns.append("/".join(map(str, counts)) or "-")
    return "  ".join([*columns, found.get("reason", "")[:110]])


def _number(value: object) -> str:
    return f"{value:8.1e}" if isinstance(value, float) else "       -"


def record(run: dict[str, Any], *, beside: bool = False) -> None:
    """Keep a run's figures as the measured ones of its device.

    Families that were not in it stay from the run before, if that had the same versions of everything, or if this run
    is put `beside` it: then its families say which versions of theirs are others. What was measured so stays as long
    as the table is the same and the usual versions do not run it.
    """
    kept = json.loads(MEASURED.read_text(encoding="utf-8")) if MEASURED.is_file() else {}
    last = kept.get(run["device"], {})
    before = last["families"] if beside or last.get("versions") == run["versions"] else {}
    for found in run["families"].values():
        judge(found, run["device"])
    families = {name: compact(found, run["device"]) for name, found in run["families"].items()}
    if beside:
        others = {name: number for name, number in run["versions"].items() if last["versions"].get(name) != number}
        families = {name: {**found, "date": run["date"], "versions": others} for name, found in families.items()}
        run = {**run, "date": last["date"], "versions": last["versions"]}
    else:
        families = {name: found for name, found in families.items() if not _is_run_elsewhere(found, before.get(name))}
    kept[run["device"]] = {**run, "families": {**before, **families}}
    MEASURED.parent.mkdir(parents=True, exist_ok=True)
    MEASURED.write_text(json.dumps(kept, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _is_run_elsewhere(found: dict[str, Any], before: dict[str, Any] | None) -> bool:
    """Whether what was not run now was measured under other versions `before`, of the same table."""
    there = before is not None and "versions" in before and before.get("sha256") == found.get("sha256")
    return there and found["status"] == "not run"


def compact(found: dict[str, Any], device: str) -> dict[str, Any]:
    """What is worth keeping: no tracebacks and timings, few names, object names for Transformer Engine only."""
    out = {key: value for key, value in found.items() if key not in ("traceback", "seconds", "extra_state") and value}
    for leg in ("cover", "config", "weights"):
        if leg in out:
            out[leg] = {key: value for key, value in out[leg].items() if value}
    if device == "cuda" and "extra_state" in found:
        out["extra_state"] = {
            kind: value if isinstance(value, int) else {"count": len(value), "first": value[:4]}
            for kind, value in found["extra_state"].items()
            if value
        }
    return out


def stale(device: str) -> list[str]:
    """Families that were not measured on the device, or under another table than today's."""
    from mbx.catalogue.models_page import is_stale, read_runs
    from mbx.tables import shipped

    kept = read_runs(MEASURED).get(device, {}).get("families", {})
    measured = {name: one for name, one in kept.items() if "table" in one}  # the others broke before they had one
    return [
        name
        for name in scripts()
        if name not in measured or is_stale(measured[name], shipped(measured[name]["table"]))
    ]


def scripts() -> dict[str, str]:
    """Every family by name, and what measures it: those of text and of diffusion, and those with a tower."""
    from fixtures.diffusion import NAMES as OF_DIFFUSION
    from fixtures.make_tiny import NAMES
    from fixtures.wrapped import TOWERS, WRAPPED

    seeing = [f"{kind}{WITH_TOWER}" for kind in (*WRAPPED, *TOWERS)]
    return dict.fromkeys((*NAMES, *OF_DIFFUSION), "_family.py") | dict.fromkeys(seeing, "_seeing_family.py")


def say(text: str) -> None:
    """One line on stdout, at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="families; all without a name")
    parser.add_argument("--stale", action="store_true", help="of these, what today's tables were not measured with")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")), help="folder for forward.json")
    parser.add_argument("--tiny", type=Path, help="folder of checkpoints by name; made on the spot without it")
    parser.add_argument("--jobs", type=int, default=min(8, os.cpu_count() or 1))
    parser.add_argument("--limit-s", type=float, default=330.0, help="all families together, in seconds")
    parser.add_argument("--record", action="store_true", help="also write mappings/measured.json")
    parser.add_argument("--beside", action="store_true", help="record with the versions that differ from the others'")
    parser.add_argument("--record-from", type=Path, metavar="FILE", help="record an earlier forward.json; run nothing")
    arguments = parser.parse_args()
    if arguments.record_from:
        record(json.loads(arguments.record_from.read_text(encoding="utf-8")), beside=arguments.beside)
        return 0
    script = scripts()
    names = arguments.names or list(script)
    names = [name for name in names if name in stale(arguments.device)] if arguments.stale else names
    if not names:
        say("nothing to measure: no table has changed since")
        return 0
    deadline = time.monotonic() + arguments.limit_s
    families: dict[str, Any] = {}
    run = {
        "device": arguments.device,
        "date": datetime.date.today().isoformat(),
        "versions": versions(arguments.device),
        "families": families,
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    say("family, table, cover, weights, forward; max|d| and KL against Transformers on cpu, max|d| to it on cuda;")
    say("max|d| of the control; keys: objects not written/not asked/tensors not written/not asked")
    with ThreadPoolExecutor(arguments.jobs) as pool:
        runs = {
            name: pool.submit(run_alone, script[name], name, arguments.device, arguments.tiny, deadline)
            for name in names
        }
        for name, future in runs.items():
            families[name] = future.result()
            say(line(name, families[name]))
            for kind, figures in families[name].get("low_precision", {}).items():
                say(f"    {kind}: {figures}")
            # Written anew each time: whatever ends this process leaves the families before it.
            (arguments.out / "forward.json").write_text(json.dumps(run, indent=1), encoding="utf-8")
    if arguments.record:
        record(run, beside=arguments.beside)
    return 1 if any(found["status"] == "failed" for found in families.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
