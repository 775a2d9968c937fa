"""The same training under every parallel layout: `python tests/gpu/run_train_parallel.py --gpus 2 --out DIR`.

Losses of each layout are compared with one GPU's over all steps, in fp32 (no TF32), or in bf16 where a kernel takes
nothing else; so are packed rows with the same samples unpacked, and a run that was stopped and resumed with one that
was not. Negative controls must differ: a learning rate 2 % higher, and packed examples that see each other. DIR gets
`train_parallel.json`.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE)]

from _worlds import Job, Raw, run_jobs  # noqa: E402

STEPS = 20
#: Largest difference of two losses in fp32, as the CPU tests have it.
TOLERANCE = 1e-4
#: In bf16: this times the distance of the same run in bf16 from itself in fp32.
NOISE = 2.0
#: Losses of packed and unpacked rows in bf16.
PACKING = 5e-3
PAD = {"vocab_divisor": 64}
LORA = {"rank": 4, "alpha": 8.0}
EXPERTS = {"ep": 2}


@dataclass(frozen=True, slots=True)
class Case:
    """A layout: the world it needs, the sections it changes, and the run of one GPU that it must agree with."""

    world: int
    sections: dict[str, dict[str, object]]
    like: str = "one"


#: Runs of one GPU. `length` 64 gives context parallelism two chunks of 16 a rank.
ALONE: dict[str, dict[str, dict[str, object]]] = {
    "one": {},
    "one moe": {"model": {"path": "qwen3_moe"}},
    "one mla": {"model": {"path": "deepseek_v2_lite"}},
    "one lora": {"lora": LORA},
    "one bf16": {"train": {"precision": "bf16"}},
    "one moe bf16": {"model": {"path": "qwen3_moe"}, "train": {"precision": "bf16"}},
    "control": {"optim": {"lr": 3.06e-3}},
    "control bf16": {"optim": {"lr": 3.6e-3}, "train": {"precision": "bf16"}},
}
_MOE: dict[str, object] = {"path": "qwen3_moe"}
_BF16: dict[str, object] = {"precision": "bf16"}
CASES: dict[str, Case] = {
    "tp 2": Case(2, {"parallel": {"tp": 2, "sequence_parallel": False}}),
    "tp 2 + sequence parallel": Case(2, {"parallel": {"tp": 2}}),
    "pp 2": Case(2, {"parallel": {"pp": 2}}),
    "pp 2, vpp 2": Case(2, {"parallel": {"pp": 2, "vpp": 2}}),
    "dp 2": Case(2, {}),
    "dp 2, whole optimizer": Case(2, {"parallel": {"distributed_optimizer": False}}),
    "cp 2": Case(2, {"parallel": {"cp": 2}, "train": _BF16}, "one bf16"),
    "ep 2": Case(2, {"model": _MOE, "parallel": EXPERTS}, "one moe"),
    "ep 2, latent attention": Case(2, {"model": {"path": "deepseek_v2_lite"}, "parallel": EXPERTS}, "one mla"),
    "tp 2 + sequence parallel, LoRA": Case(2, {"parallel": {"tp": 2}, "lora": LORA}, "one lora"),
    "pp 2, vpp 2, LoRA": Case(2, {"parallel": {"pp": 2, "vpp": 2}, "lora": LORA}, "one lora"),
    "tp 2, pp 2": Case(4, {"parallel": {"tp": 2, "pp": 2}}),
    "tp 2, pp 2, vpp 2": Case(4, {"parallel": {"tp": 2, "pp": 2, "vpp": 2}}),
    "pp 4": Case(4, {"parallel": {"pp": 4}}),
    "dp 2, pp 2, vpp 2": Case(4, {"parallel": {"pp": 2, "vpp": 2}}),
    "dp 2, tp 2": Case(4, {"parallel": {"tp": 2}}),
    "tp 2, cp 2": Case(4, {"parallel": {"tp": 2, "cp": 2}, "train": _BF16}, "one bf16"),
    "dp 2, cp 2": Case(4, {"parallel": {"cp": 2}, "train": _BF16}, "one bf16"),
    "ep 4": Case(4, {"model": _MOE, "parallel": {"ep": 4}}, "one moe"),
    "tp 2, ep 2": Case(4, {"model": _MOE, "parallel": {"tp": 2, "ep": 2}}, "one moe"),
    "tp 2, ep 2, etp 2": Case(4, {"model": _MOE, "parallel": {"tp": 2, "ep": 2, "etp": 2}}, "one moe"),
    "pp 2, ep 2": Case(4, {"model": _MOE, "parallel": {"pp": 2, "ep": 2}}, "one moe"),
    "cp 2, ep 2": Case(4, {"model": _MOE, "parallel": {"cp": 2, "ep": 2}, "train": _BF16}, "one moe bf16"),
}


def raw(name: str, work: Path, tiny: Path, device: str, sections: dict[str, dict[str, object]]) -> Raw:
    """A recipe for the tiny Qwen3 on counting rows, with `sections` laid over it."""
    base: Raw = {
        "model": {"path": "qwen3", **PAD},
        "data": {"kind": "pattern", "length": 64},
        "train": {"steps": STEPS, "micro_batch": 1, "global_batch": 8, "precision": "fp32"},
        "optim": {"lr": 3e-3},
        "run": {"dir": str(work / name.replace(", ", "_").replace(" ", "")), "device": device, "save": False},
    }
    for section, values in sections.items():
        base[section] = {**base.get(section, {}), **values}
    base["model"]["path"] = str(tiny / str(base["model"]["path"]))
    return base


def packed_jobs(work: Path, tiny: Path, device: str) -> list[Job]:
    """The same chats in rows of their own, in packed rows, and in packed rows two at a time; a step sees them all."""
    from mbx.train.data.examples import read_examples
    from mbx.train.data.rows import pack
    from mbx.train.recipe.sections import Data

    file = work / "chats.jsonl"
    answers = [" ".join(str(n) for n in range(start, start + 3 + 2 * start)) for start in range(12)]
    turns = [
        {"messages": [{"role": "user", "content": f"from {n}"}, {"role": "assistant", "content": text}]}
        for n, text in enumerate(answers)
    ]
    file.write_text("\n".join(map(json.dumps, turns)))
    from transformers import AutoTokenizer

    examples = read_examples(Data(length=128, too_long="drop"), file, AutoTokenizer.from_pretrained(tiny / "qwen3"))
    rows = len(pack([len(example.tokens) - 1 for example in examples], 128))
    batch = rows - rows % 2  # of both kinds, whole micro-batches
    jobs = []
    for precision in ("bf16", "fp32"):
        for name, packs, count, micro in (
            ("unpacked", False, len(examples), 1),
            ("packed", True, rows, 1),
            ("packed by two", True, batch, 2),
        ):
            if name == "packed by two" and batch != rows:
                continue
            data = {"kind": "chat", "path": str(file), "length": 128, "pack": packs, "shuffle": False}
            train = {"global_batch": count, "micro_batch": micro, "precision": precision, "steps": 10}
            sections = {"data": {**data, "too_long": "drop"}, "train": train, "optim": {"lr": 1e-3}}
            recipe = raw(f"{name} {precision}", work, tiny, device, sections)
            jobs.append(Job(f"{name} {precision}", recipe))
            if name == "packed":
                mixed = raw(f"mixed {precision}", work, tiny, device, sections)  # a run folder of its own
                jobs.append(Job(f"mixed {precision}", mixed, mixed=True))
    return jobs


def resume_jobs(work: Path, tiny: Path, device: str) -> list[Job]:
    """A run of two ranks, whole; and the same with asynchronous saving, stopped at step 5 and resumed."""
    layout: dict[str, dict[str, object]] = {"parallel": {"tp": 2}, "train": {"steps": 10, "precision": "bf16"}}
    whole = raw("whole", work, tiny, device, layout)
    saved = raw("stopped", work, tiny, device, {**layout, "run": {"save": True, "save_every": 2, "save_async": True}})
    return [Job("whole", whole), Job("stopped", saved, stop_at=5), Job("resumed", saved, resume=True)]


def distance(a: list[float], b: list[float]) -> float:
    """Largest difference of two loss curves."""
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def judge(curves: dict[str, list[float]], failures: dict[str, str]) -> list[dict[str, Any]]:
    """One row a comparison: what was compared, how far apart, how far it may be, whether it holds."""
    rows: list[dict[str, Any]] = []

    def row(name: str, other: str, limit: float, *, apart: bool = False) -> None:
        missing = [each for each in (name, other) if each not in curves]
        if missing:
            why = failures.get(missing[0], "was not run")
            rows.append({"run": name, "against": other, "ok": None, "reason": f"{missing[0]}: {why}"[:600]})
            return
        far = distance(curves[name], curves[other])
        ok = far > limit if apart else far <= limit
        rows.append({"run": name, "against": other, "max_abs": far, "limit": limit, "apart": apart, "ok": ok})

    def noise(low: str, high: str) -> float:
        return NOISE * distance(curves[low], curves[high]) if low in curves and high in curves else 0.0

    floor = {"one bf16": noise("one bf16", "one"), "one moe bf16": noise("one moe bf16", "one moe")}
    for name, case in CASES.items():
        if name in curves or name in failures:
            row(name, case.like, floor.get(case.like, TOLERANCE))
    row("control", "one", TOLERANCE, apart=True)
    row("control bf16", "one bf16", floor["one bf16"], apart=True)
    for precision, limit in (("bf16", PACKING), ("fp32", TOLERANCE)):
        if f"unpacked {precision}" not in curves and f"unpacked {precision}" not in failures:
            continue  # not asked for
        for name in ("packed", "packed by two"):
            row(f"{name} {precision}", f"unpacked {precision}", limit)
        row(f"mixed {precision}", f"unpacked {precision}", limit, apart=True)
    if "stopped" in curves and "resumed" in curves:
        curves["stopped and resumed"] = curves["stopped"] + curves["resumed"]
        row("stopped and resumed", "whole", 0.0)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for train_parallel.json")
    parser.add_argument("--tiny", type=Path, default=ROOT / "build" / "tiny", help="folder of tiny checkpoints")
    parser.add_argument("--work", type=Path, required=True, help="an empty folder for the runs")
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--only", nargs="*", help="layouts by name; all that the GPUs can hold without")
    parser.add_argument("--limit-s", type=float, default=90.0, help="for one run")
    arguments = parser.parse_args()
    work, tiny, device = arguments.work, arguments.tiny.resolve(), arguments.device
    for folder in (work, arguments.out):
        folder.mkdir(parents=True, exist_ok=True)
    wanted = {
        name: case
        for name, case in CASES.items()
        if case.world <= arguments.gpus and (arguments.only is None or name in arguments.only)
    }
    alone = [Job(name, raw(name, work, tiny, device, sections)) for name, sections in ALONE.items()]
    if arguments.only is None:
        alone += packed_jobs(work, tiny, device)
    queues = [(1, alone)]
    for world in sorted({case.world for case in wanted.values()}):
        jobs = [Job(n, raw(n, work, tiny, device, c.sections)) for n, c in wanted.items() if c.world == world]
        queues.append((world, [*jobs, *(resume_jobs(work, tiny, device) if world == 2 else [])]))
    curves: dict[str, list[float]] = {}
    failures: dict[str, str] = {}
    for world, jobs in queues:
        found, failed = run_jobs(jobs, world, arguments.gpus if device == "cuda" else 1, work, arguments.limit_s)
        curves |= found
        failures |= failed
        rows = judge(dict(curves), failures)
        text = json.dumps({"rows": rows, "curves": curves, "failures": failures}, indent=1)
        (arguments.out / "train_parallel.json").write_text(text)
    for entry in rows:
        far = f"{entry['max_abs']:9.2e}  limit {entry['limit']:8.1e}" if "max_abs" in entry else entry["reason"]
        verdict = {True: "ok", False: "FAILED", None: "not run"}[entry["ok"]]
        sys.stdout.write(f"{entry['run']:32} {entry['against']:15} {verdict:8} {far}\n")
    return 0 if all(entry["ok"] for entry in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
