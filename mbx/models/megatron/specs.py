"""Layer specs: Transformer Engine's as Megatron Core has them, and a local one that spells the same names.

The local spec of megatron-core 0.16.1 renames its norms to Transformer Engine's fused names for dense attention
layers only. Checkpoints carry the Transformer Engine names, so the key maps here are per layer kind.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING

from converters.errors import LayoutError, UnsupportedError
from mbx.models.megatron.config import mcore_version

if TYPE_CHECKING:
    from torch import nn

    from mbx.models.megatron.core.config import TransformerConfig
    from mbx.models.megatron.core.layers import (
        ModuleSpec,
        MultiTokenPredictionBlockSubmodules,
        TransformerBlockSubmodules,
    )
    from mbx.models.megatron.gemma4 import LayerInputs
    from mbx.models.megatron.layer_kinds import Kinds


def gpt_block_spec(
    config: TransformerConfig,
    *,
    use_te: bool,
    parts: FamilyParts | None = None,
    vp_stage: int | None = None,
) -> TransformerBlockSubmodules:
    """Layer specs of this pipeline rank's decoder, dense and expert layers placed by `moe_layer_freq`.

    `parts` are what Megatron Core has not. `vp_stage` is the model chunk where the pipeline is interleaved.
    """
    from mbx.models.megatron.core import layers

    if config.heterogeneous_block_specs:
        block = _heterogeneous_block_spec(config, use_te=use_te, vp_stage=vp_stage)
    elif config.experimental_attention_variant is not None:
        if config.experimental_attention_variant == "dsa":
            _check_choices(config, vp_stage)
        elif not use_te:
            raise UnsupportedError(
                f"{mcore_version()} builds experimental_attention_variant={config.experimental_attention_variant!r} "
                "with Transformer Engine only",
                hint="run this leg on a GPU with Transformer Engine installed",
            )
        if use_te:
            block = layers.get_transformer_block_with_experimental_attention_variant_spec(config, vp_stage=vp_stage)
        else:
            block = _local_block_spec(config, vp_stage)
    elif use_te:
        block = layers.get_gpt_decoder_block_spec(
            config,
            use_transformer_engine=True,
            normalization=config.normalization,
            qk_l2_norm=config.qk_l2_norm,
            vp_stage=vp_stage,
        )
    else:
        block = _local_block_spec(config, vp_stage)
    block.layer_specs = [deepcopy(layer) for layer in block.layer_specs]  # mcore repeats one spec object
    if config.multi_latent_attention and config.q_lora_rank is None:
        from mbx.models.megatron.family_layers import project_queries_at_once

        for layer in block.layer_specs:
            project_queries_at_once(layer)
    if config.qk_l2_norm and config.no_rope_freq:
        _norm_rotated_layers_only(config, block, vp_stage)
    if parts is not None and parts != FamilyParts():
        for layer in block.layer_specs:
            _put_parts(layer, parts, block.layer_norm)
        if parts.one_layernorm:
            from mbx.models.megatron.parallel_layers import WeightedLayerNorm

            block.layer_norm = WeightedLayerNorm
    return block


@dataclass(frozen=True, slots=True)
class FamilyParts:
    """What families build into a layer that Megatron Core has not (`family_layers`); this, if nothing is said.

    With `parallel_residual` the MLP reads what attention reads, with `one_layernorm` from the same norm, and no norm
    has a bias.
    `post_layernorms` stand behind attention and MLP beside those before, or `post_layernorms_only` there;
    `qk_layernorm_over_heads` spans all heads, `kinds` set windowed layers apart, `layer_inputs` are Gemma 4's, and
    `softcapped` attention shows its scores.
    """

    parallel_residual: bool = False
    one_layernorm: bool = False
    post_layernorms: bool = False
    post_layernorms_only: bool = False
    qk_layernorm_over_heads: bool = False
    kinds: Kinds | None = None
    layer_inputs: LayerInputs | None = None
    softcapped: bool = False


def _put_parts(layer: ModuleSpec, parts: FamilyParts, norm: Callable[..., nn.Module]) -> None:
    from mbx.models.megatron import family_layers as own
    from mbx.models.megatron import parallel_layers
    from mbx.models.megatron.core.layers import DotProductAttention, holds_experts
    from mbx.models.megatron.layer_kinds import Kinds, attend_by_kind

    if parts.softcapped:
        layer.submodules.self_attention.submodules.core_attention = DotProductAttention
    if parts.qk_layernorm_over_heads:
        own.norm_over_heads(layer)
    if parts.post_layernorms_only:
        own.drop_pre_layernorms(layer)
    if parts.post_layernorms and parts.layer_inputs is not None and holds_experts(layer):
        own.add_norm_behind_attention(layer, norm)  # Gemma 4's experts have norms of their own behind them
    elif parts.post_layernorms or parts.post_layernorms_only:
        own.add_post_layernorms(layer, norm)
    if parts.parallel_residual:
        parallel_layers.read_the_same(layer, one_norm=parts.one_layernorm)
    if parts.layer_inputs is not None:
        from mbx.models.megatron.gemma4 import be_gemma4

        be_gemma4(layer, parts.kinds or Kinds(), parts.layer_inputs)
    elif parts.kinds is not None:
        attend_by_kind(layer, parts.kinds)


def _check_choices(config: TransformerConfig, vp_stage: int | None) -> None:
    """LayoutError, on every rank, where a stage begins with a layer that takes the tokens which another chose."""
    from mbx.models.megatron.core.layers import get_transformer_layer_offset
    from mbx.models.megatron.core.sparse import is_dsa_skip_topk_layer, source_dsa_compute_layer

    pattern = (config.dsa_indexer_skip_topk_offset, config.dsa_indexer_topk_freq)
    for rank in range(config.pipeline_model_parallel_size):
        number = get_transformer_layer_offset(config, vp_stage=vp_stage, pp_rank=rank) + 1
        if is_dsa_skip_topk_layer(number, *pattern):
            raise LayoutError(
                f"a pipeline stage begins with layer {number - 1}, which takes the tokens that layer "
                f"{source_dsa_compute_layer(number, *pattern) - 1} chose (counted from 0)",
                hint="every stage has to begin with a layer that has an indexer",
            )


def _norm_rotated_layers_only(
    config: TransformerConfig, block: TransformerBlockSubmodules, vp_stage: int | None
) -> None:
    """Llama 4 norms queries and keys where it rotates them; `qk_l2_norm` alone does so in every layer."""
    from mbx.models.megatron.core.layers import IdentityOp, get_transformer_layer_offset

    first = get_transformer_layer_offset(config, vp_stage=vp_stage)
    flags = config.no_rope_freq[first : first + len(block.layer_specs)]
    for layer, is_unrotated in zip(block.layer_specs, flags, strict=True):
        if is_unrotated:
            attention = layer.submodules.self_attention.submodules
            attention.q_layernorm = attention.k_layernorm = IdentityOp


def mtp_block_spec(
    config: TransformerConfig, block: TransformerBlockSubmodules, *, use_te: bool, vp_stage: int | None = None
) -> MultiTokenPredictionBlockSubmodules | None:
    """Specs of the multi-token-prediction heads on this rank, None where there are none.

    Each head repeats the decoder's last layer kind, as mcore's own helper does.
    """
    from mbx.models.megatron.core.layers import get_gpt_mtp_block_spec

    if not config.mtp_num_layers:
        return None
    if isinstance(config.window_attn_skip_freq, list) or isinstance(config.no_rope_freq, list):
        raise UnsupportedError(
            f"{mcore_version()} lists which layers are windowed or unrotated, and not what prediction layers are",
            hint="without their tensors and with `num_nextn_predict_layers` 0 the model is built without them",
        )
    spec = get_gpt_mtp_block_spec(config, block, use_transformer_engine=use_te, vp_stage=vp_stage)
    if spec is not None and not use_te:
        from mbx.models.megatron.local_modules import LocalNorm

        for layer in spec.layer_specs:
            layer.submodules.enorm = layer.submodules.hnorm = layer.submodules.layer_norm = LocalNorm
    return spec


def _heterogeneous_block_spec(
    config: TransformerConfig, *, use_te: bool, vp_stage: int | None
) -> TransformerBlockSubmodules:
    """Layers of unequal width, some without attention or MLP: mcore's own specs, on a CPU with our norms."""
    from mbx.models.megatron.core.layers import WrappedTorchNorm, get_gpt_heterogeneous_layer_spec

    block = get_gpt_heterogeneous_layer_spec(config, use_te=use_te, vp_stage=vp_stage)
    if not use_te:
        from mbx.models.megatron.local_modules import LocalNorm

        block.layer_norm = LocalNorm
        for layer in block.layer_specs:
            for name in ("input_layernorm", "pre_mlp_layernorm"):
                if getattr(layer.submodules, name) is WrappedTorchNorm:
                    setattr(layer.submodules, name, LocalNorm)
    return block


