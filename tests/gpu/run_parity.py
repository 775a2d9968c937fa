"""Forward parity in low precision, at tensor-parallel sizes, and of large models layer by layer.

`python tests/gpu/run_parity.py --device cuda --tiny build/tiny --work DIR --out OUT`. Each measurement runs in
processes of its own. OUT gets `parity.json`; `--record-from FILE` puts one into fixtures/measured/parity.json, from
which `make docs` writes the figures of docs/parity.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE)]

from run_forward import say, versions  # noqa: E402

MEASURED = ROOT / "fixtures" / "measured" / "parity.json"
TINY = ("llama", "qwen3", "qwen3_moe")
#: Models in real width, cut to a few layers: (name in fixtures/index, layers).
WIDE = (("Llama-3.2-1B", 4), ("Qwen3-0.6B", 4), ("Qwen3-30B-A3B", 2))
#: Compared layer by layer: (name in fixtures/index, layers where not all, limit of private memory in MiB on a CPU).
STREAMED = (("Llama-3.2-1B", None, 3072), ("Llama-3.3-70B-Instruct", 4, 8192), ("Llama-3.1-8B", None, 3072))


class Runs:
    """Everything measured so far; written after each measurement."""

    def __init__(self, device: str, out: Path, deadline: float) -> None:
        self.device, self.path, self.deadline = device, out / "parity.json", deadline
        self.found: dict[str, Any] = {
            "device": device,
            "date": datetime.date.today().isoformat(),
            "versions": versions(device),
            "precision": [],
            "streamed": [],
        }
        out.mkdir(parents=True, exist_ok=True)

    def add(self, kind: str, row: dict[str, Any]) -> None:
        """Keep a row, and print it."""
        self.found[kind].append(row)
        self.path.write_text(json.dumps(self.found, indent=1), encoding="utf-8")
        say(json.dumps(row))

    def child(self, command: list[str], result: Path, log: str, limit_s: float) -> dict[str, Any]:
        """What a child process left in `result`; a reason where it left nothing."""
        left = min(limit_s, self.deadline - time.monotonic())
        if left < 10:
            return {"reason": "no time was left"}
        result.unlink(missing_ok=True)
        env = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}", "MBX_NO_PROGRESS": "1"}
        # A session of its own, so that the processes of torchrun end with it.
        child = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=env,
            start_new_session=True,
        )
        try:
            printed, errors = child.communicate(timeout=left)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            printed, errors = child.communicate()
            errors += f"did not end within {left:.0f} s"
        (self.path.parent / f"{log}.txt").write_text(printed[-6000:] + errors[-6000:], encoding="utf-8")
        if not result.is_file():
            return {"reason": f"ended with code {child.returncode}: {errors[-300:]}"}
        found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        return {**found, "output": printed} if "exit_code" in found else found


def precision(runs: Runs, label: str, hf: Path, work: Path, sizes: list[int]) -> None:
    """One model in every precision at every tensor-parallel size."""
    mcore = work / "mcore"
    convert(hf, mcore)
    for tp in sizes:
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            str(tp),
            "--master-port",
            "29611",
        ]
        command += [str(HERE / "_parity_worker.py"), str(hf), str(mcore), str(tp), runs.device, str(work / "r.json")]
        found = runs.child(command, work / "r.json", "precision", 120)
        if "reason" in found:
            found = {"all": found}
        for name, figures in found.items():
            runs.add("precision", {"model": label, "tp": tp, "precision": name, **figures})


def streamed(runs: Runs, label: str, limit_mib: int, hf: Path, work: Path, device: str) -> None:
    """A model through `mbx verify parity --forward`, with its memory."""
    mcore = work / "mcore"
    convert(hf, mcore)
    command = [
        sys.executable,
        str(HERE / "_measured.py"),
        str(work / "m.json"),
        str(limit_mib if device == "cpu" else 0),
    ]
    command += ["verify", "parity", str(hf), str(mcore), "--forward", "--device", device]
    found = runs.child(command, work / "m.json", "streamed", 240 if runs.device == "cuda" else 3600)
    printed = found.pop("output", "")
    lines = [line.strip() for line in printed.splitlines()]
    start = next((n for n, line in enumerate(lines) if line.startswith("forward")), len(lines))
    runs.add("streamed", {"model": label, "device": device, **found, "printed": lines[start : start + 5]})


def convert(hf: Path, mcore: Path) -> None:
    """The folder as a torch_dist checkpoint, unless it is there."""
    from mbx.run.job import Options, plan_hf_to_mcore, run

    if not mcore.is_dir():
        run(plan_hf_to_mcore(hf, mcore, Options(sync=False)))


def main() -> int:
    import _shapes

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--tiny", type=Path, default=ROOT / "build" / "tiny", help="folder of tiny checkpoints")
    parser.add_argument("--work", type=Path, help="folder with room for 40 GB")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")), help="folder for parity.json")
    parser.add_argument("--tp", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--limit-s", type=float, default=480.0, help="all measurements together, in seconds")
    parser.add_argument(
        "--only", choices=["tiny", "wide", "streamed"], nargs="+", default=["tiny", "wide", "streamed"]
    )
    parser.add_argument("--models", nargs="+", help="of the streamed and wide ones, these")
    parser.add_argument("--record-from", type=Path, metavar="FILE", help="record an earlier parity.json; run nothing")
    arguments = parser.parse_args()
    if arguments.record_from:
        record(json.loads(arguments.record_from.read_text(encoding="utf-8")))
        return 0
    runs = Runs(arguments.device, arguments.out, time.monotonic() + arguments.limit_s)

    def chosen(model: str) -> bool:
        return not arguments.models or model in arguments.models

    for model, layers in WIDE if "wide" in arguments.only else ():
        with tempfile.TemporaryDirectory(dir=arguments.work) as work:
            if chosen(model):
                _shapes.make(Path(work) / "hf", model, layers)
                precision(runs, f"{model}, {layers} layers", Path(work) / "hf", Path(work), arguments.tp)
    for model, depth, limit in STREAMED if "streamed" in arguments.only else ():
        with tempfile.TemporaryDirectory(dir=arguments.work) as work:
            if chosen(model) and time.monotonic() < runs.deadline:
                _shapes.make(Path(work) / "hf", model, depth)
                label = model if depth is None else f"{model}, {depth} layers"
                for device in dict.fromkeys((arguments.device, "cpu")):
                    streamed(runs, label, limit, Path(work) / "hf", Path(work), device)
    for model in TINY if "tiny" in arguments.only else ():
        with tempfile.TemporaryDirectory(dir=arguments.work) as work:
            precision(runs, f"{model}, tiny", arguments.tiny / model, Path(work), arguments.tp)
    return 0


def record(run: dict[str, Any]) -> None:
    """Keep a run's rows; those of the same model, device, size and precision replace earlier ones."""
    kept = json.loads(MEASURED.read_text(encoding="utf-8")) if MEASURED.is_file() else {}
    for kind in ("precision", "streamed"):
        rows = {_key(row): row for row in kept.get(kind, [])}
        for row in run[kind]:
            row.setdefault("device", run["device"])
            rows[_key(row)] = {**row, "date": run["date"], "versions": run["versions"]}
        kept[kind] = list(rows.values())
    MEASURED.write_text(json.dumps(kept, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _key(row: dict[str, Any]) -> tuple[object, ...]:
    return tuple(row.get(name) for name in ("model", "device", "tp", "precision"))


if __name__ == "__main__":
    sys.exit(main())
