"""A release of Megatron Core is plain data: it says what the installed package does, and code follows what it says."""

from __future__ import annotations

import inspect
from dataclasses import fields, replace

import pytest

from converters.mcore.keys import canonical_names
from converters.mcore.local import extra_states, parse_local, spell_local
from converters.mcore.releases import CURRENT, PREDICTION_LAYERS, RELEASES, FusedNorm
from converters.mcore.torch_dist import extra_states_of, stacks_layers
from converters.rows.isos.rope import LLAMA3_FIXED

HEAD = "mtp.layers.1.transformer_layer.self_attention.linear_proj.weight"
#: A release that differs from the current one in every fact that a test below looks at.
OTHER = replace(
    CURRENT,
    version="of a test",
    plain_prediction_layer="mtp_model_layer",
    fused_norms=(FusedNorm("input_layernorm.", "mlp.router"),),
    te_linears=frozenset({"linear_qkv"}),
    torch_norms=("pre_mlp_layernorm",),
    head_core_state=False,
    output_state=frozenset({"gpt"}),
    stacked_kinds=frozenset({"hybrid"}),
    layer_patterns=("window_size",),
)


def test_the_installed_package_is_what_its_release_says() -> None:
    from megatron.core import __version__
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionLayerSubmodules
    from megatron.core.transformer.transformer_block import TransformerBlock
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    release = next(one for one in RELEASES if __version__.startswith(f"{one.version}."))
    inner = {field.name for field in fields(MultiTokenPredictionLayerSubmodules)} & PREDICTION_LAYERS
    assert inner == {release.plain_prediction_layer}
    assert f"self.{release.final_norm['gpt'].rpartition('.')[2]}" in inspect.getsource(TransformerBlock)
    defaults = {field.name: field.default for field in fields(MLATransformerConfig)}
    defaults |= {f"model.{name}": one.default for name, one in inspect.signature(GPTModel).parameters.items()}
    assert {name: defaults[name] for name in release.defaults} == release.defaults
    scaling = inspect.signature(RotaryEmbedding._apply_scaling).parameters
    assert {name: scaling[name].default for name in LLAMA3_FIXED} == LLAMA3_FIXED


@pytest.mark.parametrize("name", sorted(PREDICTION_LAYERS))
@pytest.mark.parametrize("rest", ["self_attention.linear_qkv.weight", "mlp.experts.linear_fc1.weight3"])
def test_a_rank_s_name_of_a_prediction_layer_becomes_the_key_s_whoever_wrote_it(name: str, rest: str) -> None:
    found = parse_local(f"mtp.layers.0.{name}.{rest}")
    assert found.param.startswith("transformer_layer.")
    assert spell_local(found.param, found.expert, "transformer_engine") == f"transformer_layer.{rest}"
    assert spell_local(found.param, found.expert, "transformer_engine", OTHER) == f"mtp_model_layer.{rest}"


def test_a_hybrid_head_keeps_its_name() -> None:
    param = "mtp_model_layer.layers.0.self_attention.linear_qkv.weight"
    assert parse_local(f"mtp.layers.0.{param}").param == param
    assert spell_local(param, None, "transformer_engine", CURRENT) == param


def test_names_of_norms_follow_the_release() -> None:
    key = "decoder.layers.3.input_layernorm.weight"
    keys = (key, "decoder.layers.3.mlp.router.weight", "decoder.layers.3.self_attention.linear_qkv.weight")
    assert canonical_names(keys)[key] == "decoder.layers.3.self_attention.linear_qkv.layer_norm_weight"
    assert canonical_names(keys, OTHER)[key] == "decoder.layers.3.mlp.router.layer_norm_weight"
    assert spell_local("mlp.router.layer_norm_weight", None, "local", OTHER) == "input_layernorm.weight"


def test_states_follow_the_release() -> None:
    assert len(extra_states_of(HEAD, (), (), "gpt")) == 2
    assert extra_states_of(HEAD, (), (), "gpt", release=OTHER) == ()
    output = "output_layer.weight"
    assert [bool(extra_states_of(output, (), (), kind)) for kind in ("gpt", "hybrid")] == [False, True]
    assert [bool(extra_states_of(output, (), (), kind, release=OTHER)) for kind in ("gpt", "hybrid")] == [
        True,
        False,
    ]
    names = ["self_attention.linear_qkv.weight", "mlp.linear_fc1.weight", "pre_mlp_layernorm.weight"]
    assert extra_states(names, "transformer_engine", OTHER) == {"self_attention.linear_qkv._extra_state": True}


def test_stacking_follows_the_release() -> None:
    mixed = {"moe_layer_freq": [0, 1], "window_size": 0}
    assert [stacks_layers(kind, mixed) for kind in ("gpt", "hybrid")] == [False, False]
    assert [stacks_layers(kind, mixed, OTHER) for kind in ("gpt", "hybrid")] == [False, True]
