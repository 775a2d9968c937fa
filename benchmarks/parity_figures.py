"""Writes the measured block of docs/parity.md: `python -m benchmarks.parity_figures docs/parity.md`.

Source: fixtures/measured/parity.json, which `tests/gpu/run_parity.py --record-from` writes.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from benchmarks.figures import MEASURED, table

_BLOCK = re.compile(r"(?P<begin><!-- begin: parity [^\n]*-->)\n.*?(?P<end><!-- end: parity -->)", re.S)


def precision(rows: list[dict[str, Any]]) -> list[str]:
    """Logits of Megatron Core in low precision against Transformers in fp32."""
    body = []
    for row in rows:
        what = (row["model"], row["device"], row["tp"], row["precision"])
        if row.get("max_abs") is None:
            body.append((*what, "not run", row.get("reason", "not finite")[:80].replace("|", "/"), "", ""))
            continue
        kl, top1 = f"{row['mean_kl_nats']:.1e}", f"{row['top1_agreement']:.1%}"
        body.append((*what, f"{row['max_abs']:.1e}", kl, top1, f"{row['relative_final_norm']:.1e}"))
    heads = (
        "model",
        "device",
        "TP",
        "precision",
        "max abs Δ logit",
        "mean KL, nats",
        "top-1",
        "relative Δ, final norm",
    )
    return table(heads, body)


def streamed(rows: list[dict[str, Any]]) -> list[str]:
    """Whole models a layer at a time: time and memory of the process."""
    body = []
    for row in rows:
        passed = {0: "passed", None: row.get("reason", "not run")[:80]}.get(row.get("exit_code"), "failed")
        figures = next((line for line in row.get("printed", []) if "max |Δlogit|" in line), "")
        found = re.search(r"max \|Δlogit\| (\S+)", figures)
        limit, gpu, peak = row.get("limit_mib"), row.get("peak_gpu_mib"), row.get("peak_anonymous_mib")
        body.append(
            (
                row["model"],
                row["device"],
                passed,
                found[1] if found else "–",
                f"{row['seconds']:.0f} s" if "seconds" in row else "–",
                f"{peak:,} MiB" if peak is not None else "–",
                f"{limit:,} MiB" if limit else "none",
                f"{gpu:,} MiB" if gpu is not None else "–",
            )
        )
    heads = ("model", "device", "result", "max abs Δ logit", "wall", "peak anonymous", "hard limit", "peak GPU")
    return table(heads, body)


def block() -> list[str]:
    """Everything between the marks."""
    path = MEASURED / "parity.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    lines = ["", "Whole processes, all legs, the layers of both models read from disk:", ""]
    lines += streamed(found["streamed"])
    lines += ["Megatron Core against Transformers in fp32, every position and the whole vocabulary:", ""]
    lines += precision(found["precision"])
    used = {(row["device"], row["date"], tuple(row["versions"].items())) for kind in found for row in found[kind]}
    for device, date, versions in sorted(used):
        lines.append(f"- {device}, {date}: {', '.join(f'{name} {number}' for name, number in versions)}")
    return [*lines, ""]


def main(pages: list[str]) -> None:
    """Write the block of each page again."""
    lines = "\n".join(block())
    for page in map(Path, pages):
        text = page.read_text(encoding="utf-8")
        page.write_text(_BLOCK.sub(lambda found: f"{found['begin']}\n{lines}{found['end']}", text), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
