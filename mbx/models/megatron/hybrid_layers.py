"""HybridModel's layers without Transformer Engine: the two halves of our local GPT layers, each a layer of its own,
and Megatron Core's mixers over its local linears.

Like `local_modules` this file imports torch and megatron when imported.
"""

from __future__ import annotations

import re
from dataclasses import fields, replace
from typing import Any

from torch import nn

from converters.errors import UnsupportedError
from converters.mcore.hybrid_form import ATTENTION, DENSE, EXPERTS
from mbx.models.megatron.config import mcore_version
from mbx.models.megatron.core.config import TransformerConfig
from mbx.models.megatron.core.hybrid import HybridStack, HybridStackSubmodules, hybrid_stack_spec
from mbx.models.megatron.core.layers import IdentityOp, ModuleSpec
from mbx.models.megatron.local_modules import LocalNorm
from mbx.models.megatron.specs import local_layer_spec

#: The letter of a mixer in a pattern.
_MAMBA = "M"
#: The norm of a layer with a mixer, and the mixer's own.
_MIXER_NORM = re.compile(r"(layers\.\d+|mixer)\.norm$")


class LocalHybridStack(HybridStack):  # type: ignore[misc]  # megatron is untyped
    """A stack whose last norm needs no Transformer Engine, which Megatron Core's own does."""

    def __init__(self, config: TransformerConfig, submodules: Any, **keywords: Any) -> None:
        super().__init__(config, submodules, **{**keywords, "post_layer_norm": False})
        self.post_layer_norm = keywords.get("post_layer_norm", True)
        if self.post_process and self.post_layer_norm:
            self.final_norm = LocalNorm(config, config.hidden_size, config.layernorm_epsilon)


def local_hybrid_spec(config: TransformerConfig, pattern: str) -> ModuleSpec:
    """The stack for a `pattern` of mixers, attention, MLPs and experts, heads included; UnsupportedError for others.

    Mixers need the kernels of mamba-ssm, which Megatron Core says itself where it builds one.
    """
    if odd := sorted(set(pattern) - {_MAMBA, ATTENTION, DENSE, EXPERTS, "|", "/"}):
        raise UnsupportedError(
            f"{mcore_version()} builds hybrid layers of kind {', '.join(map(repr, odd))} with Transformer Engine only",
            hint="run this leg on a GPU with Transformer Engine and mamba-ssm installed",
        )
    dense = local_layer_spec(config, num_experts=None)
    layers = {"attention_layer": _half(dense, attention=True), "mlp_layer": _half(dense, attention=False)}
    if config.num_moe_experts is not None:
        layers["moe_layer"] = _half(local_layer_spec(config, num_experts=config.num_moe_experts), attention=False)
    if _MAMBA in pattern:
        layers["mamba_layer"] = _mixer(dense)
    if "mtp_block_spec" in {field.name for field in fields(HybridStackSubmodules)}:  # none before 0.17
        layers["mtp_block_spec"] = _local_heads(dense.submodules.self_attention.submodules.linear_qkv)
    return ModuleSpec(module=LocalHybridStack, submodules=HybridStackSubmodules(**layers))


def set_mixer_epsilon(model: nn.Module, epsilon: float) -> None:
    """Give the norms before mixers and behind their gates the model's `epsilon`; Megatron Core has 1e-5 for all.

    Transformer Engine's norm before a mixer is a part of `in_proj`, which has the model's.
    """
    for name, module in model.named_modules():
        if _MIXER_NORM.search(name) and hasattr(module, "eps"):
            module.eps = epsilon


def _mixer(layer: ModuleSpec) -> ModuleSpec:
    """A layer of Mamba-2 over the linears of the attention of `layer`, with the names of Transformer Engine's."""
    from mbx.models.megatron.core.mamba import MambaLayer, MambaLayerSubmodules, MambaMixer, MambaMixerSubmodules

    linears = layer.submodules.self_attention.submodules
    parts = MambaMixerSubmodules(in_proj=linears.linear_qkv, out_proj=linears.linear_proj)
    submodules = MambaLayerSubmodules(
        norm=LocalNorm,
        mixer=ModuleSpec(module=MambaMixer, submodules=parts),
        mamba_bda=layer.submodules.self_attn_bda,
        sharded_state_dict_keys_map={"norm.": "mixer.in_proj.layer_norm_"},
    )
    return ModuleSpec(module=MambaLayer, submodules=submodules)


def _local_heads(linear: type) -> ModuleSpec:
    """Megatron Core's block of prediction heads with our norms and `linear`; their layers are the stack's."""
    block = hybrid_stack_spec.submodules.mtp_block_spec
    own = {"enorm": LocalNorm, "hnorm": LocalNorm, "layer_norm": LocalNorm, "eh_proj": linear}
    heads = [ModuleSpec(one.module, submodules=replace(one.submodules, **own)) for one in block.submodules.layer_specs]
    return ModuleSpec(block.module, submodules=replace(block.submodules, layer_specs=heads))


def _half(layer: ModuleSpec, *, attention: bool) -> ModuleSpec:
    """The attention of a layer, or its MLP, with the norm before it and the names of that."""
    whole = layer.submodules
    nothing = type(whole)()
    fields = (
        ("input_layernorm", "self_attention", "self_attn_bda")
        if attention
        else ("pre_mlp_layernorm", "mlp", "mlp_bda")
    )
    kept = {name: getattr(whole, name) for name in fields}
    keys = {old: new for old, new in whole.sharded_state_dict_keys_map.items() if old.startswith(fields[:2])}
    assert nothing.mlp is IdentityOp and nothing.self_attention is IdentityOp
    return ModuleSpec(module=layer.module, submodules=replace(nothing, **kept, sharded_state_dict_keys_map=keys))
