"""The engine's part of docs/performance.md, from fixtures/measured/engine.json (`python -m benchmarks.engine`)."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

MEASURED = Path(__file__).resolve().parents[1] / "fixtures" / "measured" / "engine.json"
Row = dict[str, Any]
_STAGES = ("read", "decode", "cast", "checksum", "write", "flush")


def _table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> list[str]:
    columns = list(head)
    lines = [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
    return lines + [f"| {' | '.join(map(str, row))} |" for row in rows] + [""]


def _seconds(row: Row) -> float:
    return float(statistics.median(sample["seconds"] for sample in row["samples"]))


def _peak(row: Row) -> str:
    return f"{max(sample['peak_mib'] for sample in row['samples']):.0f} MiB"


def _speed(row: Row) -> str:
    return f"{row['bytes'] / 1e9 / _seconds(row):.2f}"


def _ratio(row: Row, base: Row) -> str:
    pairs = zip(row["samples"], base["samples"], strict=True)
    return f"{statistics.median(a['seconds'] / b['seconds'] for a, b in pairs):.2f}"


def _beside(results: Row, steps: Iterable[tuple[str, str, str]]) -> list[tuple[object, ...]]:
    """(label, key, key of the baseline) as rows, where both were measured."""
    rows: list[tuple[object, ...]] = []
    for label, key, base in steps:
        if key in results and base in results:
            row = results[key]
            amount = f"{row['bytes'] / 1e9:.2f} GB"
            rows.append((label, amount, f"{_seconds(row):.2f} s", _speed(row), _ratio(row, results[base]), _peak(row)))
    return rows


def _part(title: str, words: str, head: str, rows: list[tuple[object, ...]]) -> list[str]:
    columns = ("what", "bytes", "wall", "GB/s", head, "peak anonymous memory")
    return [f"### {title}", "", words, "", *_table(columns, rows)] if rows else []


def _stages(results: Row) -> list[str]:
    rows = []
    for key, found in results.items():
        if key.startswith("stages "):
            spent = {name: stage["seconds"] for name, stage in found["stages"].items()}
            total = found["engine_s"] * found["workers"]
            rest = total - sum(spent.values())
            shares = [f"{100 * spent[name] / total:.0f}%" if name in spent else "–" for name in _STAGES[:-1]]
            what = key.removeprefix("stages ")
            times = (f"{found['engine_s']:.2f} s", f"{found['user_s']:.2f} + {found['system_s']:.2f} s")
            rows.append((what, found["workers"], *times, *shares, f"{100 * rest / total:.0f}%"))
    if not rows:
        return []
    head = ("what", "workers", "engine", "CPU, user + system", *_STAGES[:-1], "rest")
    words = (
        "Shares of the workers' time. `write` holds the wait for one's turn at a file, `rest` the interpreter, the\n"
        "assembly of rows, the import of torch and waits for memory."
    )
    return ["### What bounds it", "", words, "", *_table(head, rows)]


def _limits(results: Row) -> list[str]:
    rows = []
    for key, found in results.items():
        if key.startswith("limits "):
            what = key.removeprefix("limits ")
            size, limit = f"{found['bytes'] / 1e9:.1f} GB", f"{found['limit_mib']} MiB"
            rows.append((what, size, limit, *_ended(found)))
    words = (
        "Whole processes under RLIMIT_DATA, which bounds every private writable page a process maps, with\n"
        "`--max-memory 256MiB`; 256 MiB more are for the interpreter, NumPy and, where a codec decodes, torch, which\n"
        "alone maps 190. Sources are sparse files of zeros, and blocks of zeros not written: no disk here holds 70B."
    )
    head = ("what", "source", "hard limit", "wall", "peak anonymous memory")
    return ["### Under a hard limit", "", words, "", *_table(head, rows)] if rows else []


def _groups(results: Row) -> list[str]:
    rows = [
        (key.removeprefix("cgroup "), f"{row['bytes'] / 1e9:.1f} GB", f"{row['limit_mib']} MiB", *_ended(row))
        for key, row in results.items()
        if key.startswith("cgroup ")
    ]
    words = (
        "In a memory cgroup, which counts the page cache too: dense files, flushed, `--max-memory 256MiB`, 8 workers."
    )
    head = ("what", "source", "limit", "wall", "peak anonymous memory")
    return [words, "", *_table(head, rows)] if rows else []


def _ended(row: Row) -> tuple[str, str]:
    return ("stopped: out of memory", "–") if "failed" in row else (f"{_seconds(row):.1f} s", _peak(row))


def _calls(results: Row) -> list[str]:
    found = results.get("strace")
    if not found:
        return []
    words = f"System calls of {found['what']} (`strace -c -f`, which slows each):"
    rows = [(call["name"], call["calls"], f"{call['seconds']:.2f} s") for call in found["calls"]]
    return [words, "", *_table(("call", "count", "time in it, all threads"), rows)]


def engine() -> list[str]:
    """All tables, host by host."""
    lines = ["## The engine, part by part", ""]
    for host in json.loads(MEASURED.read_text(encoding="utf-8")).values():
        results: Row = host["results"]
        lines += [
            f"{host['host']}, {host['cores']} cores; `python -m benchmarks.engine`, whole processes, medians.",
            "",
        ]
        two = [
            (
                f"{step}, {'default' if w == 'default' else f'--workers {w}'}",
                f"two-cores {w} {step}",
                f"two-cores {w} cp",
            )
            for w in ("default", "1", "3", "4")
            for step in ("import", "export")
        ]
        bound = "Bound to two processors (`taskset -c 0,1`), as is `cp -r`; page cache warm, `--no-sync`."
        lines += _part("On two cores", bound, "× `cp -r`", _beside(results, two))
        changed = [
            key.removesuffix(" import") for key in results if key.startswith("casts ") and key.endswith(" import")
        ]
        casts = [(key.removeprefix("casts ").replace(" None", ""), f"{key} import", f"{key} cp") for key in changed]
        words = "Imports that decode or cast, `--no-sync`. Bytes are those written; `cp -r` copies the same."
        lines += _part("Changing values", words, "× `cp -r`", _beside(results, casts))
        again = [
            (f"{size}, --codec {codec}", f"same {size} {codec} export", f"same {size} {codec} cp")
            for size in dict.fromkeys(key.split()[1] for key in results if key.startswith("same "))
            for codec in ("plain", "same")
        ]
        words = "Exports of quantised models, `--no-sync`. Bytes are those written; `cp -r` copies the same."
        lines += _part("Encoding again", words, "× `cp -r`", _beside(results, again))
        curve = [
            (f"{size} {step}{sync}", f"curve {size} {step}{sync}", f"curve {size} cp{sync}")
            for sync in ("", " + sync")
            for step in ("import", "export")
            for size in ("1gb", "4gb", "8b", "40gb")
        ]
        words = "`+ sync` waits for the disk, as mbx does by default. The source of 40 GB is a sparse file of zeros."
        lines += _part("From 1 to 40 GB", words, "× `cp -r`", _beside(results, curve))
        checks = [
            (f"{step}, {state} cache", f"verify {state} {step}", f"verify {state} {base}")
            for state in ("warm", "cold")
            for step, base in (("integrity", "cat"), ("parity", "cat of both"))
        ]
        words = "`mbx verify` beside `cat … >/dev/null` of the same files."
        lines += _part("Checking", words, "× `cat`", _beside(results, checks))
        lines += _limits(results) + _groups(results) + _stages(results) + _calls(results)
    return lines
