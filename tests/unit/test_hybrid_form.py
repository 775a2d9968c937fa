"""GPTModel and HybridModel: the same tensors under two sets of keys, and refused where there is one only."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from converters.errors import StorageError, UnsupportedError
from converters.mcore.hybrid_form import (
    from_hybrid,
    gpt_args,
    has_gpt_form,
    hybrid_args,
    hybrid_config,
    pattern_of,
    to_hybrid,
)

PARAMS = (
    *("self_attention.linear_qkv.weight", "self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"),
    *("mlp.linear_fc1.weight", "pre_mlp_layernorm.weight", "mlp.router.weight"),
    "mlp.experts.experts.linear_fc1.weight",
)
LLAMA = {"num_layers": 2, "model.rope_scaling": False, "window_size": None}


@given(st.sampled_from(PARAMS), st.integers(0, 90), st.integers(0, 7))
def test_there_and_back_is_the_single_layer_s_key(param: str, layer: int, expert: int) -> None:
    index = (layer, expert) if ".experts." in param else (layer,)
    key, rest = to_hybrid(f"decoder.layers.{param}", index)
    assert (from_hybrid(key), rest) == (f"decoder.layers.{layer}.{param}", index[1:])
    assert to_hybrid(f"decoder.layers.{layer}.{param}", index[1:]) == (key, rest)
    assert key.split(".")[2] == str(2 * layer + (not param.startswith(("self_attention", "input"))))
    head = f"mtp.layers.1.transformer_layer.{param}"
    assert from_hybrid(to_hybrid(head, index[1:])[0]) == head
    for other in ("embedding.word_embeddings.weight", "decoder.final_layernorm.weight", "mtp.layers.0.enorm.weight"):
        assert from_hybrid(to_hybrid(other, ())[0]) == other


def test_names_are_those_of_megatron_core() -> None:
    assert to_hybrid("decoder.final_layernorm.weight", ())[0] == "decoder.final_norm.weight"
    key, _ = to_hybrid("mtp.layers.0.transformer_layer.mlp.linear_fc2.weight", ())
    assert key == "mtp.layers.0.mtp_model_layer.layers.1.mlp.linear_fc2.weight"


def stored(positions: dict[int, str]) -> list[str]:
    return ["decoder.final_norm.weight", *(f"decoder.layers.{at}.{param}" for at, param in positions.items())]


QKV, FC1, MAMBA = "self_attention.linear_qkv.weight", "mlp.linear_fc1.weight", "mixer.in_proj.weight.z"


@pytest.mark.parametrize(
    ("positions", "has"),
    [
        ({0: QKV, 1: FC1, 2: QKV, 3: FC1}, True),
        ({1: QKV, 2: FC1, 3: QKV, 4: FC1}, False),  # shifted by one
        ({0: FC1, 1: QKV, 2: FC1, 3: QKV}, False),
        ({0: QKV, 1: FC1, 2: QKV}, False),
        ({0: QKV, 1: FC1, 2: FC1, 3: QKV}, False),
        ({0: MAMBA, 1: FC1, 2: QKV, 3: FC1}, False),
        ({}, False),
    ],
)
def test_only_attention_and_mlp_by_turns_is_a_gpt_model(positions: dict[int, str], has: bool) -> None:
    assert has_gpt_form(stored(positions)) is has
    assert not has_gpt_form([key.replace("final_norm", "final_layernorm") for key in stored(positions)])


@pytest.mark.parametrize(
    ("more", "pattern"),
    [
        ({}, "*-*-"),
        ({"num_moe_experts": 4}, "*E*E"),
        ({"num_moe_experts": 4, "moe_layer_freq": [0, 1]}, "*-*E"),
        ({"num_moe_experts": 4, "moe_layer_freq": 2}, "*E*-"),
        ({"mtp_num_layers": 2}, "*-*-/*-/*-"),
    ],
)
def test_the_pattern_and_the_args_say_the_layers(more: dict[str, object], pattern: str) -> None:
    config = {**LLAMA, **more}
    assert pattern_of(config) == pattern
    made = hybrid_config(config)
    assert made["num_layers"] == 4 and made["model.mcore_model"] == "hybrid" and "moe_layer_freq" not in made
    experts = config.get("num_moe_experts")
    back = gpt_args({"num_experts": experts, **hybrid_args(made)})
    assert back["num_layers"] == 2 and not back["is_hybrid_model"] and back["hybrid_layer_pattern"] is None
    if experts:
        marks = [int(kind == "E") for kind in pattern[1::2]]
        assert back["moe_layer_freq"] == (1 if all(marks) else marks)


@pytest.mark.parametrize(
    "field",
    [
        *({"model.rope_scaling": True}, {"window_attn_skip_freq": 2}, {"multi_latent_attention": True}),
        *({"no_rope_freq": [0, 1]}, {"model.scale_embeddings": True}, {"heterogeneous_block_specs": True}),
    ],
)
def test_what_a_hybrid_model_has_no_field_for_is_refused(field: dict[str, object]) -> None:
    with pytest.raises(UnsupportedError, match=next(iter(field))):
        pattern_of({**LLAMA, **field})


def test_a_head_under_the_other_name_and_a_shifted_pattern_are_errors() -> None:
    with pytest.raises(StorageError, match=r"mtp_model_layer\.layers\.N"):
        from_hybrid("mtp.layers.0.transformer_layer.mlp.linear_fc1.weight")
    for pattern in ("-*-*", "*-*", "M*-*", "**--"):
        with pytest.raises(StorageError, match="by turns"):
            gpt_args({"hybrid_layer_pattern": pattern})
    with pytest.raises(UnsupportedError, match="no place"):
        to_hybrid("decoder.layers.cross_attention.linear_q.weight", (0,))
