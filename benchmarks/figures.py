"""Writes docs/performance.md, and marked blocks of other pages, so that no figure is typed by hand.

    python -m benchmarks.figures docs/performance.md docs/training-figures.md

Sources, in fixtures/measured: speed.json (`python -m benchmarks.speed --json`), convert.json (samples of
`python -m benchmarks.conversion --json`, by host), engine.json and train.jsonl (the lines of
`python benchmarks/train_gpu.py --out` and of `python -m benchmarks.megatron_lm --out`).
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks.engine_figures import engine
from benchmarks.recipe_runs import with_layers
from benchmarks.speed_figures import speed

MEASURED = Path(__file__).resolve().parents[1] / "fixtures" / "measured"
#: Of runs that do not say another.
MEASURED_CORE = "0.16.1"
Row = dict[str, Any]
_BLOCK = re.compile(
    r"(?P<begin><!-- begin: (?P<name>budget|recipes|replayed|megatron_lm) [^\n]*-->)\n.*?"
    r"(?P<end><!-- end: (?P=name) -->)",
    re.S,
)


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


def medians(rows: list[Row], labels: Iterable[str]) -> dict[tuple[object, ...], Row]:
    """One row for each combination of labels: median speed over the rounds, largest peak."""
    groups: dict[tuple[object, ...], list[Row]] = {}
    names = tuple(labels)
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return {
        key: found[0]
        | {
            "tokens_per_s": statistics.median(row["tokens_per_s"] for row in found),
            "peak_gib": max(row["peak_gib"] for row in found),
            "rounds": len(found),
        }
        for key, found in groups.items()
    }


def of(rows: list[Row], part: str, side: str | None = None) -> list[Row]:
    """Records of one part, and of one side where it has two."""
    return [row for row in rows if row["part"] == part and (side is None or row["side"] == side)]


def throughput(rows: list[Row]) -> list[str]:
    """mbx beside a bare Megatron Core loop."""
    mine = medians(of(rows, "throughput", "mbx"), ("model", "fp8"))
    bare = medians(of(rows, "throughput", "bare"), ("model", "fp8"))
    body = []
    for (model, fp8), row in mine.items():
        other = bare.get((model, fp8))
        ratio = f"{row['tokens_per_s'] / other['tokens_per_s']:.3f}" if other else "–"
        error = f"{row['predicted_gib'] / row['peak_gib'] - 1:+.1%}"
        body.append((model, fp8, f"{row['tokens_per_s']:,.0f}", ratio, f"{row['peak_gib']:.1f} GiB", error))
    head = ("recipe", "FP8", "tokens/s", "× bare loop", "peak", "budget's error")
    return ["### Throughput", "", *table(head, body)]


def adapters(rows: list[Row]) -> list[str]:
    """LoRA on the 8B shape, rank 64 on all linears, beside PEFT on Transformers in the same session."""
    peft = medians(of(rows, "lora", "peft"), ("micro", "length", "recompute"))
    body = []
    for (micro, length, full, tp), row in medians(
        of(rows, "lora", "mbx"), ("micro", "length", "recompute", "tp")
    ).items():
        other = peft.get((micro, length, full))
        beside, speed, ratio = "–", "–", "–"
        if other:
            beside, speed = f"{other['peak_gib']:.1f}", f"{other['tokens_per_s']:,.0f}"
            ratio = f"{row['tokens_per_s'] / other['tokens_per_s']:.2f}"
        peak, own = f"{row['peak_gib']:.1f} / {beside} GiB", f"{row['tokens_per_s']:,.0f} / {speed}"
        body.append((f"{micro} × {length}", "full" if full else "none", tp, peak, own, ratio))
    head = ("micro × length", "recompute", "TP", "peak, mbx / PEFT on one GPU", "tokens/s, mbx / PEFT", "ratio")
    return ["### LoRA, 8B shape, rank 64 on all linears", "", *table(head, body)]


def budget(rows: list[Row]) -> list[str]:
    """Predicted beside measured peak memory."""
    body, errors = [], []
    for row in of(rows, "budget"):
        error = row["predicted_gib"] / row["peak_gib"] - 1
        errors.append(abs(error))
        what = (row["model"], row["method"], row["tp"], row["fp8"], row["recompute"], row["length"], row["other"])
        body.append((*what, f"{row['predicted_gib']:.2f}", f"{row['peak_gib']:.2f}", f"{error:+.2%}"))
    head = ("shape", "method", "TP", "FP8", "recompute", "length", "also", "predicted GiB", "measured GiB", "error")
    summary = f"{len(errors)} runs, the largest error is {max(errors):.1%}." if errors else "Not measured."
    return ["### Budget", "", summary, "", *table(head, body)]


def losses(rows: list[Row]) -> list[str]:
    """Losses that show updates under FP8."""
    body = [(f"FP8 {r['fp8']}", ", ".join(f"{v:.3f}" for v in r["losses"][::3])) for r in of(rows, "updates")]
    return ["### Updates under FP8, every third loss of 30 steps", "", *table(("run", "losses"), body)]


def megatron_lm(rows: list[Row]) -> list[str]:
    """Losses of `vanilla_gpt` beside those of Megatron-LM's `pretrain_gpt.py`."""
    body = []
    for row in of(rows, "megatron_lm"):
        steps = row["difference"] / row["bf16_spacing"]
        ends = f"{row['ours'][0]:.6f} … {row['ours'][-1]:.6f}"
        others = f"{row['theirs'][0]:.6f} … {row['theirs'][-1]:.6f}"
        body.append((row["setting"], row["dropout"], ends, others, f"{row['difference']:.1e}", f"{steps:.4f}"))
    head = ("setting", "dropout", "mbx, steps 1 … 10", "Megatron-LM", "largest difference", "in bf16 steps")
    return ["### Equal to Megatron-LM", "", *table(head, body)]


