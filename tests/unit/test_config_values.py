"""Configs edited by hand: a value that says nothing, or that would be dropped unseen, is refused and named."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path

import pytest

from converters.errors import CoverageError, UsageError
from converters.mcore.layout import Layout
from converters.planning.importer import plan_import
from converters.rows.config_spelling import canonical
from converters.rows.expr import Value
from converters.rows.table import Table
from fixtures.index import load_config, load_index
from fixtures.make_tiny import tiny_config
from mbx.tables import shipped, table_for
from tests.tables._scaffold import stored

FIXTURES = Path(__file__).parents[2] / "fixtures"
MODELS = {
    "gemma3_text": "gemma-3-1b-pt",
    "minimax_m2": "MiniMax-M2",
    "gpt_oss": "gpt-oss-20b",
    "qwen3_moe": "Qwen3-30B-A3B",
}
NAN = float("nan")
SCALED = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA: dict[str, Value] = json.loads((FIXTURES / "tiny" / "llama" / "config.json").read_text())


@pytest.fixture(scope="module")
def llama() -> Table:
    return shipped("llama")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rms_norm_eps", NAN),
        ("rms_norm_eps", True),
        ("rms_norm_eps", [1e-5]),
        ("rope_theta", {"a": 1}),
        ("rope_theta", float("inf")),
        ("attention_dropout", []),
        ("tie_word_embeddings", 0),
        ("tie_word_embeddings", {}),
        ("hidden_size", None),
        ("intermediate_size", None),
        ("vocab_size", None),
        ("num_hidden_layers", 10**30),
        ("rope_scaling", {**SCALED, "factor": None}),
        ("rope_scaling", {**SCALED, "factor": "8"}),
        ("rope_scaling", {**SCALED, "factor": NAN}),
        ("rope_scaling", {**SCALED, "attention_factor": 2.0}),
        ("rope_scaling", {"rope_type": "linear"}),
        ("rope_scaling", {"factor": 8.0}),
        ("rope_scaling", {"rope_scaling": SCALED}),
        ("rope_parameters", {"factor": 8.0, "rope_theta": 500000.0}),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused(llama: Table, key: str, value: Value) -> None:
    with pytest.raises(UsageError, match=key if "rope" not in key else "rope"):
        llama.config.to_mcore({**LLAMA, "rope_scaling": None, key: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rms_norm_eps", 1),
        ("attention_dropout", 0),
        ("rope_theta", 500000),
        ("max_position_embeddings", None),
        ("rope_scaling", {}),
        ("rope_scaling", {"type": "linear", "factor": 2}),
        ("rope_scaling", {**SCALED, "original_max_position_embeddings": 8192}),
        ("rope_parameters", {"rope_theta": 500000.0, "rope_type": "default", "mrope_section": [1, 2]}),
    ],
)
def test_other_spellings_of_a_value_are_not(llama: Table, key: str, value: Value) -> None:
    assert llama.config.to_mcore({**LLAMA, "rope_scaling": None, key: value})


def test_the_older_word_for_the_kind_counts_in_rope_parameters_too(llama: Table) -> None:
    older = {key: value for key, value in SCALED.items() if key != "rope_type"} | {"type": "llama3"}
    config = {key: value for key, value in LLAMA.items() if key not in ("rope_scaling", "rope_theta")}
    read = llama.config.to_mcore({**config, "rope_parameters": {**older, "rope_theta": 9.0}})
    assert read["model.rope_scaling"] is True and read["model.rotary_base"] == 9.0


@pytest.mark.parametrize(
    ("nested", "words"),
    [
        ({"sliding_attention": {"rope_type": "linear", "factor": 8.0}}, "sliding_attention.factor"),
        ({"chunked_attention": {"rope_theta": 1e4}}, "`chunked_attention`"),
    ],
)
def test_what_only_some_layers_have_is_not_dropped(nested: Mapping[str, Value], words: str) -> None:
    full: dict[str, Value] = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
    local: dict[str, Value] = {"rope_type": "default", "rope_theta": 1e4}
    read = canonical({"rope_parameters": {"full_attention": full, "sliding_attention": local}})
    assert read["rope_scaling"] == {"rope_type": "linear", "factor": 8.0} and read["rope_local_base_freq"] == 1e4
    with pytest.raises(UsageError, match=words):
        canonical({"rope_parameters": {"full_attention": full, "sliding_attention": local, **nested}})


def test_a_share_that_windowed_layers_alone_turn_is_a_key_which_tables_know_or_refuse(llama: Table) -> None:
    kinds = {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"partial_rotary_factor": 0.5}}
    config = {key: value for key, value in LLAMA.items() if key not in ("rope_scaling", "rope_theta")}
    assert canonical({**config, "rope_parameters": kinds})["partial_rotary_factor_local"] == 0.5
    with pytest.raises(CoverageError, match="partial_rotary_factor_local"):
        llama.config.to_mcore({**config, "rope_parameters": kinds})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_attention_heads", 64),
        ("v_head_dim", 64),
        ("qk_nope_head_dim", 192),
        ("qk_rope_head_dim", 32),
        ("q_lora_rank", 768),
        ("kv_lora_rank", 256),
        ("n_group", "8"),
        ("beta_fast", "x"),
        ("mscale", [1.0]),
        ("first_k_dense_replace", NAN),
        ("n_shared_experts", 1.5),
    ],
)
def test_sizes_of_latent_attention_that_do_not_fit_are_refused(key: str, value: Value) -> None:
    """Its tensors are one column or row op each, which any size fits."""
    config, headers = load_index("DeepSeek-V3")
    plain = {"num_hidden_layers": 4, "num_nextn_predict_layers": 0, "quantization_config": None}
    config = {**config, **plain}
    named = re.compile(r"model\.(?!layers\.)|model\.layers\.[0-3]\.|lm_head").match
    wanted = {name: ("BF16", shape) for name, (_, shape) in headers.items() if named(name) and "scale" not in name}
    table, sources = shipped("deepseek_v3"), stored(wanted)
    assert plan_import(table, config, sources, Layout()).ledger.consumed == len(sources)
    inner = config["rope_scaling"]
    changed = {"rope_scaling": {**inner, key: value}} if key in inner else {key: value}
    with pytest.raises((CoverageError, UsageError), match="the config asks for|expected"):
        plan_import(table, {**config, **changed}, sources, Layout())


@pytest.mark.parametrize(
    ("table", "key", "value"),
    [
        ("gemma3_text", "query_pre_attn_scalar", 0),
        ("gemma3_text", "query_pre_attn_scalar", -1),
        ("minimax_m2", "head_dim", 0),
        ("gpt_oss", "sliding_window", 0),
        ("gpt_oss", "sliding_window", 2.5),
        ("qwen3_moe", "moe_intermediate_size", None),
        ("qwen3_moe", "num_experts_per_tok", None),
        ("qwen3_moe", "decoder_sparse_step", 1.5),
    ],
)
def test_numbers_that_nothing_can_be_made_of_are_refused(table: str, key: str, value: Value) -> None:
    config = load_config(MODELS[table])
    assert shipped(table).config.to_mcore(config)
    with pytest.raises(UsageError, match=key if key != "query_pre_attn_scalar" else "scale"):
        shipped(table).config.to_mcore({**config, key: value})


@pytest.mark.parametrize("name", ["falcon_h1_0_5b", "nemotron_h"])
def test_an_infinite_limit_is_read_in_either_spelling(name: str) -> None:
    """`Infinity`, as Transformers 4 writes it, and the object that Transformers 5 does; a finite one is another."""
    config = {**tiny_config(name), "time_step_limit": [0.0, {"__float__": "Infinity"}]}
    table = table_for(config)
    infinite = json.loads(json.dumps({**config, "time_step_limit": [0.0, math.inf]}))
    assert table.config.to_mcore(infinite) == table.config.to_mcore(config)
    for other in ([0.0, 1e20], [0.0, math.nan], [0.0, -math.inf]):
        with pytest.raises(UsageError, match="time_step_limit"):
            table.config.to_mcore({**config, "time_step_limit": other})
