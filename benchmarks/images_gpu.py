"""LoRA on a model that sees, beside Transformers with PEFT: `python benchmarks/images_gpu.py`.

Qwen3.5-9B with its tower in random weights, adapters of rank 64 on every linear of the text model, a frozen tower, a
chat with one image a step, all of it 2,048 tokens. Both sides are given the same ids, pixels and learned tokens, each
in a process of its own, in turns. `--tiny` is the same on a CPU, where gated delta nets are computed by torch.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.recipe_runs import GIB, WARM, Record, step_by_step  # noqa: E402

if TYPE_CHECKING:
    from mbx.train.run.prepare import Prepared

RECIPE, LENGTH, RANK = "qwen35_9b_lora", 2048, 64
#: What mbx is told of CUDA graphs: `off` in the environment's MBX_GRAPH runs kernel by kernel.
GRAPH = os.environ.get("MBX_GRAPH", "auto")
_SENTENCE = "The quick brown fox jumps over the lazy dog; the dog does not mind at all. "


def make_folder(folder: Path, tiny: bool) -> None:
    """The model with random weights, its processor, and a place for its chats."""
    from fixtures.seeing import make_seeing

    make_seeing("qwen3_5", folder)
    if not tiny:
        make_whole(folder, "cuda")
    (folder / "chats").mkdir()


def make_whole(folder: Path, device: str, *changes: str) -> None:
    """In the place of the tiny model in `folder`: the shape of `RECIPE`, and the tower that its class has."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    from mbx.tables import shipped
    from mbx.train.model.blueprint import blueprint
    from mbx.train.recipe.catalogue import load_recipe

    plan = blueprint(load_recipe(RECIPE, ["model.init=random", "data.kind=pattern", *changes]))
    assert plan.table is not None
    text = dict(plan.table.config.to_hf(plan.config))
    rope = {"rope_type": "default", "mrope_section": [11, 11, 10], "mrope_interleaved": True}
    rope |= {key: text.pop(key) for key in ("rope_theta", "partial_rotary_factor")}
    text |= {"model_type": shipped(plan.table.name).model_types[0], "rope_parameters": rope}
    vision = {"out_hidden_size": text["hidden_size"]}  # the rest is the class's own
    whole = AutoConfig.for_model("qwen3_5", text_config=text, vision_config=vision)
    whole.tie_word_embeddings = text["tie_word_embeddings"]
    tokens = json.loads((folder / "config.json").read_text("utf-8"))
    for key in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"):
        setattr(whole, key, tokens[key])
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(whole)
    torch.set_default_dtype(torch.float32)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder)
    file = folder / "preprocessor_config.json"
    settings = {**json.loads(file.read_text("utf-8")), "size": {"shortest_edge": 1 << 16, "longest_edge": 1 << 24}}
    file.write_text(json.dumps(settings), encoding="utf-8")


