"""Adapters of every kind of layer, on a device: `python tests/gpu/run_adapters.py --device cuda --out DIR`.

For each tiny family PEFT makes an adapter on the whole of it. Megatron Core with that adapter must give PEFT's logits;
it is trained on for a few steps and exported, and what PEFT then computes must be Megatron Core's from what was
exported. One process runs all of them. DIR gets `adapters.json`, written anew after each.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import tempfile
import time
import traceback
from importlib.util import find_spec
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE), str(ROOT / "tests" / "adapters")]

#: Families and what of them is adapted, as PEFT takes it.
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_5_text": {"target_modules": "all-linear"},
    "qwen3_5_moe_text": {
        "target_modules": [
            "q_proj",
            "v_proj",
            "o_proj",
            "in_proj_qkv",
            "in_proj_z",
            "in_proj_b",
            "in_proj_a",
            "out_proj",
        ]
    },
    "qwen3_next": {
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "in_proj_qkvz", "in_proj_ba", "out_proj"]
    },
    "nemotron_h": {"target_modules": ["q_proj", "o_proj", "in_proj", "up_proj", "down_proj"]},  # PEFT refuses out_proj
    "gpt_oss": {
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    },
    "gemma3_text": {"target_modules": "all-linear"},
    "deepseek_v2": {"target_modules": ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]},
}


def recipe_of(base: Path, adapter: Path, run: Path, device: str, config: dict[str, Any], bf16: bool) -> Any:
    """The run that trains on."""
    from mbx.train.recipe.parse import parse_recipe

    return parse_recipe(
        {
            "model": {"path": str(base), "config": config},
            "data": {"kind": "pattern", "length": 64},
            "train": {"steps": 4, "micro_batch": 2, "global_batch": 2, "precision": "bf16" if bf16 else "fp32"},
            "optim": {"lr": 1e-2, "schedule": "constant"},
            "lora": {"rank": 4, "alpha": 6.0, "adapter": str(adapter)},
            "run": {"dir": str(run), "device": device},
        }
    )


def megatron_logits(recipe: Any, base: Path, adapter: Path, device: str, ids: Any) -> Any:
    """fp32 logits of Megatron Core's own modules with the adapter of a folder in them."""
    from mbx.models.device import Spread
    from mbx.models.megatron.build import build_model
    from mbx.models.megatron.processes import megatron_on
    from mbx.models.megatron.rotary import lend_frequencies
    from mbx.train.lora import attach as lora
    from mbx.train.lora.peft_folder import by_weight, load_peft, open_for
    from mbx.train.model.blueprint import blueprint
    from mbx.train.model.weights import load_weights
    from tests.oracles import mcore_logits

    plan = blueprint(recipe)
    exact = {**plan.config}
    if exact.get("experimental_attention_variant") == "gated_delta_net":
        exact["deterministic_mode"] = True  # Megatron Core's own torch code; the kernels take no fp32
    with megatron_on(Spread(device=device)):
        model = build_model(exact, Spread(device=device), use_te=device == "cuda")
        load_weights(model, plan, base)
        from mbx.formats.hf import read_config

        lend_frequencies(model, base, read_config(base))
        opened = open_for(plan, adapter)
        lora.attach(model, recipe.lora, plan, 0, by_weight(opened))
        load_peft(model, opened)
        return mcore_logits(model, ids.to(device), vocab_size=plan.vocab).float().cpu()


def measure(name: str, device: str, work: Path) -> dict[str, Any]:
    """Everything about one family."""
    import peft
    import torch
    import transformers
    from _peft_made import adapt

    from mbx.models.transformers.reference import without_kernels
    from mbx.train.checkpoints.export import export_run
    from mbx.train.run import prepare as prepare_module
    from mbx.train.run.loop import train
    from tests.oracles import compare_logits

    found: dict[str, Any] = {}
    if name.startswith("nemotron"):
        from _mamba_reference import stand_in

        if find_spec("mamba_ssm") is None:
            stand_in()
            found["notes"] = "kernels of mamba-ssm replaced by their recurrence in torch"
            prepare_module.check_kernels = lambda config: None  # type: ignore[attr-defined]
    delta = name.startswith(("qwen3_5", "qwen3_next"))
    if delta and device == "cuda":  # it takes its l2norm from fla when imported
        importlib.import_module("megatron.core.ssm.gated_delta_net")
    with without_kernels():
        made = adapt(name, work, dtype=torch.float32, **FAMILIES[name])
    ids = torch.randint(0, 251, (2, 48), generator=torch.Generator().manual_seed(1))
    config = {"mtp_num_layers": None} if delta else {}
    recipe = recipe_of(made.base, made.adapter, work / "run", device, config, bf16=delta and device == "cuda")
    with torch.no_grad():
        expected = made.model(ids).logits
    first = compare_logits(expected, megatron_logits(recipe, made.base, made.adapter, device, ids))
    found["applied"] = {"max_abs": first.max_abs, "ok": first.ok}
    found["losses"] = list(train(prepare_module.prepare(recipe), live=False).losses)
    exported, _ = export_run(work / "run", work / "exported")
    model = transformers.AutoModelForCausalLM.from_pretrained(made.base, dtype=torch.float32)
    with torch.no_grad():
        applied = peft.PeftModel.from_pretrained(model, str(exported)).eval()(ids).logits
    second = compare_logits(applied, megatron_logits(recipe, made.base, exported, device, ids))
    found["exported"] = {"max_abs": second.max_abs, "ok": second.ok}
    moved = compare_logits(applied, expected)
    found["moved"] = moved.max_abs
    found["status"] = "passed" if first.ok and second.ok and not moved.ok else "failed"
    return found


def main() -> int:
    """Measure the named families; 1 where one failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="families; all without a name")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for adapters.json")
    arguments = parser.parse_args()
    if arguments.device == "cuda":
        import transformer_engine.pytorch  # noqa: F401  # before the first CUDA call
    arguments.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {}
    for name in arguments.names or FAMILIES:
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            try:
                results[name] = measure(name, arguments.device, Path(folder))
            except Exception as error:  # the next family is measured all the same
                traceback.print_exc()
                results[name] = {"status": "failed", "reason": f"{type(error).__name__}: {error}"[:400]}
        results[name]["seconds"] = round(time.monotonic() - began, 1)
        sys.stdout.write(f"{name}  {json.dumps(results[name])}\n")
        sys.stdout.flush()
        (arguments.out / "adapters.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    return 1 if any(found["status"] != "passed" for found in results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
