"""Measures conversions against `cp -r` of the same bytes, as whole processes: time, peak memory; and planning.

    python -m benchmarks.conversion --size 1b --rounds 5 --dir /scratch

Each round runs `cp -r`, an import and an export one after another on a warm page cache, with everything flushed
between them, so that a noisy host is noisy for all; the ratios are medians of each round's own. Peak memory is
anonymous memory, sampled from /proc every 5 ms. `cp` does not wait for the disk, so both `--no-sync` and the
default, which does, are measured. Needs the repository and its dependencies; generates its own checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.checkpoints import SIZES, make

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Sample:
    """One process: wall seconds, CPU seconds, peak anonymous MiB."""

    seconds: float
    cpu_s: float
    peak_mib: float


def compiled() -> dict[str, str]:
    """This environment, for processes that find their modules compiled, as those of an installed mbx are.

    A checkout whose bytecode may not be written, as in many containers, compiles 100 modules each time: 0.1 s.
    """
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return {**kept, "PYTHONPYCACHEPREFIX": str(ROOT / "build" / "pycache")}


def measure(command: Sequence[str], codes: tuple[int, ...] = (0,)) -> Sample:
    """Run a command to its end; RuntimeError with its words where its exit code is not one of `codes`."""
    before, started = os.times(), time.monotonic()
    process = subprocess.Popen(
        command, cwd=ROOT, env=compiled(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    peak = [0.0]
    watch = threading.Thread(target=_watch, args=(process, peak))
    watch.start()
    words = process.stderr.read() if process.stderr else ""
    code = process.wait()
    seconds, after = time.monotonic() - started, os.times()
    watch.join()
    if code not in codes:
        raise RuntimeError(f"{' '.join(command)} ended with {code}: {words}")
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return Sample(seconds, cpu, peak[0])


def _watch(process: subprocess.Popen[str], peak: list[float]) -> None:
    while process.poll() is None:
        try:
            text = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            return
        if "RssAnon:" in text:
            peak[0] = max(peak[0], int(text.split("RssAnon:")[1].split()[0]) / 1024)
        time.sleep(0.005)


def mbx(*arguments: object) -> list[str]:
    """Command line of this checkout's mbx."""
    return [sys.executable, "-m", "mbx", *map(str, arguments), "-qq"]


def rounds(work: Path, size: str, count: int, options: Sequence[str], tp: int) -> dict[str, list[Sample]]:
    """Samples of each step by name, one a round, after a round that only warms up."""
    source, copy, mcore, back = (work / name for name in ("source", "copy", "mcore", "back"))
    make(source, size)
    for path in source.iterdir():  # into the page cache
        subprocess.run(["cat", path], stdout=subprocess.DEVNULL, check=True)
    flushed = f'cp -r "{source}" "{copy}" && sync -f "{copy}"'
    steps: dict[str, tuple[Path, list[str]]] = {
        "cp -r": (copy, ["cp", "-r", str(source), str(copy)]),
        "cp -r + sync": (copy, ["sh", "-c", flushed]),
    }
    for label, extra in (("", ("--no-sync",)), (" + sync", ())):
        steps[f"import{label}"] = (
            mcore,
            mbx("convert", "hf-to-mcore", source, mcore, "--tp", tp, "--overwrite", *extra, *options),
        )
        steps[f"export{label}"] = (back, mbx("convert", "mcore-to-hf", mcore, back, *extra, *options))
    out: dict[str, list[Sample]] = {name: [] for name in steps}
    for number in range(count + 1):
        for name, (target, command) in steps.items():
            shutil.rmtree(target, ignore_errors=True)
            os.sync()
            sample = measure(command)
            if number:
                out[name].append(sample)
            if target != mcore:  # the next export reads that one
                shutil.rmtree(target)
    return out


def planning(work: Path) -> dict[str, Sample]:
    """A dry run over the headers of DeepSeek-V3, sparse files behind them."""
    source = work / "deepseek"
    make(source, "deepseek-v3", sparse=True)
    command = mbx("convert", "hf-to-mcore", source, work / "none", "--dry-run", "--tp", 2)
    # The plan is what is measured: that the result does not fit on this disk (5) is an answer too.
    return {"plan DeepSeek-V3": measure(command, (0, 5))}


