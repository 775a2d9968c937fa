"""Writes docs/performance.md from the measured figures, so that no figure is typed by hand.

    python -m benchmarks.figures docs/performance.md

Sources: fixtures/measured/convert.json (samples of `python -m benchmarks.convert --json`, by host) and
fixtures/measured/train.jsonl (the lines of `python benchmarks/train_gpu.py --out`).
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

MEASURED = Path(__file__).resolve().parents[1] / "fixtures" / "measured"
Row = dict[str, Any]


def table(headings: Iterable[str], rows: Iterable[Iterable[object]]) -> list[str]:
    """A Markdown table."""
    head = list(headings)
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    return lines + [f"| {' | '.join(map(str, row))} |" for row in rows] + [""]


def conversions(hosts: dict[str, Row]) -> list[str]:
    """Wall time of whole processes against `cp -r` of the same bytes, medians of rounds."""
    lines = [
        "## Conversions",
        "",
        "Whole processes, start-up included, page cache warm, medians. `+ sync` waits until all is on the disk,",
        "as mbx does by default (`--no-sync` does not); it is compared with `cp -r` followed by `sync -f`.",
        "",
    ]
    for host in hosts.values():
        for size, samples in host["sizes"].items():
            rows = []
            for step, found in samples.items():
                if step == "bytes":
                    continue
                seconds = [sample["seconds"] for sample in found]
                flushed = samples["cp -r + sync"] if step.endswith("+ sync") else samples["cp -r"]
                base = [sample["seconds"] for sample in flushed]
                ratio = statistics.median(s / b for s, b in zip(seconds, base, strict=True))
                peak = max(sample["peak_mib"] for sample in found)
                rows.append((step, f"{statistics.median(seconds):.2f} s", f"{ratio:.2f}", f"{peak:.0f} MiB"))
            count = len(samples["cp -r"])
            lines += [
                f"{host['host']}, {host['cores']} cores, Llama {size} shape, "
                f"{samples['bytes'] / 1e9:.2f} GB, {count} rounds:",
                "",
            ]
            lines += table(("step", "wall", "× its `cp -r`", "peak anonymous memory"), rows)
        for name, found in host.get("planning", {}).items():
            lines.append(f"- {name}: {found['seconds']:.1f} s, {found['peak_mib']:.0f} MiB, whole process")
        lines.append("")
    return lines


def throughput(rows: list[Row]) -> list[str]:
    """mbx beside a bare Megatron Core loop."""
    mine = [row for row in rows if row["part"] == "throughput" and row["side"] == "mbx"]
    bare = {(r["model"], r["fp8"]): r for r in rows if r["part"] == "throughput" and r["side"] == "bare"}
    body = []
    for row in mine:
        other = bare.get((row["model"], row["fp8"]))
        ratio = f"{row['tokens_per_s'] / other['tokens_per_s']:.3f}" if other else "–"
        body.append((row["model"], row["fp8"], f"{row['tokens_per_s']:,.0f}", f"{row['peak_gib']:.1f} GiB", ratio))
    return ["### Throughput", "", *table(("recipe", "FP8", "tokens/s", "peak", "× bare loop"), body)]


def adapters(rows: list[Row]) -> list[str]:
    """LoRA on the 8B shape, rank 64 on all linears, beside PEFT on Transformers in the same run."""
    peft = {(r["micro"], r["length"], r["recompute"]): r for r in rows if r["part"] == "lora" and r["side"] == "peft"}
    body = []
    for row in (r for r in rows if r["part"] == "lora" and r["side"] == "mbx"):
        other = peft[row["micro"], row["length"], row["recompute"]]
        body.append(
            (
                f"{row['micro']} × {row['length']}",
                "full" if row["recompute"] else "none",
                row["tp"],
                f"{row['peak_gib']:.1f} / {other['peak_gib']:.1f} GiB",
                f"{row['tokens_per_s']:,.0f} / {other['tokens_per_s']:,.0f}",
                f"{row['tokens_per_s'] / other['tokens_per_s']:.2f}",
            )
        )
    head = ("micro × length", "recompute", "TP", "peak, mbx / PEFT on one GPU", "tokens/s, mbx / PEFT", "ratio")
    return ["### LoRA, 8B shape, rank 64 on all linears", "", *table(head, body)]


def budget(rows: list[Row]) -> list[str]:
    """Predicted beside measured peak memory."""
    body = []
    for row in (r for r in rows if r["part"] == "budget"):
        error = row["predicted_gib"] / row["peak_gib"] - 1
        what = (row["method"], row["tp"], row["fp8"], row["recompute"], row["length"])
        body.append((*what, f"{row['predicted_gib']:.2f}", f"{row['peak_gib']:.2f}", f"{error:+.1%}"))
    head = ("method", "TP", "FP8", "recompute", "tokens", "predicted GiB", "measured GiB", "error")
    return ["### Budget, Llama 1B shape", "", *table(head, body)]


def losses(rows: list[Row]) -> list[str]:
    """Losses that show updates under FP8, and of the bare defaults."""
    body = [
        (f"updates, FP8 {r['fp8']}", ", ".join(f"{v:.4f}" for v in r["losses"]))
        for r in rows
        if r["part"] == "updates"
    ]
    body += [
        (f"vanilla_gpt, TP {r['tp']}, dropout {r['dropout']}", ", ".join(f"{v:.4f}" for v in r["losses"]))
        for r in rows
        if r["part"] == "vanilla"
    ]
    return ["### Losses", "", *table(("run", "losses"), body)]


def page() -> str:
    """The whole page."""
    hosts = json.loads((MEASURED / "convert.json").read_text(encoding="utf-8"))
    rows = [json.loads(line) for line in (MEASURED / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    lines = ["# Performance", "", "<!-- Written by `make docs` from fixtures/measured; edits here are lost. -->", ""]
    lines += conversions(hosts)
    lines += [
        "## Training",
        "",
        "H200, Megatron Core 0.16.1, Transformer Engine 2.11, one run each; see docs/training.md.",
        "",
    ]
    lines += throughput(rows) + adapters(rows) + budget(rows) + losses(rows)
    return "\n".join(lines).rstrip("\n") + "\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")
