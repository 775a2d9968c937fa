"""Conversions under a hard limit of the kernel on memory, where one page too many ends the process.

`limits` sets RLIMIT_DATA, which bounds every private writable page that a process maps. Sources are sparse, and blocks
of zeros are not written, so that models beyond the disk fit. `cgroup` puts the process into a memory cgroup of its
own, which counts the page cache as well, and writes everything. The peak is that of anonymous memory.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarks.bench import Bench, bytes_in, remove
from benchmarks.checkpoints import make
from benchmarks.conversion import mbx, measure
from mbx.run.commit import partial_path

MIB = 1 << 20
MAX_MEMORY_MIB = 256
#: What a process may map beside --max-memory: the interpreter, NumPy, torch where values are decoded, stacks.
ALLOWANCE_MIB = 256
#: Sizes, options and numbers of workers; an export follows where there are no options and `back` is set.
CASES: tuple[tuple[str, tuple[str, ...], tuple[int, ...], bool], ...] = (
    ("1b", (), (2, 8, 16), True),
    ("4gb", ("--dtype", "fp32"), (2, 8, 16), False),
    ("fp8", (), (2, 8, 16), False),
    ("mxfp4", (), (2, 8, 16), False),
    ("8b", (), (2, 8, 16), True),
    ("8b", ("--dtype", "fp32"), (8,), False),
    ("70b", (), (16,), True),
    ("70b", (), (2, 8), False),
)
CGROUP_CASES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("4gb", ()),
    ("1gb", ("--dtype", "fp32")),
    ("mxfp4", ()),
)


def limits(bench: Bench) -> None:
    """Conversions under RLIMIT_DATA."""
    before = ""
    for size, options, numbers, back in CASES:
        source, mcore, made = (bench.folder / name for name in ("source", "mcore", "made"))
        leftovers = (mcore, made, partial_path(mcore), partial_path(made))
        if size != before:
            remove(source)
            make(source, bench.sized(size), sparse=True)
            before = size
        for workers in numbers:
            if bench.late:
                return
            remove(*leftovers)
            flags = ("--no-sync", "--max-memory", f"{MAX_MEMORY_MIB}MiB", "--workers", workers)
            _limited(
                bench, f"{size} import", source, ("hf-to-mcore", source, mcore, *flags, *options), workers, options
            )
            if back and mcore.exists() and not bench.late:
                _limited(bench, f"{size} export", source, ("mcore-to-hf", mcore, made, *flags), workers, options)
        remove(*leftovers)
    remove(bench.folder / "source")


def _limited(
    bench: Bench, what: str, source: Path, arguments: Sequence[object], workers: int, options: Sequence[str]
) -> None:
    limit = MAX_MEMORY_MIB + ALLOWANCE_MIB
    key = " ".join(("limits", what, *options, f"--workers {workers}"))
    command = [sys.executable, "-m", "benchmarks.limited", str(limit), "skip-zeros", "convert", *map(str, arguments)]
    _note(bench, key, [*command, "-qq"], limit, bytes_in(source))


def _note(bench: Bench, key: str, command: Sequence[str], limit: int, nbytes: int) -> None:
    """Run one case and keep what became of it."""
    try:
        sample = measure(command)
    except RuntimeError as error:
        bench.results[key] = {"failed": str(error)[-2000:], "limit_mib": limit, "bytes": nbytes}
        bench.save()
        print(f"{key:<44} FAILED {str(error)[-300:]}", flush=True)
        return
    bench.note(key, [sample], bytes=nbytes, limit_mib=limit)


def cgroup(bench: Bench) -> None:
    """Conversions of dense checkpoints in a memory cgroup, whose limit counts cached pages too."""
    limit = MAX_MEMORY_MIB + ALLOWANCE_MIB
    with _memory_group(limit) as group:
        for size, options in CGROUP_CASES:
            if bench.late:
                return
            source = bench.source(size)
            mcore, made = bench.folder / "mcore", bench.folder / "made"
            flags = ("--max-memory", f"{MAX_MEMORY_MIB}MiB", "--workers", 8)
            steps = {"import": mbx("convert", "hf-to-mcore", source, mcore, *flags, *options)}
            if not options and size != "mxfp4":
                steps["export"] = mbx("convert", "mcore-to-hf", mcore, made, *flags)
            for step, command in steps.items():
                inside = f"echo $$ > {group}/cgroup.procs && exec {shlex.join(command)}"
                key = " ".join(("cgroup", size, step, *options))
                _note(bench, key, ["sh", "-c", inside], limit, bytes_in(source))
            remove(source, mcore, made, partial_path(mcore), partial_path(made))


@contextmanager
def _memory_group(limit_mib: int) -> Iterator[Path]:
    """A memory cgroup of this limit, of version 2 or 1, removed behind."""
    root = Path("/sys/fs/cgroup")
    second = (root / "cgroup.controllers").is_file()
    group = (root if second else root / "memory") / "mbx-bench"
    group.mkdir()
    try:
        (group / ("memory.max" if second else "memory.limit_in_bytes")).write_text(str(limit_mib * MIB))
        yield group
    finally:
        group.rmdir()