def make_chat(folder: Path, length: int, side: int, tiny: bool) -> None:
    """The longest chat about an image of `side` pixels that a row of `length` tokens holds."""
    from PIL import Image

    place = folder / "chats"
    Image.effect_noise((side, side), 64).convert("RGB").save(place / "0.png")

    def write(words: int) -> int:
        said = " ".join((_SENTENCE * (1 + words // 15)).split(" ")[:words])
        parts = [{"type": "image", "path": "0.png"}, {"type": "text", "text": "What is it?"}]
        turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": said}]
        (place / "chats.jsonl").write_text(json.dumps({"messages": turns}) + "\n", encoding="utf-8")
        return len(prepared(folder, 4 * length, tiny=tiny).data.chosen[0][0].tokens)

    low, high = 1, length
    while low + 1 < high:
        middle = (low + high) // 2
        low, high = (middle, high) if write(middle) <= length else (low, middle)
    write(low)


def prepared(folder: Path, length: int, steps: int = 2, tiny: bool = False) -> Prepared:
    """The run with rows of at most `length` tokens, ready to train."""
    from mbx.train.recipe.parse import parse_recipe
    from mbx.train.run.prepare import prepare

    run = folder / f"run{time.monotonic_ns()}"
    raw: dict[str, dict[str, Any]] = {
        "model": {"path": str(folder), "config": {"mtp_num_layers": 0}},
        "data": {"kind": "auto", "path": str(folder / "chats" / "chats.jsonl"), "length": length, "pack": False},
        "train": {"steps": steps, "micro_batch": 1, "global_batch": 1, "cuda_graph": GRAPH},
        "optim": {"lr": 1e-4, "warmup_steps": 0},
        "lora": {"rank": RANK, "alpha": 2.0 * RANK},
        "run": {"dir": str(run), "save": False, "device": "cpu" if tiny else "auto"},
    }
    if tiny:
        raw["train"]["deterministic"] = True
    return prepare(parse_recipe(raw))


def run_mbx(folder: Path, length: int, steps: int, tiny: bool) -> Record:
    """Tokens/s, peak and its prediction of the run by `mbx train`'s own loop."""
    import torch

    from mbx.train.budget.predict import predict
    from mbx.train.model.graphs import why_not
    from mbx.train.run.loop import train

    ready = prepared(folder, length, steps, tiny)
    example = ready.data.chosen[0][0]
    took: list[float] = []
    outcome = train(ready, live=False, on_step=lambda step: took.append(step.step_s))
    return {
        "tokens": len(example.tokens),
        "tokens_per_s": len(example.tokens) / statistics.median(took[WARM:] or took),
        "first_step_s": took[0],
        "losses": [round(loss, 4) for loss in outcome.losses],
        "finite": all(map(math.isfinite, outcome.losses)),
        "recorded": why_not(ready.recipe, ready.plan.config, ready.ranks) or "yes",
        "step_s": [round(one, 3) for one in took],
        "peak_gib": None if tiny else torch.cuda.max_memory_allocated() / GIB,
        "predicted_gib": predict(ready.recipe, ready.plan, ready.ranks.dp, ready.looks).total / GIB,
    }


def run_peft(folder: Path, length: int, steps: int, tiny: bool) -> Record:
    """The same row in Transformers with PEFT: bf16 base, fp32 adapters on the same linears, AdamW, sdpa."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageTextToText

    device = "cpu" if tiny else "cuda"
    data = prepared(folder, length, tiny=tiny).data
    example, eyes = data.chosen[0][0], data.eyes
    assert eyes is not None
    ids = torch.from_numpy(example.tokens)[None].long()
    labels = torch.where(torch.from_numpy(example.learn)[None], ids, -100)
    inputs = eyes.inputs([one.read() for one in example.pictures])
    inputs |= {"input_ids": ids, "labels": labels, "mm_token_type_ids": (ids == eyes.sight.token).long()}
    inputs = {name: value.to(device) for name, value in inputs.items()}
    network = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.bfloat16, attn_implementation="sdpa", device_map=device
    )
    modules = [
        name
        for name, module in network.named_modules()
        if isinstance(module, torch.nn.Linear) and ".language_model." in name
    ]
    network = get_peft_model(network, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=modules))
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    took, losses = step_by_step(network, inputs, steps, device)
    return {
        "tokens": ids.numel(),
        "learned": int((labels >= 0).sum()),
        "image_tokens": int((ids == eyes.sight.token).sum()),
        "adapted": len(modules),
        "tokens_per_s": ids.numel() / statistics.median(took[WARM:] or took),
        "first_step_s": took[0],
        "losses": [round(value, 4) for value in losses],
        "finite": all(map(math.isfinite, losses)),
        "peak_gib": None if tiny else torch.cuda.max_memory_allocated() / GIB,
    }


RUNS = {"mbx": run_mbx, "peft": run_peft}


def alone(side: str, folder: Path, options: argparse.Namespace) -> Record:
    """One side in a process of its own; its record."""
    words = [sys.executable, __file__, "--run", side, "--folder", str(folder), "--steps", str(options.steps)]
    words += ["--length", str(options.length), *(["--tiny"] if options.tiny else [])]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, timeout=options.run_s, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a tiny model on a CPU")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--sides", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--length", type=int, default=LENGTH, help="tokens of a row")
    parser.add_argument("--side", type=int, default=1024, help="pixels of the image's sides")
    parser.add_argument("--run-s", type=float, default=200.0, help="seconds of one run")
    parser.add_argument("--run", choices=RUNS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    with computed(options.tiny):
        if not options.run:
            return turns(options)
        found = RUNS[options.run](options.folder, options.length, options.steps, options.tiny)
    sys.stdout.write(json.dumps(found) + "\n")
    return 0


def computed(tiny: bool) -> contextlib.AbstractContextManager[None]:
    """What gated delta nets are computed by: torch on a CPU, kernels on a GPU."""
    if tiny:
        from tests.delta_on_cpu import delta_on_cpu

        return delta_on_cpu()
    import transformer_engine.pytorch  # noqa: F401  # before the first CUDA call

    return contextlib.nullcontext()


def turns(options: argparse.Namespace) -> int:
    """Both sides over one folder, in turns; 1 where a loss is not finite."""
    finite = True
    with tempfile.TemporaryDirectory() as name:
        folder, began = Path(name) / "model", time.monotonic()
        make_folder(folder, options.tiny)
        make_chat(folder, options.length, options.side, options.tiny)
        if not options.tiny:
            import torch

            torch.cuda.empty_cache()
        sys.stdout.write(f"folder made in {time.monotonic() - began:.0f} s\n")
        for _ in range(options.rounds):
            for side in options.sides:
                found = alone(side, folder, options)
                finite &= bool(found["finite"])
                sys.stdout.write(json.dumps({"side": side, **found}) + "\n")
                sys.stdout.flush()
    return 0 if finite else 1


if __name__ == "__main__":
    sys.exit(main())
