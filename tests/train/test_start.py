"""Weights read straight into a built model are those that Megatron Core itself loads from a converted checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from _trainings import QWEN3, ROOT, raw, run_here
from safetensors.torch import load_file, save_file

from converters.errors import CoverageError
from converters.mcore.layout import Layout
from mbx.live.shards import Model
from mbx.models.device import Spread
from mbx.models.megatron.build import build_model
from mbx.models.megatron.core.cpu import megatron_on_cpu
from mbx.models.megatron.processes import process_group
from mbx.run.job import Options, plan_hf_to_mcore, run
from mbx.train.model.blueprint import blueprint
from mbx.train.model.weights import load_weights
from mbx.train.recipe.parse import parse_recipe
from tests.judge import load_torch_dist

FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]


def parameters(folder: Path, source: Path, dtype: str = "fp32") -> dict[str, torch.Tensor]:
    plan = blueprint(parse_recipe(raw(folder / "run", model={"path": str(folder)})))
    with megatron_on_cpu(), process_group():
        model = build_model(plan.config, Spread(dtype=dtype))
        load_weights(model, plan, source)
        return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_megatron_core(tmp_path: Path, family: str) -> None:
    folder = ROOT / "fixtures" / "tiny" / family
    run(plan_hf_to_mcore(folder, tmp_path / "ckpt", Options()))
    plan = blueprint(parse_recipe(raw(tmp_path / "run", model={"path": str(folder)})))
    with megatron_on_cpu(), process_group():
        model = build_model(plan.config, Spread(dtype="bf16"))
        load_torch_dist(model, next((tmp_path / "ckpt").glob("iter_*")))
        oracle = {name: p.detach().clone() for name, p in model.named_parameters()}
    for source in (folder, tmp_path / "ckpt"):
        found = parameters(folder, source, "bf16")
        assert found.keys() == oracle.keys()
        assert all(torch.equal(found[name], oracle[name]) for name in oracle)


def test_reads_other_chunks_and_padding(tmp_path: Path) -> None:
    """A checkpoint cut for tp 2 with 256 rows fills a model with 251."""
    run(plan_hf_to_mcore(QWEN3, tmp_path / "ckpt", Options(layout=Layout(tp=2, vocab_divisor=64))))
    direct, through = parameters(QWEN3, QWEN3), parameters(QWEN3, tmp_path / "ckpt")
    assert all(torch.equal(direct[name], through[name]) for name in direct)


def test_every_parameter_must_have_a_value(tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    shutil.copytree(QWEN3, folder)
    plan = blueprint(parse_recipe(raw(tmp_path / "run", model={"path": str(folder)})))
    with megatron_on_cpu(), process_group():
        model = build_model({**plan.config, "add_qkv_bias": True})
        with pytest.raises(CoverageError, match="linear_qkv.bias"):
            load_weights(model, plan, folder)


def test_an_untied_head_is_not_dropped(tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    shutil.copytree(QWEN3, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    with pytest.raises(CoverageError, match="should repeat"):
        parameters(folder, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors")
    assert "output_layer.weight" not in parameters(folder, folder)


def test_shards_are_views_of_parameters() -> None:
    """Writing into a shard must write into the model: with copies the load would be lost without a sign."""
    plan = blueprint(parse_recipe(raw(Path("unused"))))
    with megatron_on_cpu(), process_group():
        model = build_model(plan.config)
        storages = {p.untyped_storage().data_ptr() for p in model.parameters()}
        held = Model([model])
        views = held.views()
        assert {views.memory(shard).untyped_storage().data_ptr() for shard in held.base} == storages


def test_the_first_loss_is_transformers(tmp_path: Path) -> None:
    """Masked loss of a packed chat batch, computed by Transformers example by example."""
    import transformers

    lines = [
        {"messages": [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": "x" * (n + 1)}]}
        for n in range(6)
    ]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, lines)))
    tokenizer = transformers.AutoTokenizer.from_pretrained(QWEN3)
    model = transformers.AutoModelForCausalLM.from_pretrained(QWEN3, dtype=torch.float32)
    total = count = 0.0
    for line in lines:
        ids = tokenizer.apply_chat_template(line["messages"], return_dict=False)
        prompt = tokenizer.apply_chat_template(line["messages"][:1], return_dict=False)
        answer = len(ids) - len(line["messages"][1]["content"]) - 1  # one token a letter, and the end
        assert answer > len(prompt)
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, answer - 1 : -1]
        total += torch.nn.functional.cross_entropy(logits, torch.tensor(ids[answer:]), reduction="sum").item()
        count += len(ids) - answer

    def first(pack: bool, micro: int) -> float:
        data = {"kind": "chat", "path": str(tmp_path / "d.jsonl"), "length": 128 if pack else 40, "pack": pack}
        rows = 6 if not pack else 2
        train = {"steps": 1, "global_batch": rows, "micro_batch": micro}
        return run_here(raw(tmp_path / f"run-{pack}-{micro}", data=data, train=train))[0]

    for pack, micro in ((False, 1), (False, 3), (True, 1), (True, 2)):
        assert first(pack, micro) == pytest.approx(total / count, abs=1e-5), (pack, micro)
