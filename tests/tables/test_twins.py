"""Forward parity of models that Transformers has no class for, and of text models beside a vision tower."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

from fixtures.make_tiny import make
from fixtures.wrapped import TOWERS, WITHIN, WRAPPED, make_wrapped
from mappings import table_text
from mbx.models.prompts import Batch
from mbx.models.transformers.equivalents import TWINS
from mbx.models.transformers.tracing import trace_transformers
from mbx.proof.legs import Leg
from mbx.proof.parity import parity
from mbx.run.job import Options, plan_hf_to_mcore, run
from tests.oracles import compare_logits

#: Checkpoint, its table, and what the leg says of the comparison.
CASES = [
    ("llama_nemotron", "llama_nemotron", "llama"),
    ("sarvam_moe", "sarvam_moe", "glm4_moe"),
    ("bailing_moe_v2", "bailing_moe_v2", "glm4_moe"),
    ("deepseek", "deepseek", "qwen2_moe"),
    ("mimo", "mimo", "qwen2"),
    ("step_3_5_flash", "step3p5", "step3p5"),
    ("kimi_k2", "deepseek_v3", "deepseek_v3"),
]
GATE_UP = ('["mlp.gate_proj.weight", "mlp.up_proj.weight"]', '["mlp.up_proj.weight", "mlp.gate_proj.weight"]')
#: The same in the table of a model around the text model.
WRONG = {
    "gemma3_vl": """
[text.rows.mlp]
"mlp.linear_fc1.weight" = { glu = ["mlp.up_proj.weight", "mlp.gate_proj.weight"] }
""",
    "llama4_vl": """
[text.rows.moe]
"mlp.experts.linear_fc1.weight{E}" = { glu_zip = "feed_forward.experts.gate_up_proj", transpose = true }
""",
}


def forward(name: str, work: Path, mapping: str | None = None) -> Leg:
    source = make_wrapped(name, work / "hf") if name in WRAPPED else make(name, work / "hf")
    run(plan_hf_to_mcore(source, work / "mcore", Options(sync=False, mapping=mapping)))
    return parity(source, work / "mcore", forward=True, mapping=mapping).legs[-1]


@pytest.mark.parametrize(("name", "table", "model_type"), CASES)
def test_forward_passes_and_says_against_what(tmp_path: Path, name: str, table: str, model_type: str) -> None:
    leg = forward(name, tmp_path)
    assert (leg.name, leg.status) == ("forward", "passed"), leg
    assert f"Transformers' {model_type}" in leg.details[0]


def test_full_layers_may_turn_by_scaled_frequencies_alone(tmp_path: Path) -> None:
    """Llama 3's scaling with constants that Megatron Core does not have, of layers of one kind."""
    source = make("step_3_5_flash", tmp_path / "hf")
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    scaling = {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 32.0}
    config["rope_scaling"] = {**scaling, "original_max_position_embeddings": 64}
    (source / "config.json").write_text(json.dumps(config), encoding="utf-8")
    run(plan_hf_to_mcore(source, tmp_path / "mcore", Options(sync=False)))
    leg = parity(source, tmp_path / "mcore", forward=True).legs[-1]
    assert leg.status == "passed" and any("high_freq_factor" in detail for detail in leg.details), leg


@pytest.mark.parametrize(
    ("name", "table"), [("sarvam_moe", "sarvam_moe"), ("gemma3", "gemma3_vl"), ("llama4", "llama4_vl")]
)
def test_a_wrong_row_fails(tmp_path: Path, name: str, table: str) -> None:
    right, wrong = GATE_UP
    text = table_text(table)
    assert (right in text) != (table in WRONG)
    (tmp_path / "own.toml").write_text(text.replace(right, wrong) + WRONG.get(table, ""), encoding="utf-8")
    assert forward(name, tmp_path, str(tmp_path / "own.toml")).status == "failed"


@pytest.mark.parametrize("kind", WRAPPED)
def test_the_text_model_alone_computes_what_the_whole_model_does(tmp_path: Path, kind: str) -> None:
    source = make_wrapped(kind, tmp_path / "hf")
    ids = torch.randint(0, 251, (2, 24), generator=torch.Generator().manual_seed(0))
    whole = AutoModelForImageTextToText.from_pretrained(source, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        expected = whole(ids, use_cache=False).logits
    trace = trace_transformers(source, [Batch(ids)])
    found = trace.head(0, 251).reshape(*ids.shape, 251)
    trace.close()
    assert expected.std() > 0.5
    assert compare_logits(expected, found).max_abs <= 1e-5


def test_every_twin_that_a_cpu_runs_is_tried() -> None:
    """A model around a text model is its own reference (`test_pictures.py`), and trains as that text model."""
    types = {"llama_nemotron": "nemotron-nas", "step_3_5_flash": "step3p5"}
    known = {types.get(name, name) for name, _, _ in CASES} | {name for name, _ in WITHIN.values()}  # `test_radio.py`
    assert known | (set(TWINS) & {*TOWERS, *WRAPPED}) == set(TWINS)
