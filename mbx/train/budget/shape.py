"""Sizes of a GPT decoder, read from a flat config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from converters.errors import UnsupportedError
from converters.rows.expr import Value
from mbx.train.model.blueprint import as_int


@dataclass(frozen=True, slots=True)
class Latent:
    """Widths of multi-head latent attention: of the latents (`q` 0: queries have none), and of a head."""

    q: int
    kv: int
    head: int
    rotary: int
    value: int


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a GPT decoder, read from a flat config."""

    hidden: int
    layers: int
    heads: int
    groups: int
    head: int
    ffn: int
    gated: bool
    bias: bool
    qkv_bias: bool
    qk_norm: bool
    dropout: bool
    norm_terms: int
    experts: int
    expert_ffn: int
    topk: int
    shared_ffn: int
    dense_layers: tuple[bool, ...]
    tied: bool
    positions: int
    post_norms: bool
    sinks: bool
    latent: Latent | None

    @property
    def q(self) -> int:
        """Columns of the query."""
        return self.heads * self.head

    @property
    def kv(self) -> int:
        """Columns of the key, and of the value."""
        return self.groups * self.head

    @property
    def up(self) -> int:
        """Outputs of the MLP's first product, in multiples of its width."""
        return 2 if self.gated else 1


def shape_of(config: Mapping[str, Value]) -> Shape:
    """Read the sizes; UnsupportedError for models that are counted otherwise."""
    if config.get("experimental_attention_variant"):
        raise UnsupportedError("the budget covers standard and latent attention, this model has another")
    if config.get("model.mcore_model") == "hybrid":
        raise UnsupportedError("the budget does not cover hybrid (Mamba) models")
    heads, hidden = as_int(config, "num_attention_heads"), as_int(config, "hidden_size")
    layers = as_int(config, "num_layers")

    def number(key: str, otherwise: int) -> int:
        value = config.get(key)
        return value if isinstance(value, int) and not isinstance(value, bool) else otherwise

    latent = None
    if config.get("multi_latent_attention"):
        widths = (number(k, d) for k, d in (("qk_head_dim", 128), ("qk_pos_emb_head_dim", 64), ("v_head_dim", 128)))
        latent = Latent(number("q_lora_rank", 0), number("kv_lora_rank", 512), *widths)
    ffn, experts = number("ffn_hidden_size", 4 * hidden), number("num_moe_experts", 0)
    frequency = config.get("moe_layer_freq", 1)
    if not experts:
        dense = (True,) * layers
    elif isinstance(frequency, list | tuple):
        dense = tuple(not flag for flag in frequency)
    else:
        dense = tuple(layer % int(str(frequency)) != 0 for layer in range(layers))
    return Shape(
        hidden=hidden,
        layers=layers,
        heads=heads,
        groups=heads if latent else number("num_query_groups", heads),
        head=latent.head + latent.rotary if latent else number("kv_channels", hidden // heads),
        ffn=ffn,
        gated=bool(config.get("gated_linear_unit")),
        bias=bool(config.get("add_bias_linear", True)),
        qkv_bias=bool(config.get("add_qkv_bias")) or bool(config.get("add_bias_linear", True)),
        qk_norm=bool(config.get("qk_layernorm")),
        dropout=bool(config.get("hidden_dropout")),
        norm_terms=1 if config.get("normalization") == "RMSNorm" else 2,
        experts=experts,
        expert_ffn=number("moe_ffn_hidden_size", ffn),
        topk=number("moe_router_topk", 2),
        shared_ffn=number("moe_shared_expert_intermediate_size", 0),
        dense_layers=dense,
        tied=bool(config.get("model.share_embeddings_and_output_weights")),
        positions=as_int(config, "model.max_sequence_length")
        if config.get("model.position_embedding_type") == "learned_absolute"
        else 0,
        post_norms=bool(config.get("model.post_layernorms")),
        sinks=config.get("softmax_type") == "learnable",
        latent=latent,
    )
