"""What the engine does to a disk and to memory, part by part, as whole processes beside `cp` and `cat`.

    python -m benchmarks.engine two-cores casts curve limits verify stages --dir /scratch --json engine.json

- two-cores: import and export of 2.5 GB bound to two processors, `cp -r` likewise, by number of workers.
- casts: imports that change values (`--dtype`, FP8 and MXFP4 sources) beside `cp -r` of what they write.
- same: exports of quantised models, plain and by `--codec same`, beside `cp -r` of what they write.
- curve: import and export from 1 to 40 GB. The largest source is a sparse file of zeros, and its checkpoint is made
  sparse before the export: two dense ones need more room than many disks have. `cp` copies it densely all the same.
- limits: conversions under RLIMIT_DATA = --max-memory + 256 MiB, by number of workers (benchmarks/hard_limits.py).
- cgroup: the same where a memory cgroup bounds the page cache too; needs root.
- verify: both checks beside `cat … >/dev/null` of the same files, page cache warm and dropped.
- stages: where the workers' time goes, in one process with a clock around each stage.

Each result is stored as soon as it is there; a part that fails stores its words and the next one runs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from benchmarks.bench import Bench, Result, bytes_in, drop, once, remove
from benchmarks.conversion import ROOT, Sample, compiled, mbx, measure
from benchmarks.hard_limits import cgroup, limits

TWO_CORES = ("taskset", "-c", "0,1")


def two_cores(bench: Bench) -> None:
    """Import and export bound to two processors."""
    source, work = bench.source("1b"), bench.folder
    copy, mcore, back = work / "copy", work / "mcore", work / "back"
    cp = [*TWO_CORES, "cp", "-r", str(source), str(copy)]
    flags = ("--no-sync", "--overwrite")
    for workers in (None, 1, 3, 4):
        extra = () if workers is None else ("--workers", workers)
        to_mcore = [*TWO_CORES, *mbx("convert", "hf-to-mcore", source, mcore, *flags, *extra)]
        to_hf = [*TWO_CORES, *mbx("convert", "mcore-to-hf", mcore, back, *flags, *extra)]
        once(to_mcore, mcore)
        found: dict[str, list[Sample]] = {"cp": [], "import": [], "export": []}
        for _ in bench.rounds(5 if workers is None else 2):
            found["cp"].append(once(cp, copy))
            remove(copy)
            found["import"].append(once(to_mcore, mcore))
            found["export"].append(once(to_hf, back))
            remove(back)
        for step, samples in found.items():
            bench.note(f"two-cores {workers or 'default'} {step}", samples, bytes=bytes_in(source), workers=workers)
    remove(source, mcore)


def casts(bench: Bench) -> None:
    """Imports that change values, beside `cp -r` of what they write."""
    for size, dtype, count in (("fp8", None, 2), ("mxfp4", None, 2), ("4gb", "fp32", 2), ("4gb", "fp16", 2)):
        if bench.late:
            return
        # Noise has values beyond fp16's range, which a conversion refuses; zeros take as long.
        source, work = bench.source(size, sparse=dtype == "fp16"), bench.folder
        kept, made, copy = work / "kept", work / "made", work / "copy"
        options = ("--no-sync", *(("--dtype", dtype) if dtype else ()))
        measure(mbx("convert", "hf-to-mcore", source, kept, *options))
        found: dict[str, list[Sample]] = {"cp": [], "import": []}
        for _ in bench.rounds(count):
            found["cp"].append(once(["cp", "-r", str(kept), str(copy)], copy))
            remove(copy)
            found["import"].append(once(mbx("convert", "hf-to-mcore", source, made, *options), made))
            remove(made)
        for step, samples in found.items():
            bench.note(f"casts {size} {dtype} {step}", samples, bytes=bytes_in(kept), read_bytes=bytes_in(source))
        remove(source, kept)


def same(bench: Bench) -> None:
    """Exports of quantised models, plain and by `--codec same`, beside `cp -r` of what they write."""
    for size in ("fp8", "mxfp4"):
        if bench.late:
            return
        # Noise read as FP8 holds NaN, which no codec stores again.
        source, mcore = bench.source(size, sparse=size == "fp8"), bench.folder / "mcore"
        measure(mbx("convert", "hf-to-mcore", source, mcore, "--no-sync"))
        for codec in ("plain", "same"):
            made, copy = bench.folder / "made", bench.folder / "copy"
            command = mbx("convert", "mcore-to-hf", mcore, made, "--no-sync", "--codec", codec)
            found: dict[str, list[Sample]] = {"cp": [], "export": []}
            for _ in bench.rounds(2):
                found["export"].append(once(command, made))
                found["cp"].append(once(["cp", "-r", str(made), str(copy)], copy))
                remove(copy)
            for step, samples in found.items():
                bench.note(f"same {size} {codec} {step}", samples, bytes=bytes_in(made), read_bytes=bytes_in(mcore))
            remove(made)
        remove(source, mcore)


def curve(bench: Bench) -> None:
    """GB/s by size: flushed to the disk, as mbx does by default, and not."""
    for size, count in (("1gb", 3), ("4gb", 2), ("8b", 1), ("40gb", 1)):
        if bench.late:
            return
        sparse = size == "40gb"
        source, work = bench.source(size, sparse=sparse), bench.folder
        copy, mcore, back = work / "copy", work / "mcore", work / "back"
        cp = f'cp -r --sparse=never "{source}" "{copy}"'
        steps = [
            ("cp + sync", copy, ["sh", "-c", f'{cp} && sync -f "{copy}"']),
            ("import + sync", mcore, mbx("convert", "hf-to-mcore", source, mcore)),
            ("export + sync", back, mbx("convert", "mcore-to-hf", mcore, back)),
        ]
        if not sparse:
            steps = [
                ("cp", copy, ["sh", "-c", cp]),
                ("import", mcore, mbx("convert", "hf-to-mcore", source, mcore, "--no-sync")),
                ("export", back, mbx("convert", "mcore-to-hf", mcore, back, "--no-sync")),
                *steps,
            ]
        found: dict[str, list[Sample]] = {name: [] for name, _, _ in steps}
        for _ in bench.rounds(count):
            for name, target, command in steps:
                found[name].append(once(command, target))
                if target != mcore:  # the export reads that one
                    remove(target)
                elif sparse:
                    for file in mcore.rglob("*.distcp"):
                        subprocess.run(["fallocate", "-d", file], check=True)
        for step, samples in found.items():
            bench.note(f"curve {size} {step}", samples, bytes=bytes_in(source), sparse=sparse)
        remove(source, mcore)


def verify(bench: Bench) -> None:
    """Both checks beside `cat` of the files that they read."""
    source, mcore = bench.source("8b"), bench.folder / "mcore"
    once(mbx("convert", "hf-to-mcore", source, mcore), mcore)
    both = f'find "{source}" "{mcore}" -type f -exec cat {{}} + >/dev/null'
    steps = {
        "cat": (["sh", "-c", f'find "{mcore}" -type f -exec cat {{}} + >/dev/null'], bytes_in(mcore)),
        "integrity": (mbx("verify", "integrity", mcore), bytes_in(mcore)),
        "cat of both": (["sh", "-c", both], bytes_in(mcore) + bytes_in(source)),
        "parity": (mbx("verify", "parity", source, mcore), bytes_in(mcore) + bytes_in(source)),
    }
    for state in ("warm", "cold"):
        found: dict[str, list[Sample]] = {name: [] for name in steps}
        for _ in bench.rounds(2):
            for name, (command, _) in steps.items():
                if state == "cold":
                    drop(source)
                    drop(mcore)
                found[name].append(measure(command))
        for name, samples in found.items():
            bench.note(f"verify {state} {name}", samples, bytes=steps[name][1])
    remove(source, mcore)


def stages(bench: Bench) -> None:
    """Where the time goes."""
    for size, cores, options in (
        ("1b", 2, ()),
        ("8b", None, ()),
        ("mxfp4", None, ()),
        ("4gb", None, ("--dtype", "fp32")),
    ):
        if bench.late:
            return
        source, work = bench.source(size), bench.folder
        mcore, back, out = work / "mcore", work / "back", work / "stages.json"
        prefix = TWO_CORES if cores == 2 else ()
        steps = {"import": ("hf-to-mcore", source, mcore, *options)}
        if not options and size != "mxfp4":
            steps["export"] = ("mcore-to-hf", mcore, back)
        for _ in range(2):  # the first warms up
            remove(mcore, back)
            os.sync()
            for step, arguments in steps.items():
                words = map(str, ("convert", *arguments, "--no-sync", "-qq"))
                command = [*prefix, sys.executable, "-m", "benchmarks.stages", str(out), *words]
                subprocess.run(command, check=True, cwd=ROOT, env=compiled())
                found = json.loads(out.read_text())
                key = " ".join(("stages", size, *options, step, *(["two cores"] if cores else [])))
                bench.results[key] = found
                bench.save()
        print(key, json.dumps(found), flush=True)
        remove(source, mcore, back)


PARTS: dict[str, Callable[[Bench], None]] = {
    "two-cores": two_cores,
    "casts": casts,
    "same": same,
    "curve": curve,
    "limits": limits,
    "cgroup": cgroup,
    "verify": verify,
    "stages": stages,
}


def main() -> None:
    """Parse the command line and run the parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="+", choices=list(PARTS))
    parser.add_argument("--dir", type=Path, help="where to work; the whole needs 60 GB")
    parser.add_argument("--json", type=Path, required=True, help="file for the results")
    parser.add_argument("--minutes", type=float, default=60, help="start nothing after so long")
    parser.add_argument("--quick", action="store_true", help="tiny checkpoints, one round: does it run?")
    chosen = parser.parse_args()
    results: Result = {}
    document = {"host": platform.platform(), "cores": os.cpu_count(), "results": results}
    deadline = time.monotonic() + 60 * chosen.minutes

    def save() -> None:
        chosen.json.write_text(json.dumps(document, indent=1))

    with tempfile.TemporaryDirectory(dir=chosen.dir, prefix="mbx-bench-") as folder:
        for name in chosen.part:
            if time.monotonic() > deadline:
                print(f"{name}: no time left", flush=True)
                continue
            bench = Bench(Path(folder), results, save, deadline, chosen.quick)
            started = time.monotonic()
            try:
                PARTS[name](bench)
            except Exception:
                results[f"{name} failed"] = traceback.format_exc()
                print(traceback.format_exc(), flush=True)
                save()
            for left in Path(folder).iterdir():
                remove(left)
            print(f"-- {name}: {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