def _local_block_spec(config: TransformerConfig, vp_stage: int | None) -> TransformerBlockSubmodules:
    from mbx.models.megatron.core.layers import (
        TransformerBlockSubmodules,
        get_num_layers_to_build,
        get_transformer_layer_offset,
    )
    from mbx.models.megatron.local_modules import LocalNorm

    dense = local_layer_spec(config, num_experts=None)
    expert = dense if config.num_moe_experts is None else local_layer_spec(config, num_experts=config.num_moe_experts)
    layers = [expert if is_expert else dense for is_expert in expert_layers(config)]
    first = get_transformer_layer_offset(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(
        layer_specs=layers[first : first + get_num_layers_to_build(config, vp_stage=vp_stage)], layer_norm=LocalNorm
    )


def expert_layers(config: TransformerConfig) -> list[bool]:
    """Which decoder layers hold experts: `moe_layer_freq` N is every N-th from layer 0, a list says it per layer."""
    if config.num_moe_experts is None:
        return [False] * config.num_layers
    if isinstance(config.moe_layer_freq, int):
        return [layer % config.moe_layer_freq == 0 for layer in range(config.num_layers)]
    if len(config.moe_layer_freq) != config.num_layers:
        raise UnsupportedError(
            f"moe_layer_freq lists {len(config.moe_layer_freq)} layers, num_layers is {config.num_layers}"
        )
    return [bool(flag) for flag in config.moe_layer_freq]


def local_layer_spec(config: TransformerConfig, *, num_experts: int | None) -> ModuleSpec:
    """mcore's local layer with norms that need no Apex, and with Transformer Engine's checkpoint names."""
    from mbx.models.megatron.core.layers import get_gpt_layer_local_spec
    from mbx.models.megatron.local_modules import LatentDotProductAttention, LocalNorm

    spec = get_gpt_layer_local_spec(
        num_experts=num_experts,
        moe_grouped_gemm=False,
        qk_layernorm=config.qk_layernorm,
        multi_latent_attention=config.multi_latent_attention,
        normalization=config.normalization,
        qk_l2_norm=config.qk_l2_norm,
    )
    layer = spec.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = LocalNorm
    attention = layer.self_attention.submodules
    # Transformer Engine fuses the norm before fc1 into it in a dense layer; before a router it stays a module.
    keys = {} if num_experts else {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}
    if config.multi_latent_attention:
        attention.core_attention = LatentDotProductAttention
        if config.qk_layernorm:
            attention.q_layernorm = attention.kv_layernorm = LocalNorm
            keys["self_attention.q_layernorm."] = "self_attention.linear_q_up_proj.layer_norm_"
            keys["self_attention.kv_layernorm."] = "self_attention.linear_kv_up_proj.layer_norm_"
    else:
        keys["input_layernorm."] = "self_attention.linear_qkv.layer_norm_"
        if config.qk_layernorm and not config.qk_l2_norm:
            attention.q_layernorm = attention.k_layernorm = LocalNorm
    layer.sharded_state_dict_keys_map = keys
    if config.experimental_attention_variant == "dsa":
        from mbx.models.megatron.sparse_attention import attend_sparsely

        attend_sparsely(spec, config)
    return spec
