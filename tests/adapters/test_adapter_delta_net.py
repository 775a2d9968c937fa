"""Adapters on gated delta nets and gated attention, in Megatron Core's own modules on a CPU, against PEFT."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
import transformers
from _peft_made import CASES, Made, adapt
from safetensors.torch import load_file

from mbx.models.megatron.build import build_model
from mbx.models.megatron.core.cpu import megatron_on_cpu
from mbx.models.megatron.processes import process_group
from mbx.train.checkpoints.export import export_run
from mbx.train.lora import attach as lora
from mbx.train.lora.peft_folder import by_weight, load_peft, open_for
from mbx.train.model.blueprint import blueprint
from mbx.train.model.weights import load_weights
from mbx.train.recipe.parse import parse_recipe
from mbx.train.run.loop import train
from mbx.train.run.prepare import prepare
from tests.delta_on_cpu import delta_on_cpu
from tests.oracles import compare_logits, mcore_logits


def recipe_of(made: Made, folder: Path, **changes: object) -> dict[str, dict[str, object]]:
    return {
        "model": {"path": str(made.base), "config": {"deterministic_mode": True, "mtp_num_layers": None}},
        "data": {"kind": "pattern", "length": 16},
        "train": {"steps": 2, "micro_batch": 2, "global_batch": 2, "precision": "fp32", "deterministic": True},
        "optim": {"lr": 1e-2, "schedule": "constant"},
        "lora": {"rank": 4, "alpha": 6.0, **changes},
        "run": {"dir": str(folder), "device": "cpu"},
    }


def adapted_logits(recipe: dict[str, dict[str, object]], base: Path, adapter: Path, ids: torch.Tensor) -> torch.Tensor:
    parsed = parse_recipe(recipe)
    plan = blueprint(parsed)
    with megatron_on_cpu(), process_group():
        model = build_model(plan.config)
        load_weights(model, plan, base)
        opened = open_for(plan, adapter)
        lora.attach(model, parsed.lora, plan, 0, by_weight(opened))
        load_peft(model, opened)
        return mcore_logits(model, ids, vocab_size=plan.vocab)


def agree(left: torch.Tensor, right: torch.Tensor, tolerance: float = 5e-4) -> bool:
    """Two recurrences in fp32, in another order: 1e-4 was seen; a row in the wrong place moves logits by tenths."""
    return compare_logits(left, right, tolerance=tolerance).ok


def made_of(name: str, folder: Path) -> tuple[Made, dict[str, dict[str, object]], torch.Tensor, torch.Tensor]:
    """An adapter by PEFT, the run that starts from it, tokens, and PEFT's logits of them."""
    made = adapt(name, folder, dtype=torch.float32, **CASES[name])
    dora = bool(CASES[name].get("use_dora"))
    recipe = recipe_of(made, folder / "run", adapter=str(made.adapter), dora=dora)
    ids = torch.randint(0, 251, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return made, recipe, ids, made.model(ids).logits


@pytest.mark.parametrize("name", ["qwen3_next", "qwen3_5_text"])
def test_delta_nets_apply_what_peft_made(tmp_path: Path, name: str) -> None:
    made, recipe, ids, expected = made_of(name, tmp_path)
    with delta_on_cpu():
        assert agree(expected, adapted_logits(recipe, made.base, made.adapter, ids))
        made.model.disable_adapter_layers()
        with torch.no_grad():
            assert not agree(made.model(ids).logits, expected), "the adapter must change something"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3_next", "qwen3_5_text"])
def test_delta_nets_export_what_they_trained(tmp_path: Path, name: str) -> None:
    """Trained on and exported, applied by PEFT = by Megatron Core = merged."""
    made, recipe, ids, expected = made_of(name, tmp_path)
    with delta_on_cpu():
        train(prepare(parse_recipe(recipe)), live=False)
    exported, _ = export_run(tmp_path / "run", tmp_path / "exported")
    merged, _ = export_run(tmp_path / "run", tmp_path / "merged", merged=True)
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (made.adapter, exported))
    assert before.keys() == after.keys()
    with torch.no_grad():
        together = transformers.AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)(ids).logits
        base = transformers.AutoModelForCausalLM.from_pretrained(made.base, dtype=torch.float32)
        applied = peft.PeftModel.from_pretrained(base, str(exported)).eval()(ids).logits
    assert agree(applied, together, 5e-3 if any("magnitude" in key for key in after) else 5e-4)
    with delta_on_cpu():
        assert agree(applied, adapted_logits(recipe, made.base, exported, ids))
    assert not agree(applied, expected), "training must have changed something"
