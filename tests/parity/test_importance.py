"""Importance measured a layer at a time is what hooks on the whole model of Transformers see."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _masks import whole

import mbx
from converters.errors import UsageError
from fixtures.make_tiny import make
from mbx.models.transformers.importance import measure_importance
from mbx.tables import table_for
from mbx.train.data.token_rows import token_rows

LLAMA = Path(__file__).resolve().parents[2] / "fixtures" / "tiny" / "llama"


def seen_by_hooks(model: Any, ids: torch.Tensor) -> dict[str, Any]:
    """Means over all tokens, by modules named by hand; experts' channels by their definition."""
    config, tokens = model.config, ids.numel()
    out: dict[str, Any] = {
        "layers": {},
        "hidden": torch.zeros(config.hidden_size),
        "ffn": {},
        "heads": {},
        "experts": {},
    }
    out["expert_ffn"] = {}

    def normed(module: Any, given: Any, output: torch.Tensor) -> None:
        out["hidden"] += output.abs().sum((0, 1)) / tokens

    for name, module in model.named_modules():
        if name.endswith(("layernorm", "model.norm")):
            module.register_forward_hook(normed)
    for number, layer in enumerate(model.model.layers):

        def heads(module: Any, given: Any, number: int = number) -> None:
            split = given[0].unflatten(-1, (config.num_attention_heads, -1))
            out["heads"][number] = split.pow(2).sum(-1).sqrt().sum((0, 1)) / tokens

        def channels(module: Any, given: Any, number: int = number) -> None:
            out["ffn"][number] = given[0].abs().sum((0, 1)) / tokens

        def turned(module: Any, given: Any, output: torch.Tensor, number: int = number) -> None:
            cosine = (given[0] * output).sum(-1) / (given[0].norm(dim=-1) * output.norm(dim=-1))
            out["layers"][number] = float((1 - cosine).sum() / tokens)

        def experts(module: Any, given: Any, number: int = number) -> None:
            states, chosen, weights = given
            out["experts"][number] = torch.zeros(config.num_experts)
            for expert in range(config.num_experts):
                there = chosen == expert
                out["experts"][number][expert] = (weights * there).sum() / tokens
                gate, up = (states[there.any(-1)] @ module.gate_up_proj[expert].T).chunk(2, -1)
                inner = torch.nn.functional.silu(gate) * up
                out["expert_ffn"][number, expert] = inner.abs().sum(0) / tokens

        layer.register_forward_hook(turned)
        layer.self_attn.o_proj.register_forward_pre_hook(heads)
        if hasattr(layer.mlp, "experts"):
            layer.mlp.experts.register_forward_pre_hook(experts)
        else:
            layer.mlp.down_proj.register_forward_pre_hook(channels)
    with torch.no_grad():
        model(ids, use_cache=False)
    return out


def close(found: np.ndarray, wanted: torch.Tensor) -> bool:
    return bool(np.allclose(found, wanted.numpy(), rtol=1e-4, atol=1e-6)) and float(wanted.sum()) > 0


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_streamed_is_whole(tmp_path: Path, name: str) -> None:
    folder = LLAMA if name == "llama" else make(name, tmp_path / "model")
    config = json.loads((folder / "config.json").read_bytes())
    table = table_for(config, None)
    ids = torch.randint(0, config["vocab_size"], (5, 24), generator=torch.Generator().manual_seed(0))
    done: list[int] = []
    fields = table.config.to_mcore(config)
    found = measure_importance(folder, table, fields, ids, rows_at_once=2, progress=done.append)
    wanted = seen_by_hooks(whole(folder), ids)
    assert done == [1] * config["num_hidden_layers"]
    assert found.layers is not None
    assert found.layers == pytest.approx(list(wanted["layers"].values()), rel=1e-4)
    assert close(found.widths["hidden_size"][None, None], wanted["hidden"])
    mlp = {"ffn_hidden_size": "ffn"} if name == "llama" else {"num_moe_experts": "experts"}
    for width, key in {**mlp, "num_attention_heads": "heads"}.items():
        assert found.widths[width].keys() == {(layer, None) for layer in wanted[key]}
        assert all(close(found.widths[width][layer, None], own) for layer, own in wanted[key].items())
    if name == "qwen3_moe":
        channels = found.widths["moe_ffn_hidden_size"]
        assert channels.keys() == wanted["expert_ffn"].keys()
        assert all(np.allclose(channels[at], own, rtol=1e-4, atol=1e-7) for at, own in wanted["expert_ffn"].items())


def test_from_a_file_of_data_to_a_pruned_model(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": f"the {n} quick brown foxes jump over it"}) + "\n" for n in range(40)))
    ids = token_rows(LLAMA, str(data), 4, 16)
    assert ids.shape == (4, 16)
    found = mbx.importance(LLAMA, str(data), tmp_path / "importance.json", samples=4, length=16)
    assert found.layers is not None
    said = json.loads((tmp_path / "importance.json").read_bytes())
    assert said["measured"] == {"source": "llama", "data": "data.jsonl", "rows": 4, "tokens": 64}
    mbx.prune(LLAMA, tmp_path / "pruned", mbx.Pruning(keep_layers=2, ffn=48), by=tmp_path / "importance.json")
    best = sorted(np.argsort(-found.layers)[:2].tolist())
    left, right = mbx.open(LLAMA), mbx.open(tmp_path / "pruned")
    for new, old in enumerate(best):
        norm = "model.layers.{}.input_layernorm.weight"
        assert (right.read(norm.format(new)) == left.read(norm.format(old))).all()
        stay = np.sort(np.argsort(-np.float32([f"{s:.6g}" for s in found.widths["ffn_hidden_size"][old, None]]))[:48])
        down = "model.layers.{}.mlp.down_proj.weight"
        assert (right.read(down.format(new)) == left.read(down.format(old))[:, stay]).all()


def test_too_little_data_is_said(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "few"}\n')
    with pytest.raises(UsageError, match="less than a row"):
        mbx.importance(LLAMA, str(data))
