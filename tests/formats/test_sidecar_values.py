"""Sidecars edited by hand: one clear error that names the field, whatever reads it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from converters.errors import UsageError
from converters.mcore.megatron_args import config_of_args
from fixtures.make_tiny import make
from mbx.run.job import Job, Options, plan_hf_to_mcore, plan_mcore_to_hf, run
from mbx.run.reshard import plan_mcore_to_mcore


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An iteration of a mixture of experts that says what it is in run_config.yaml and args alone."""
    work = tmp_path_factory.mktemp("sidecars")
    run(plan_hf_to_mcore(make("qwen3_moe", work / "hf"), work / "mcore", Options(sync=False)))
    shutil.rmtree(work / "mcore" / "iter_0000000" / "hf")
    return work / "mcore" / "iter_0000000"


@pytest.mark.parametrize("plan", [plan_mcore_to_hf, plan_mcore_to_mcore])
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_layers", 10**30),
        ("num_layers", "4"),
        ("vocab_size", -1),
        ("num_moe_experts", 10**9),
        ("moe_layer_freq", []),
        ("moe_layer_freq", "x"),
        ("moe_layer_freq", float("nan")),
        ("moe_layer_freq", 0),
        ("window_attn_skip_freq", 0),
        ("window_size", []),
        ("gated_linear_unit", {"a": 1}),
        ("rotary_base", {}),
        ("seq_length", {"_target_": "os.system", "_args_": [{}]}),
    ],
)
def test_a_field_that_no_config_has_is_refused_by_name(
    alone: Path, tmp_path: Path, plan: Callable[..., Job], field: str, value: object
) -> None:
    path = alone / "run_config.yaml"
    text = path.read_text()
    document = yaml.safe_load(text)
    assert plan(alone, tmp_path / "fits", Options()).plan.drafts
    document["model"][field] = value
    path.write_text(yaml.safe_dump(document))
    try:
        with pytest.raises(UsageError, match=rf"run_config\.yaml: `(model\.)?{field}` is"):
            plan(alone, tmp_path / "target", Options())
    finally:
        path.write_text(text)


def test_args_are_looked_at_too() -> None:
    plain = {"num_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 100, "window_size": (127, 0)}
    assert config_of_args(plain)["window_size"] == [127, 0]
    for field, value in (("num_layers", 10**30), ("hidden_size", 32.5), ("vocab_size", True), ("window_size", ())):
        with pytest.raises(UsageError, match=f"args: `(model.)?{field}` is"):
            config_of_args({**plain, field: value})


def test_what_megatron_lm_fills_in_or_leaves_to_its_config_says_no_other_model() -> None:
    """Its `rope_type` is None unless asked for, the class then takes YaRN; a head's size is filled in for MLA too."""
    latent = {"num_layers": 4, "hidden_size": 32, "num_attention_heads": 8, "vocab_size": 100, "kv_channels": 4}
    config = config_of_args({**latent, "multi_latent_attention": True, "rope_type": None})
    assert config["rope_type"] == "yarn" and config["beta_fast"] == 32.0 and "kv_channels" not in config
    assert config_of_args({**latent, "multi_latent_attention": True, "rope_type": "rope"})["rope_type"] == "rope"
    assert config_of_args(latent)["kv_channels"] == 4
