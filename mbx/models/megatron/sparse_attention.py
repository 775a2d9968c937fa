"""Sparse attention (DeepSeek-V3.2, GLM-5) without Transformer Engine: Megatron Core's own modules over local ones.

Its attention, its indexer and their choice of tokens are torch; the spec that it has for them names Transformer
Engine's linears and norms. Like `local_modules` this file imports torch and megatron when imported.
"""

from __future__ import annotations

from typing import Any

from mbx.models.megatron.core.config import TransformerConfig
from mbx.models.megatron.core.layers import ModuleSpec
from mbx.models.megatron.core.sparse import (
    ColumnParallelLinear,
    Linear,
    LocalSpecProvider,
    get_dsa_module_spec_for_backend,
)
from mbx.models.megatron.local_modules import LocalNorm


class _LocalParts(LocalSpecProvider):  # type: ignore[misc]  # megatron is untyped
    """Megatron Core's local modules, with our norms, and the linear that every rank has all of."""

    def linear(self) -> type:
        linear: type = Linear
        return linear

    def layer_norm(self, *_where: Any, **_named: Any) -> type:
        return LocalNorm


def attend_sparsely(layer: ModuleSpec, config: TransformerConfig) -> None:
    """Make a local `layer` of latent attention attend to the tokens that an indexer chooses."""
    attention = get_dsa_module_spec_for_backend(config, _LocalParts())
    # Megatron Core gathers what these two give by the class that is named here.
    attention.submodules.linear_q_down_proj = attention.submodules.linear_kv_down_proj = ColumnParallelLinear
    layer.submodules.self_attention = attention
    for norm in ("q_layernorm", "kv_layernorm"):  # which stay modules in Transformer Engine's spec as well
        layer.submodules.sharded_state_dict_keys_map.pop(f"self_attention.{norm}.", None)