def index(work: Path) -> dict[str, Sample]:
    """Reading a `.metadata` of 10^5 chunks."""
    code = f"import benchmarks.metadata as m; m.write({str(work / 'index')!r}, 100_000)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    code = f"import benchmarks.metadata as m; m.read({str(work / 'index')!r}, 100_000)"
    return {"read .metadata of 1e5 chunks": measure([sys.executable, "-c", code])}


def table(size: str, nbytes: int, samples: dict[str, list[Sample]]) -> list[str]:
    """The samples as lines of text: medians, and each step's ratio to `cp -r` of its own round."""
    lines = [f"{size}, {nbytes / 1e9:.2f} GB, {os.cpu_count()} cores, {len(next(iter(samples.values())))} rounds"]
    lines.append(f"{'step':<30} {'wall':>8} {'CPU':>8} {'GB/s':>6} {'x cp -r':>8} {'peak anon':>10}")
    for name, found in samples.items():
        wall = statistics.median(sample.seconds for sample in found)
        cpu = statistics.median(sample.cpu_s for sample in found)
        text = f"{name:<30} {wall:>6.2f} s {cpu:>6.2f} s {nbytes / 1e9 / wall:>6.2f}"
        if "cp -r" in samples and len(found) == len(samples["cp -r"]):
            ratios = [sample.seconds / copy.seconds for sample, copy in zip(found, samples["cp -r"], strict=True)]
            text += f" {statistics.median(ratios):>8.2f}"
        else:
            text += " " * 9
        lines.append(f"{text} {max(sample.peak_mib for sample in found):>6.0f} MiB")
    return lines


def main() -> None:
    """Parse the command line, measure, print tables and, with --json, the samples."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", action="append", choices=sorted(SIZES), help="repeatable; default 1b")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dir", type=Path, help="where to work; needs three times the size")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--workers", help="as mbx convert")
    parser.add_argument("--max-memory", help="as mbx convert")
    parser.add_argument("--dtype", help="as mbx convert: measures a cast")
    parser.add_argument("--plan", action="store_true", help="also measure planning and reading an index")
    parser.add_argument("--json", type=Path, help="file for the samples")
    chosen = parser.parse_args()
    flags = ("workers", "max_memory", "dtype")
    options = [text for f in flags if getattr(chosen, f) for text in (f"--{f.replace('_', '-')}", getattr(chosen, f))]
    document: dict[str, object] = {"host": platform.platform(), "cores": os.cpu_count(), "options": options}
    for size in chosen.size or ["1b"]:
        _in_scratch(chosen.dir, lambda work, size=size: _measure_size(work, size, chosen, options, document))  # type: ignore[misc]
    if chosen.plan:
        _in_scratch(chosen.dir, lambda work: _measure_planning(work, document))
    if chosen.json:
        chosen.json.write_text(json.dumps(document, indent=1))


def _measure_size(
    work: Path, size: str, chosen: argparse.Namespace, options: Sequence[str], document: dict[str, object]
) -> None:
    samples = rounds(work, size, chosen.rounds, options, chosen.tp)
    nbytes = sum(path.stat().st_size for path in (work / "source").iterdir())
    print("\n".join(table(size, nbytes, samples)), flush=True)
    document[size] = {"bytes": nbytes, **{name: [asdict(s) for s in found] for name, found in samples.items()}}


def _measure_planning(work: Path, document: dict[str, object]) -> None:
    for name, sample in {**planning(work), **index(work)}.items():
        print(f"{name:<30} {sample.seconds:>6.2f} s {sample.cpu_s:>6.2f} s {sample.peak_mib:>30.0f} MiB", flush=True)
        document[name] = asdict(sample)


def _in_scratch(parent: Path | None, action: Callable[[Path], None]) -> None:
    with tempfile.TemporaryDirectory(dir=parent, prefix="mbx-bench-") as work:
        action(Path(work))


if __name__ == "__main__":
    main()
