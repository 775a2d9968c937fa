"""Registered config conversions: `to_hf(to_mcore(x)) == x` for all they accept, and a refusal of the rest."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from converters.errors import UsageError
from converters.rows.expr import Value
from converters.rows.isos import FIELDS, LLAMA3_FIXED, VALUE

FACTORS = st.floats(1.0, 64.0)
LENGTHS = st.integers(16, 1 << 20)
FLAGS = st.lists(st.sampled_from([0, 1]), min_size=1, max_size=40)
KINDS = st.lists(st.sampled_from(["sliding_attention", "full_attention"]), min_size=1, max_size=40)


def optional(**fields: st.SearchStrategy[Value]) -> st.SearchStrategy[dict[str, Value]]:
    return st.fixed_dictionaries({}, optional=dict(fields))


PLAIN = st.one_of(
    st.none(),
    st.builds(
        lambda kind, factor: {"rope_type": kind, "factor": factor}, st.sampled_from(["linear", "dynamic"]), FACTORS
    ),
    FACTORS.map(lambda factor: {"rope_type": "llama3", "factor": factor, **LLAMA3_FIXED}),
)
YARN = st.builds(
    lambda required, extra: {"rope_type": "yarn", **required, **extra},
    st.fixed_dictionaries(
        {
            "factor": FACTORS,
            "original_max_position_embeddings": LENGTHS,
            "beta_fast": FACTORS,
            "beta_slow": FACTORS,
        }
    ),
    optional(mscale=FACTORS, mscale_all_dim=FACTORS, truncate=st.just(False), llama_4_scaling_beta=FACTORS),
)
LONGROPE = st.fixed_dictionaries(
    {"rope_type": st.just("longrope"), "short_factor": st.lists(FACTORS), "long_factor": st.lists(FACTORS)}
)

MLA_YARN = st.fixed_dictionaries(
    {
        "rope_type": st.just("yarn"),
        "factor": FACTORS,
        "original_max_position_embeddings": LENGTHS,
        "beta_fast": FACTORS,
        "beta_slow": FACTORS,
        "mscale": FACTORS,
        "mscale_all_dim": FACTORS,
    }
)
WIDTHS = st.integers(1, 512)
PATTERNS = st.text("M*-E", min_size=1, max_size=40)
LIMITED = st.integers(1, 8).flatmap(lambda n: st.fixed_dictionaries({"n_group": st.just(n), "topk_group": st.just(1)}))

GROUPS: dict[str, st.SearchStrategy[Mapping[str, Value]]] = {
    "mla_rope": st.fixed_dictionaries({"rope_scaling": st.none() | MLA_YARN}),
    "greedy_groups": st.just({"topk_method": "greedy", "n_group": 1, "topk_group": 1})
    | LIMITED.map(lambda groups: {"topk_method": "group_limited_greedy", **groups}),
    "hybrid": PATTERNS.map(lambda text: {"num_hidden_layers": len(text), "hybrid_override_pattern": text}),
    "rope": st.fixed_dictionaries({"rope_scaling": PLAIN}),
    "yarn": st.fixed_dictionaries({"rope_scaling": PLAIN | YARN}),
    "longrope": st.fixed_dictionaries({"rope_scaling": PLAIN})
    | st.fixed_dictionaries({"rope_scaling": LONGROPE, "original_max_position_embeddings": LENGTHS}),
    "neox_rope": st.fixed_dictionaries({"rotary_emb_base": FACTORS, "rotary_pct": st.floats(0.1, 1.0)}),
    "window": st.fixed_dictionaries({"sliding_window": st.none() | st.integers(1, 1 << 17)}),
    "unrotated_full_layers": st.fixed_dictionaries({"sliding_window": st.integers(1, 1 << 17), "layer_types": KINDS}),
    "dit_heads": st.fixed_dictionaries({"num_attention_heads": WIDTHS, "attention_head_dim": WIDTHS}),
    "wan_patch": st.tuples(WIDTHS, WIDTHS).map(lambda size: {"patch_size": [size[0], size[1], size[1]]}),
    "flux_channels": st.fixed_dictionaries({"in_channels": WIDTHS}),
    "gelu_tanh": st.just({"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}),
}
VALUES: dict[str, st.SearchStrategy[Value]] = {
    "no_rope": FLAGS,
    "sliding_layers": KINDS,
    "not": st.booleans(),
    "rsqrt": st.integers(1, 4096),
    "zero_is_none": st.integers(0, 8),
}


@pytest.mark.parametrize("name", GROUPS)
@given(data=st.data())
def test_groups_come_back(name: str, data: st.DataObject) -> None:
    hf = data.draw(GROUPS[name])
    fields = FIELDS[name].to_mcore(hf)
    assert set(fields) <= set(FIELDS[name].mcore)
    assert FIELDS[name].to_hf(fields) == hf


@pytest.mark.parametrize("name", VALUES)
@given(data=st.data())
def test_values_come_back(name: str, data: st.DataObject) -> None:
    value = data.draw(VALUES[name])
    assert VALUE[name].to_hf(VALUE[name].to_mcore(value, {}), {}) == value


@given(st.lists(st.sampled_from(["dense", "sparse"]), min_size=1, max_size=12))
def test_mlp_layers_come_back_and_their_count_agrees(kinds: list[Value]) -> None:
    hf: dict[str, Value] = {"num_hidden_layers": len(kinds), "mlp_layer_types": kinds}
    back = FIELDS["mlp_layers"].to_hf(FIELDS["mlp_layers"].to_mcore(hf))
    assert back.pop("mlp_layer_types") == kinds
    counted = sorted(map(str, kinds)) == kinds
    assert back == ({"first_k_dense_replace": kinds.count("dense")} if counted else {})
    with pytest.raises(UsageError, match="mlp_layer_types"):
        FIELDS["mlp_layers"].to_mcore({**hf, "mlp_layer_types": ["sparse"] * len(kinds), "first_k_dense_replace": 1})


@given(st.integers(1, 3), st.integers(0, 5), st.integers(-1, 8))
def test_a_range_of_expert_layers_is_found_again(every: int, first: int, last: int) -> None:
    said = {"moe_layer_interval": every, "moe_layer_start_index": first, "moe_layer_end_index": last}
    fields = FIELDS["moe_range"].to_mcore({**said, "num_hidden_layers": 8})
    back = FIELDS["moe_range"].to_hf({**fields, "num_layers": 8})
    assert FIELDS["moe_range"].to_mcore({**back, "num_hidden_layers": 8}) == fields
    with pytest.raises(UsageError, match="equal distances"):
        FIELDS["moe_range"].to_hf({"moe_layer_freq": [0, 1, 1, 0, 1]})


@given(st.integers(1, 30), st.integers(1, 6), st.integers(1, 6))
def test_layers_with_an_indexer_come_back(count: int, every: int, begin: int) -> None:
    kinds = ["shared" if max(layer + 1 - begin, 0) % every else "full" for layer in range(count)]
    said: list[Mapping[str, Value]] = [
        {"indexer_types": kinds},
        {"index_topk_pattern": "".join(kind[0].upper() for kind in kinds)},
        {"index_topk_freq": every, "index_skip_topk_offset": begin},
    ]
    for keys in said:
        fields = FIELDS["indexed_layers"].to_mcore({"num_hidden_layers": count, **keys})
        assert FIELDS["indexed_layers"].to_hf({"num_layers": count, **fields}) == {"indexer_types": kinds}


def test_layers_with_an_indexer_have_one_period() -> None:
    with pytest.raises(UsageError, match="one period"):
        FIELDS["indexed_layers"].to_mcore(
            {"num_hidden_layers": 4, "indexer_types": ["full", "shared", "full", "full"]}
        )


def test_a_mixer_is_as_wide_as_its_heads() -> None:
    """Without the width Transformers takes `mamba_expand` times the hidden size, and refuses another one."""
    said: dict[str, Value] = {"mamba_n_heads": 8, "mamba_d_head": 16}
    assert FIELDS["ssm_width"].to_mcore(said) == FIELDS["ssm_width"].to_mcore({**said, "mamba_d_ssm": 128}) == {}
    assert FIELDS["ssm_width"].to_hf({"mamba_num_heads": 8, "mamba_head_dim": 16}) == {"mamba_d_ssm": 128}
    with pytest.raises(UsageError, match="mamba_d_ssm is 64"):
        FIELDS["ssm_width"].to_mcore({**said, "mamba_d_ssm": 64})


@pytest.mark.parametrize(
    ("said", "windowed", "unrotated"),
    [
        ({"sliding_window": None, "layer_types": ["full_attention"] * 4}, None, None),
        ({"sliding_window": 8, "sliding_window_pattern": "LLG"}, [1, 1, 0, 1], [0, 0, 1, 0]),
        ({}, [1, 1, 1, 0], [0, 0, 0, 1]),
    ],
)
def test_layers_without_a_window_are_not_rotated_where_others_have_one(
    said: Mapping[str, Value], windowed: Value, unrotated: Value
) -> None:
    fields = FIELDS["unrotated_full_layers"].to_mcore({"num_hidden_layers": 4, **said})
    assert (fields["window_attn_skip_freq"], fields["no_rope_freq"]) == (windowed, unrotated)


@pytest.mark.parametrize(
    "said",
    [
        {"layer_types": ["full_attention", "sliding_attention"]},
        {"sliding_window": 8, "max_window_layers": 1},
    ],
)
def test_a_window_is_refused_where_none_is_covered(said: Mapping[str, Value]) -> None:
    with pytest.raises(UsageError, match="covered without windows"):
        FIELDS["full_layers"].to_mcore({"num_hidden_layers": 2, **said})


def test_a_width_of_fluxs_mlp_that_is_not_four_models_is_refused() -> None:
    said: dict[str, Value] = {"num_attention_heads": 3, "attention_head_dim": 8}
    fields = {**FIELDS["dit_heads"].to_mcore(said), **FIELDS["flux_mlp"].to_mcore(said)}
    assert fields["ffn_hidden_size"] == 96 and FIELDS["flux_mlp"].to_hf(fields) == {}
    with pytest.raises(UsageError, match="ffn_hidden_size is 95"):
        FIELDS["flux_mlp"].to_hf({**fields, "ffn_hidden_size": 95})


def test_a_wrong_inverse_would_be_seen() -> None:
    """Negative control: windows that forget the current token do not come back."""
    fields = FIELDS["window"].to_mcore({"sliding_window": 8})
    assert fields == {"window_size": [7, 0]}
    assert FIELDS["window"].to_hf({"window_size": [8, 0]}) != {"sliding_window": 8}


@pytest.mark.parametrize(
    ("name", "hf", "named"),
    [
        ("rope", {"rope_scaling": {"rope_type": "proportional", "beta_fast": 32}}, "proportional"),
        ("rope", {"rope_scaling": "linear"}, "linear"),
        ("yarn", {"rope_scaling": {"rope_type": "yarn"}}, "factor"),
        ("yarn", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "attention_factor": 1.5}}, "attention_factor"),
        ("longrope", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
        ("gelu_tanh", {"hidden_act": "silu"}, "silu"),
        ("wan_patch", {"patch_size": [1, 2, 4]}, "patch_size"),
        ("wan_patch", {"patch_size": 2}, "patch_size"),
        ("flux_channels", {"in_channels": 384, "out_channels": 64}, "384"),
        ("dit_heads", {"num_attention_heads": 24}, "attention_head_dim"),
    ],
)
def test_groups_that_megatron_core_cannot_express_are_refused(name: str, hf: Mapping[str, Value], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        FIELDS[name].to_mcore(hf)


@pytest.mark.parametrize(
    ("name", "value"), [("no_rope", [0, 2]), ("no_rope", 4), ("sliding_layers", ["chunked_attention"]), ("rsqrt", "x")]
)
def test_values_that_megatron_core_cannot_express_are_refused(name: str, value: Value) -> None:
    with pytest.raises(UsageError):
        VALUE[name].to_mcore(value, {})


def test_yarn_without_its_optional_keys_means_the_defaults_of_transformers() -> None:
    fields = FIELDS["yarn"].to_mcore(
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "max_position_embeddings": 9}
    )
    assert fields["yarn_original_max_position_embeddings"] == 9
    assert (fields["yarn_beta_fast"], fields["yarn_beta_slow"]) == (32.0, 1.0)
    assert fields["yarn_correction_range_round_to_int"] is True


def test_layer_patterns_that_a_config_leaves_out() -> None:
    """SmolLM3 rotates three of four layers; Gemma 3 windows five of six."""
    assert VALUE["no_rope"].to_mcore(None, {"num_hidden_layers": 8}) == [0, 0, 0, 1] * 2
    assert VALUE["no_rope"].to_mcore(None, {"num_hidden_layers": 4, "no_rope_layer_interval": 2}) == [0, 1, 0, 1]
    assert VALUE["sliding_layers"].to_mcore(None, {}) == 6
    assert VALUE["sliding_layers"].to_mcore(None, {"sliding_window_pattern": 2}) == 2
    expected = ["sliding_attention", "full_attention"] * 2
    assert VALUE["sliding_layers"].to_hf(2, {"num_layers": 4}) == expected


def test_gemma_reads_the_legacy_name_of_its_activation() -> None:
    for hf in ({"hidden_act": "gelu"}, {"hidden_act": "silu", "hidden_activation": "gelu_pytorch_tanh"}, {}):
        assert FIELDS["gelu_tanh"].to_mcore(hf) == {"activation_func": "gelu_tanh"}


LAYERS = st.integers(1, 24)


@given(LAYERS, st.integers(1, 6), st.data())
def test_expert_layers_come_back_however_they_are_spelt(layers: int, step: int, data: st.DataObject) -> None:
    only = data.draw(st.lists(st.integers(0, layers - 1), unique=True))
    hf = {"num_hidden_layers": layers, "decoder_sparse_step": step, "mlp_only_layers": only}
    fields = FIELDS["moe_layers"].to_mcore(hf)
    back = FIELDS["moe_layers"].to_hf(fields)
    again = FIELDS["moe_layers"].to_mcore({"num_hidden_layers": layers, **back})
    held = [layer for layer in range(layers) if layer not in only and (layer + 1) % step == 0]
    for freq in (fields["moe_layer_freq"], again["moe_layer_freq"]):
        flags = [1] * layers if freq == 1 else freq
        assert isinstance(flags, list) and [layer for layer, flag in enumerate(flags) if flag] == held


@given(LAYERS, st.data())
def test_dense_layers_first_come_back(layers: int, data: st.DataObject) -> None:
    dense = data.draw(st.integers(0, layers))
    flags = VALUE["first_dense"].to_mcore(dense, {"num_hidden_layers": layers})
    assert flags == [0] * dense + [1] * (layers - dense)
    assert VALUE["first_dense"].to_hf(flags, {}) == dense


@given(st.integers(0, 4), st.integers(1, 4096))
def test_shared_experts_come_back(count: int, width: int) -> None:
    together = VALUE["shared_experts"].to_mcore(count, {"moe_intermediate_size": width})
    assert together == (count * width or None)
    assert VALUE["shared_experts"].to_hf(together, {"moe_ffn_hidden_size": width}) == count


@given(st.integers(2, 8), st.integers(1, 5))
def test_linear_layers_come_back_from_either_spelling(period: int, repeats: int) -> None:
    fields = FIELDS["linear_layers"].to_mcore({"full_attention_interval": period})
    back = FIELDS["linear_layers"].to_hf({**fields, "num_layers": period * repeats})
    assert back["full_attention_interval"] == period
    assert FIELDS["linear_layers"].to_mcore(back) == fields
    assert FIELDS["linear_layers"].to_mcore({"layer_types": back["layer_types"]}) == fields


@given(st.integers(1, 64), st.integers(1, 4))
def test_rotary_dims_and_plain_attention_come_back(half: int, layers: int) -> None:
    percent = VALUE["rotary_dim"].to_mcore(half, {"head_dim": 128})
    assert VALUE["rotary_dim"].to_hf(percent, {"kv_channels": 128}) == half
    assert VALUE["no_linear"].to_mcore([1] * layers, {}) is None
    assert VALUE["no_linear"].to_hf(None, {"num_layers": layers}) == [1] * layers


def test_both_spellings_of_a_hybrid_agree() -> None:
    for kinds in (["mamba", "moe", "attention", "mlp"], ["linear_attention", "moe", "full_attention", "mlp"]):
        fields = FIELDS["hybrid"].to_mcore({"layers_block_type": kinds})
        assert fields == {"num_layers": 4, "model.hybrid_override_pattern": "ME*-"}


@pytest.mark.parametrize(
    ("name", "hf", "named"),
    [
        ("mla_rope", {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "llama3"),
        ("mla_rope", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "truncate": False}}, "truncate"),
        ("mla_rope", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "mscale": 0.7}}, "mscale"),
        ("greedy_groups", {"topk_method": "noaux_tc"}, "noaux_tc"),
        ("hybrid", {"hybrid_override_pattern": "M-", "num_hidden_layers": 3}, "num_hidden_layers"),
        ("hybrid", {"layers_block_type": ["conv"]}, "conv"),
        ("linear_layers", {"layer_types": ["full_attention", "linear_attention"]}, "layer_types"),
        ("linear_layers", {}, "full_attention_interval"),
        ("moe_layers", {"decoder_sparse_step": 0}, "decoder_sparse_step"),
    ],
)
def test_expert_and_hybrid_groups_that_have_no_counterpart_are_refused(
    name: str, hf: Mapping[str, Value], named: str
) -> None:
    with pytest.raises(UsageError, match=named):
        FIELDS[name].to_mcore(hf)


def test_dense_layers_in_between_are_no_first_dense_layers() -> None:
    with pytest.raises(UsageError):
        VALUE["first_dense"].to_hf([1, 0, 1], {})
    with pytest.raises(UsageError):
        VALUE["no_linear"].to_mcore([1, 0], {})
