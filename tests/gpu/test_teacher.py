"""A teacher beside its student on one GPU: the budget's peak, and nothing to learn where both are one model.

pytest -m gpu tests/gpu/test_teacher.py
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mbx.train.recipe.catalogue import load_recipe
from mbx.train.run.loop import train
from mbx.train.run.prepare import prepare

pytestmark = pytest.mark.gpu
#: What a prediction may be off.
LIMIT = 0.05
ROWS = ("data.kind=pattern", "data.length=2048", "train.micro_batch=1", "train.global_batch=2", "train.steps=3")
CASES = {
    "whole": ("qwen3_0_6b_sft", ()),
    "top": ("qwen3_0_6b_sft", ("distill.top_k=64",)),
    "adapters": ("qwen3_0_6b_lora", ("distill.temperature=2",)),
    "recomputed": ("qwen3_0_6b_sft", ("train.recompute=full",)),
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights in the shape of Qwen3 0.6B."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=151936,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
        max_position_embeddings=40960,
    )
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def records(run_dir: Path, kind: str) -> list[dict[str, float]]:
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [record for record in lines if record["kind"] == kind]


@pytest.mark.parametrize("case", CASES)
def test_the_budget_holds(case: str, teacher: Path, tmp_path: Path) -> None:
    name, own = CASES[case]
    words = (*ROWS, *own, f"model={teacher}", f"distill.teacher={teacher}", "run.save=false", f"run.dir={tmp_path}")
    train(prepare(load_recipe(name, words)), live=False)
    (memory,) = records(tmp_path, "memory")
    assert abs(memory["predicted_bytes"] / memory["measured_bytes"] - 1) <= LIMIT


def test_a_student_that_is_its_teacher_has_nothing_to_learn(teacher: Path, tmp_path: Path) -> None:
    own = ("distill.weight=1", "optim.lr=0", "optim.warmup_fraction=0", "optim.min_lr=0", "run.save=false")
    words = (*ROWS, *own, f"model={teacher}", f"distill.teacher={teacher}", f"run.dir={tmp_path}")
    train(prepare(load_recipe("qwen3_0_6b_sft", words)), live=False)
    for step in records(tmp_path, "step"):
        assert abs(step["distill_kl"]) < 1e-5 and step["grad_norm"] < 1e-3
