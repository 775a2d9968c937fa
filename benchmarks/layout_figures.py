"""Writes the measured block `layouts`: `python -m benchmarks.layout_figures docs/training-figures.md`.

Sources: fixtures/measured/train_{parallel,precision,families}.json, which `--record DIR` takes from the files that
`tests/gpu/run_train_{parallel,precision,families}.py` left in DIR; rows measured before stay unless measured anew.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from benchmarks.figures import MEASURED, table
from mappings import table_names
from mbx.tables import shipped

_BLOCK = re.compile(r"(?P<begin><!-- begin: layouts [^\n]*-->)\n.*?(?P<end><!-- end: layouts -->)", re.S)
_VERDICT = {True: "holds", False: "**does not hold**", None: "not run"}
Row = dict[str, Any]


def record(folder: Path) -> None:
    """Keep the figures of a run, without its curves and logs."""
    for name in ("train_parallel", "train_precision"):
        if (source := folder / f"{name}.json").is_file():
            rows = json.loads(source.read_text(encoding="utf-8"))["rows"]
            kept = {(row["run"], row.get("against")): row for row in load(name) or []}
            kept |= {(row["run"], row.get("against")): row for row in rows}
            _write(name, list(kept.values()))
    if (source := folder / "train_families.json").is_file():
        found = json.loads(source.read_text(encoding="utf-8"))
        _write("train_families", {**(load("train_families") or {}), **{n: _compact(f) for n, f in found.items()}})


def _compact(found: Row) -> Row:
    figures = {}
    for key in ("against_transformers_on_cpu", "against_transformers_on_cuda", "control"):
        if key in found:
            figures[key] = found[key]["max_abs"]
    kept = ("status", "reason", "first_loss", "last_loss", "trained_in", "notes")
    return {**{key: found[key] for key in kept if key in found}, **figures}


def load(name: str) -> Any:
    """Recorded figures; None where there are none."""
    path = MEASURED / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _write(name: str, value: object) -> None:
    (MEASURED / f"{name}.json").write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def layouts(rows: list[Row]) -> list[str]:
    """Loss curves of layouts beside the run they must equal, then what must differ."""
    body = []
    for row in rows:
        if "max_abs" not in row:
            body.append((row["run"], row["against"], "–", "–", _VERDICT[row["ok"]]))
            continue
        limit = f"{'more' if row['apart'] else 'at most'} {'than ' if row['apart'] else ''}{row['limit']:.1e}"
        body.append((row["run"], row["against"], f"{row['max_abs']:.1e}", limit, _VERDICT[row["ok"]]))
    return table(("run", "against", "largest difference of two losses", "must be", ""), body)


def precisions(rows: list[Row]) -> list[str]:
    """First and last loss of the small model under each precision."""
    body = []
    for row in rows:
        if "first" in row:
            losses = f"{row['first']:.3f} → {row['last']:.3f}"
        else:
            losses = "refused by name" if "refused" in row else "–"
        body.append((row["run"], losses, _VERDICT[bool(row["ok"])]))
    return table(("precision", "loss over 40 steps", ""), body)


def families(found: dict[str, Row]) -> list[str]:
    """Each family trained, exported and compared."""
    passed = [name for name, row in found.items() if row["status"] == "passed"]
    worst = max((found[name]["against_transformers_on_cuda"] for name in passed), default=0.0)
    lines = [
        f"{len(passed)} of {len(found)} families' tiny checkpoints trained ten steps, and their exports have Megatron "
        f"Core's logits in Transformers on the same GPU (largest difference {worst:.1e}): {', '.join(passed)}.",
        "",
    ]
    refused = {name: shipped(name).unsupported for name in found if name in table_names()}
    rest = [
        (name, "refused" if refused.get(name) else row["status"], (refused.get(name) or row.get("reason", ""))[:140])
        for name, row in found.items()
    ]
    rest = [(name, status, why.replace("|", "/")) for name, status, why in rest]
    if others := [row for row in rest if row[1] != "passed"]:
        lines += table(("family", "", "why"), others)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("page", type=Path, nargs="?", help="docs/training-figures.md")
    parser.add_argument("--record", type=Path, metavar="DIR", help="take these figures first")
    arguments = parser.parse_args()
    if arguments.record:
        record(arguments.record)
    if arguments.page is None:
        return
    lines = []
    for name, section in (("train_parallel", layouts), ("train_precision", precisions), ("train_families", families)):
        if (found := load(name)) is not None:
            lines += section(found)
    block = "\n".join(lines or ["Not measured yet.", ""])
    text = arguments.page.read_text(encoding="utf-8")
    if not _BLOCK.search(text):
        raise SystemExit(f"{arguments.page} has no block `layouts`")
    text = _BLOCK.sub(lambda match: f"{match['begin']}\n{block}{match['end']}", text)
    arguments.page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