def training(rows: list[Row]) -> list[str]:
    """Every table of the trainer's figures that `rows` have."""
    return megatron_lm(rows) + throughput(rows) + adapters(rows) + budget(rows) + losses(rows)


def recipe_runs() -> list[Row]:
    """Runs of recipes of every kind: recipe, overrides, GPUs, measured peak, layers where a model was cut, kernels of
    other packages that were installed, and the release of Megatron Core where it was another."""
    return [json.loads(line) for line in (MEASURED / "recipes.jsonl").read_text(encoding="utf-8").splitlines()]


def predicted_gib(run: Row) -> float:
    """What today's budget says of one of `recipe_runs`, whichever Megatron Core is installed here."""
    from mbx import installed
    from mbx.train.budget.predict import GIB, predict
    from mbx.train.model import kernels
    from mbx.train.model.blueprint import blueprint
    from mbx.train.recipe.catalogue import load_recipe
    from mbx.train.recipe.world import check_world

    recipe = load_recipe(str(run["recipe"]), ["train.eval_every=0", "optim.warmup_steps=0", *run["overrides"]])
    if "layers" in run:
        recipe = with_layers(recipe, run["layers"])
    there = patch.object(kernels, "find_spec", lambda name: name in run.get("kernels", ()) or None)
    with there, patch.object(installed, "core_version", lambda: run.get("megatron_core", MEASURED_CORE)):
        return predict(recipe, blueprint(recipe), check_world(recipe, int(run["gpus"]))).total / GIB


def recipes(rows: list[Row]) -> list[str]:
    """The budget beside runs of every kind of recipe."""
    lines = []
    for run in recipe_runs():
        predicted = predicted_gib(run)
        error = predicted / run["peak_gib"] - 1
        changes = " ".join([*run["overrides"], *([f"({run['layers']} layers)"] if "layers" in run else [])])
        lines.append([run["recipe"], changes, run["gpus"], f"{predicted:.2f}", run["peak_gib"], f"{error:+.1%}"])
    return table(("recipe", "overrides", "GPUs", "predicted", "measured", "error"), lines)


def replayed(rows: list[Row]) -> list[str]:
    """Runs replayed from a CUDA graph, the same launched kernel by kernel, and Transformers with PEFT."""
    lines = []
    for text in (MEASURED / "graphs.jsonl").read_text(encoding="utf-8").splitlines():
        run = json.loads(text)
        launched, peft, predicted = run["launched_tokens_per_s"], run["peft"] or {}, predicted_gib(run)
        ours, theirs = run["tokens_per_s"], peft.get("tokens_per_s")
        other = f"{theirs:,} ({peft['peak_gib']:.1f} GiB)" if theirs else "out of memory" if peft else ""
        changes = " ".join(word for word in run["overrides"] if word != "train.global_batch=1")
        cells = [run["recipe"], changes, run["gpus"], f"{launched:,}" if launched else "", f"{ours:,}"]
        memory = f"{run['peak_gib']:.2f} ({predicted / run['peak_gib'] - 1:+.1%})"
        lines.append([*cells, memory, other, f"{ours / theirs:.2f}" if theirs else ""])
    head = ("recipe", "overrides", "GPUs", "launched", "replayed", "GiB (budget)", "Transformers, PEFT", "ratio")
    return table(head, lines)


def records() -> list[Row]:
    """The trainer's measured records."""
    return [json.loads(line) for line in (MEASURED / "train.jsonl").read_text(encoding="utf-8").splitlines()]


def page(rows: list[Row]) -> str:
    """The whole page."""
    hosts = json.loads((MEASURED / "convert.json").read_text(encoding="utf-8"))
    lines = ["# Performance", "", "<!-- Written by `make docs` from fixtures/measured; edits here are lost. -->", ""]
    lines += speed() + conversions(hosts) + engine()
    lines += [
        "## Training",
        "",
        "H200, Megatron Core 0.16.1, Transformer Engine 2.11; compared in turns, medians; see training-figures.md.",
        "",
    ]
    lines += training(rows)
    return "\n".join(lines).rstrip("\n") + "\n"


def insert(text: str, rows: list[Row]) -> str:
    """A hand-written page with its marked blocks written again, each from the function it names; others stay."""
    blocks = {"budget": budget, "recipes": recipes, "replayed": replayed, "megatron_lm": megatron_lm}

    def block(found: re.Match[str]) -> str:
        lines = [line for line in blocks[found["name"]](rows) if not line.startswith("#")]
        return f"{found['begin']}\n" + "\n".join(lines).strip("\n") + f"\n{found['end']}"

    return _BLOCK.sub(block, text)


def main(paths: Iterable[str]) -> None:
    """Write the page of figures, or the blocks of a page that has some."""
    rows = records()
    for path in map(Path, paths):
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        path.write_text(insert(text, rows) if _BLOCK.search(text) else page(rows), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
