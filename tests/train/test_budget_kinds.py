"""Models whose layers are of two kinds: each kind is counted by its own heads, and each stage by its own layers."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path

import pytest
from _trainings import raw

from fixtures.index import load_config, load_index
from fixtures.make_tiny import make
from mbx.models.megatron.config import WINDOWED_FIELDS
from mbx.train.budget.counts import count
from mbx.train.budget.predict import stages
from mbx.train.budget.shape import shape_of
from mbx.train.model.blueprint import blueprint
from mbx.train.recipe.parse import parse_recipe


@pytest.mark.parametrize("how", [{}, {"train": {"recompute": "full"}}, {"train": {"recompute": "selective"}}])
@pytest.mark.parametrize("adapted", [{}, {"rank": 4, "dora": True}])
def test_two_kinds_with_the_same_heads_are_one_kind(
    how: dict[str, dict[str, object]], adapted: dict[str, object], tmp_path: Path
) -> None:
    folder = str(make("gemma3_text", tmp_path / "model"))
    recipe = parse_recipe(raw(tmp_path / "run", model={"path": folder}, parallel={"pp": 2}, lora=adapted, **how))
    plan = blueprint(recipe)
    same = {f"windowed_{name}": plan.config[name] for name in WINDOWED_FIELDS if plan.config.get(name) is not None}
    assert len(same) >= 3 and plan.config["window_attn_skip_freq"]
    twice = dataclasses.replace(plan, config={**plan.config, **same})
    assert stages(recipe, twice, 1) == stages(recipe, plan, 1)
    other = dataclasses.replace(plan, config={**plan.config, **same, "windowed_kv_channels": 32})
    assert stages(recipe, other, 1) != stages(recipe, plan, 1)


def test_each_stage_counts_its_own_kinds(tmp_path: Path) -> None:
    """Two full layers on the first stage, two windowed ones with more key heads on the second."""
    folder = str(make("mimo_v2_flash", tmp_path / "model"))
    recipe = parse_recipe(raw(tmp_path / "run", model={"path": folder}, parallel={"pp": 2}))
    plan = blueprint(recipe)
    config = {**plan.config, "window_attn_skip_freq": [0, 0, 1, 1], "moe_layer_freq": [0, 0, 0, 0]}
    plan = dataclasses.replace(plan, config=config)
    full, windowed = (layer.heads for layer in shape_of(config).layers[1:3])
    assert windowed.groups > full.groups and windowed.sinks and not full.sinks
    first, second = (count(recipe, plan, stage) for stage in (0, 1))
    hidden = shape_of(config).hidden
    assert second.linears - first.linears == 2 * (windowed.groups - full.groups) * (full.width + full.value) * hidden
    assert second.others - first.others == 2 * windowed.count + hidden, "sinks, and the last norm"
    one = dataclasses.replace(recipe, parallel=dataclasses.replace(recipe.parallel, pp=1))
    assert count(one, plan, 0).base == first.base + second.base


@pytest.mark.parametrize("model", ["MiMo-V2-Flash", "gemma-4-31B", "gemma-4-26B-A4B", "Step-3.5-Flash"])
def test_counts_of_two_kinds_are_the_published_ones(model: str, tmp_path: Path) -> None:
    """Those of the model's own text tensors, with rows that Megatron Core stores more often than they are published:
    values that are keys (Gemma 4), a gate for each channel of a head (Step)."""
    config = load_config(model)
    (tmp_path / "config.json").write_text(json.dumps(config))
    recipe = parse_recipe(raw(tmp_path / "run", model={"path": str(tmp_path)}))
    plan = blueprint(recipe)
    shape = shape_of(plan.config)
    published = 0
    for name, (_, size) in load_index(model)[1].items():
        number = re.search(r"layers\.(\d+)\.", name)
        ahead = ".mtp." in name or (number is not None and int(number[1]) >= len(shape.layers))
        beside = re.search(r"vision|audio|embed_vision|multi_modal|_scale_inv$|_bias$|layer_scalar$", name)
        if not ahead and (not beside or name.endswith("attention_sink_bias")):
            published += math.prod(size)
    twice = sum(
        layer.heads.v * shape.hidden
        for layer in shape.layers
        if plan.config.get("attention_k_eq_v") and not plan.config["window_attn_skip_freq"][layer.index]  # type: ignore[index, call-overload]
    )
    gates = sum((layer.heads.q - layer.heads.count) * shape.hidden for layer in shape.layers if shape.output_gate)
    assert count(recipe, plan, 0).base == published + twice + gates
