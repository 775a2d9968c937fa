"""Adapters in Megatron Core's own modules: experts, latent attention, and tensors that Transformers fuses."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
import transformers
from _peft_made import ATTENTION, CASES, EXPERTS, Made, adapt
from torch import nn

from converters.errors import UnsupportedError, UsageError
from mbx.models.megatron.build import build_model
from mbx.models.megatron.core.cpu import megatron_on_cpu
from mbx.models.megatron.processes import process_group
from mbx.train.checkpoints.export import export_run
from mbx.train.lora import attach as lora
from mbx.train.lora.adapter import Slots
from mbx.train.lora.peft_folder import by_weight, like_adapter, load_peft, open_for
from mbx.train.model.blueprint import blueprint
from mbx.train.model.weights import load_weights
from mbx.train.recipe.parse import parse_recipe
from mbx.train.recipe.sections import Lora
from mbx.train.run.loop import train
from mbx.train.run.prepare import prepare
from tests.oracles import compare_logits, mcore_logits

DENSE = ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]
#: Linears of each tiny model, and the same for PEFT.
MODELS: dict[str, tuple[list[str], dict[str, object]]] = {
    "qwen3_moe": (DENSE, CASES["qwen3_moe"]),
    "gpt_oss": (DENSE, {"target_modules": ATTENTION, "target_parameters": EXPERTS}),
    "qwen3": (
        ["q_proj", "v_proj", "gate_proj"],  # some parts of two linears, with ranks and scales of their own
        {**CASES["qwen3"], "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"gate_proj": 3}},
    ),
    "gemma3_text": (["all-linear"], {"target_modules": "all-linear"}),
    "phi3": (DENSE, {"target_modules": "all-linear"}),
    "deepseek_v2": (
        ["linear_q_down_proj", "linear_q_up_proj", "linear_kv_down_proj", "linear_kv_up_proj", "linear_proj"],
        CASES["deepseek_v2"],
    ),
}


def recipe_of(made: Made, folder: Path, targets: list[str], **changes: object) -> dict[str, dict[str, object]]:
    return {
        "model": {"path": str(made.base)},
        "data": {"kind": "pattern", "length": 16},
        "train": {"steps": 2, "micro_batch": 2, "global_batch": 2, "precision": "fp32"},
        "optim": {"lr": 1e-2, "schedule": "constant"},
        "lora": {"rank": 4, "alpha": 6.0, "targets": targets, **changes},
        "run": {"dir": str(folder), "device": "cpu"},
    }


def adapted_logits(made: Made, recipe: dict[str, dict[str, object]], adapter: Path, ids: torch.Tensor) -> torch.Tensor:
    """Logits of Megatron Core with the adapter of a folder in its own modules."""
    parsed = parse_recipe(recipe)
    plan = blueprint(parsed)
    with megatron_on_cpu(), process_group():
        model = build_model(plan.config)
        load_weights(model, plan, made.base)
        opened = open_for(plan, adapter)
        lora.attach(model, like_adapter(parsed.lora, opened), plan, 0, by_weight(opened))
        load_peft(model, opened)
        return mcore_logits(model, ids, vocab_size=plan.vocab)


@pytest.mark.parametrize("name", MODELS)
def test_adapters_agree_with_peft(tmp_path: Path, name: str) -> None:
    """Applied by Megatron Core = by PEFT; trained on and exported, applied by PEFT = merged = by Megatron Core."""
    targets, config = MODELS[name]
    made = adapt(name, tmp_path, dtype=torch.float32, **config)
    ids = torch.randint(0, 251, (2, 12), generator=torch.Generator().manual_seed(1))
    recipe = recipe_of(made, tmp_path / "run", targets, adapter=str(made.adapter))
    with torch.no_grad():
        expected = made.model(ids).logits
    assert compare_logits(expected, adapted_logits(made, recipe, made.adapter, ids)).ok

    train(prepare(parse_recipe(recipe)), live=False)
    exported, _ = export_run(tmp_path / "run", tmp_path / "exported")
    merged, _ = export_run(tmp_path / "run", tmp_path / "merged", merged=True)
    base = transformers.AutoModelForCausalLM.from_pretrained(made.base, dtype=torch.float32)
    with torch.no_grad():
        together = transformers.AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)(ids).logits
        applied = peft.PeftModel.from_pretrained(base, str(exported)).eval()(ids).logits
    assert compare_logits(applied, together).ok
    assert compare_logits(applied, adapted_logits(made, recipe, exported, ids)).ok
    assert not compare_logits(applied, expected).ok, "training must have changed something"


def test_targets_that_the_model_lacks_are_refused(tmp_path: Path) -> None:
    made = adapt("deepseek_v2", tmp_path)
    parsed = parse_recipe(recipe_of(made, tmp_path / "run", DENSE))
    with pytest.raises(UsageError, match="has no linear_qkv; its linears are down_proj"):
        lora.check_lora(parsed, blueprint(parsed))
    raw = recipe_of(made, tmp_path / "run", ["linear_fc1"])
    parsed = parse_recipe({**raw, "parallel": {"tp": 4, "etp": 2}})
    with pytest.raises(UnsupportedError, match="cut over all ranks of tensor parallelism or over none"):
        lora.check_lora(parsed, blueprint(parsed))


class TEColumnParallelGroupedLinear(nn.Module):
    """Computes what Transformer Engine's class of this name does, expert by expert."""

    def __init__(self, experts: int, rows: int, inputs: int) -> None:
        super().__init__()
        self.num_gemms = experts
        for i in range(experts):
            self.register_parameter(f"weight{i}", nn.Parameter(torch.randn(rows, inputs), requires_grad=False))

    def forward(self, x: torch.Tensor, m_splits: list[int] | torch.Tensor) -> tuple[torch.Tensor, None]:
        parts = torch.split(x, m_splits.tolist() if isinstance(m_splits, torch.Tensor) else m_splits)
        return torch.cat([part @ self.get_parameter(f"weight{i}").t() for i, part in enumerate(parts)]), None


def test_grouped_experts_are_their_merged_weights() -> None:
    from mbx.train.lora.attach import LoraGrouped

    with megatron_on_cpu(), process_group():
        base = TEColumnParallelGroupedLinear(3, 8, 5)
        slots = Slots(1, 8, ((0, 4, 0), (4, 4, 1)), ("0", "1"), (2, 2), (3.0, 3.0))
        layer = LoraGrouped(base, Lora(rank=2, alpha=6.0), slots, None, [1, 2, 3])  # type: ignore[arg-type]
        x = torch.randn(7, 5)
        assert torch.equal(layer(x, [2, 0, 5])[0], base(x, [2, 0, 5])[0])
        with torch.no_grad():
            for b in layer.factors():
                b.normal_()
        out, _ = layer(x, torch.tensor([2, 0, 5]))
        for expert, rows in ((0, slice(0, 2)), (2, slice(2, 7))):
            a = layer.lora_a[expert]
            delta = torch.cat([b[expert] @ a[2 * i : 2 * i + 2] for i, b in enumerate(layer.factors())])
            whole = base.get_parameter(f"weight{expert}") + 3.0 * delta
            assert torch.allclose(out[rows], x[rows] @ whole.t(), atol=1e-5)
        out.sum().backward()
        assert layer.lora_a.grad is not None and bool((layer.lora_a.grad[1] == 0).all())
        with pytest.raises(UnsupportedError, match="DoRA"):
            LoraGrouped(base, Lora(rank=2, dora=True), slots, None, [1, 2, 3])  # type: ignore[arg-type]
