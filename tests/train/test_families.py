"""What a family asks of the trainer: refused where Megatron Core has another model, else its kernels and constants."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from _trainings import raw

from converters.errors import DeviceError, UnsupportedError
from fixtures.make_tiny import make
from mappings import table_text
from mbx.models.megatron.core.cpu import megatron_on_cpu
from mbx.models.megatron.processes import process_group
from mbx.models.megatron.rotary import transformers_frequencies
from mbx.train.model.blueprint import blueprint
from mbx.train.model.build import build
from mbx.train.model.config import gpu_config
from mbx.train.model.parallel import Ranks
from mbx.train.recipe.parse import parse_recipe
from mbx.train.run.prepare import prepare

ALONE = Ranks(rank=0, world_size=1, local_rank=0, dp=1, device="cpu", te=False)


def test_refused_with_the_tables_reason(tmp_path: Path) -> None:
    """Such a table used to train another model, or to end in an error about fields of a config."""
    own = tmp_path / "own.toml"
    own.write_text('unsupported = "Megatron Core has no such layer."\n' + table_text("qwen3"), encoding="utf-8")
    model = {"path": str(make("qwen3", tmp_path / "hf")), "mapping": str(own)}
    with pytest.raises(UnsupportedError, match="Megatron Core has no such layer"):
        prepare(parse_recipe(raw(tmp_path / "run", model=model)))
    assert not (tmp_path / "run").exists()


def test_recomputed_stages_keep_no_positions_of_packed_rows(tmp_path: Path) -> None:
    """Ministral 3 scales queries by position; a recomputed layer reads those of the last micro-batch."""
    model = {"path": str(make("ministral3", tmp_path / "hf"))}
    chats = tmp_path / "chat.jsonl"
    chats.write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n')
    data = {"kind": "chat", "path": str(chats), "length": 32}
    sections = {"model": model, "data": data, "parallel": {"pp": 2}}
    for recompute, refused in (("full", True), ("none", False)):
        recipe = parse_recipe(raw(tmp_path / "run", **sections, train={"recompute": recompute}))
        if refused:
            with pytest.raises(UnsupportedError, match="scaled by position"):
                prepare(recipe, dry=True)
        else:
            prepare(recipe, dry=True)


@pytest.mark.parametrize(("family", "fused"), [("gpt_oss", False), ("qwen3_moe", True), ("qwen2", True)])
def test_dropout_is_fused_but_for_experts_with_biases(family: str, fused: bool, tmp_path: Path) -> None:
    """`TEGroupedMLP` of Megatron Core 0.16.1 asserts that both do not come together."""
    config = blueprint(parse_recipe(raw(tmp_path, model={"path": str(make(family, tmp_path / "hf"))}))).config
    assert gpu_config(config)["bias_dropout_fusion"] is fused


def test_rotary_constants_without_a_field_are_set(tmp_path: Path) -> None:
    """Llama 4 scales rotary frequencies with a factor that Megatron Core fixes at another value."""
    source = make("llama4_scout", tmp_path / "hf")
    recipe = parse_recipe(raw(tmp_path / "run", model={"path": str(source)}))
    plan = blueprint(recipe)
    with megatron_on_cpu(), process_group():
        (model,) = build(recipe, plan, ALONE)
        found = model.rotary_pos_emb.inv_freq.clone()  # type: ignore[union-attr,operator]
        own = type(model.rotary_pos_emb)(  # what Megatron Core would compute
            kv_channels=int(str(plan.config["kv_channels"])),
            rotary_percent=1.0,
            rotary_base=500_000,
            rope_scaling=True,
            use_cpu_initialization=True,
        ).inv_freq
    assert torch.allclose(found, transformers_frequencies(source), rtol=1e-6)
    assert not torch.allclose(found, own, rtol=1e-3)


def test_experts_under_tensor_parallelism_need_sequence_parallelism(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Megatron Core ends such a run in its first step."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    for family, shared, refused in (("qwen3_moe", False, True), ("qwen3_moe", True, False), ("qwen3", False, False)):
        axes = {"tp": 2, "sequence_parallel": shared}
        sections = {"model": {"path": str(make(family, tmp_path / family))}, "parallel": axes}
        recipe = parse_recipe(raw(tmp_path / "run", **sections))
        if refused:
            with pytest.raises(DeviceError, match="sequence parallelism"):
                prepare(recipe)
        else:
            prepare(recipe)
