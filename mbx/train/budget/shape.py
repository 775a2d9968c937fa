"""Sizes of a decoder, read from a flat config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from converters.errors import UnsupportedError
from converters.rows.expr import Value
from mbx.train.budget.layers import Heads, Layer, layers_of_config, number
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
class Delta:
    """A gated delta net: columns of query (and key) and of value, heads of values, the convolution's width."""

    key: int
    value: int
    key_heads: int
    heads: int
    kernel: int

    @property
    def head(self) -> int:
        """Columns of a value's head."""
        return self.value // self.heads

    @property
    def mixed(self) -> int:
        """Columns that the convolution reads: q, k, v."""
        return 2 * self.key + self.value

    @property
    def rows(self) -> int:
        """Outputs of `in_proj`: q, k, v, the gate, beta and alpha."""
        return self.mixed + self.value + 2 * self.heads


@dataclass(frozen=True, slots=True)
class Mamba:
    """A Mamba-2 mixer: inner width, heads, groups and state of B and C."""

    inner: int
    heads: int
    groups: int
    state: int

    @property
    def mixed(self) -> int:
        """Columns that the convolution reads: x, B, C."""
        return self.inner + 2 * self.groups * self.state

    @property
    def rows(self) -> int:
        """Outputs of `in_proj`: z, x, B, C, dt."""
        return self.inner + self.mixed + self.heads


@dataclass(frozen=True, slots=True)
class Routing:
    """What a router does to the scores of its experts."""

    sigmoid: bool
    pre_softmax: bool
    auxiliary: bool
    fp32: bool
    on_input: bool


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a decoder. `layers`: what each holds; `ahead`: layers of multi-token prediction, of which each has a
    norm and a projection more and the output layer's logits once more. `clamped`: a gated activation bounds its input.
    `qk_norm_wide`: that of queries and keys has a weight a column of theirs, cut as they are. `norms_beside`: values,
    and experts beside an MLP, have norms of their own (Gemma 4). `layer_input`: width of what each layer takes of a
    token, from a table of `layer_vocab` rows.
    """

    hidden: int
    layers: tuple[Layer, ...]
    ahead: tuple[Layer, ...]
    gated: bool
    activation: str
    clamped: bool
    bias: bool
    qkv_bias: bool
    qk_norm: bool
    qk_norm_wide: bool
    output_gate: bool
    dropout: bool
    norm_terms: int
    experts: int
    expert_ffn: int
    expert_hidden: int
    topk: int
    shared_ffn: int
    shared_gate: bool
    routing: Routing
    tied: bool
    positions: int
    post_norms: bool
    one_norm: bool
    norms_beside: bool
    layer_input: int
    layer_vocab: int
    latent: Latent | None
    delta: Delta | None
    mamba: Mamba | None

    @property
    def up(self) -> int:
        """Outputs of the MLP's first product, in multiples of its width."""
        return 2 if self.gated else 1


def shape_of(config: Mapping[str, Value]) -> Shape:
    """Read the sizes; UnsupportedError for attention that is counted nowhere here."""
    variant = config.get("experimental_attention_variant")
    if variant not in (None, "gated_delta_net"):
        raise UnsupportedError(f"the budget does not cover {variant} attention")
    if config.get("model.attention_beside_mamba"):
        raise UnsupportedError("the budget does not cover attention beside Mamba-2 in a layer")
    hidden = as_int(config, "hidden_size")
    latent = _latent(config)
    experts, ffn = number(config, "num_moe_experts", 0), number(config, "ffn_hidden_size", 4 * hidden)
    layers = layers_of_config(config, _heads(config, latent))
    balanced = config.get("moe_router_load_balancing_type", "aux_loss")
    # behind layers that are listed Megatron Core builds no prediction layers: such a run is refused
    listed = any(isinstance(config.get(key), list | tuple) for key in ("window_attn_skip_freq", "no_rope_freq"))
    return Shape(
        hidden=hidden,
        layers=layers,
        ahead=() if listed else (replace(layers[-1], index=-1),) * number(config, "mtp_num_layers", 0),
        gated=bool(config.get("gated_linear_unit")),
        activation=str(config.get("activation_func", "gelu")),
        clamped=config.get("activation_func_clamp_value") is not None,
        bias=bool(config.get("add_bias_linear", True)),
        qkv_bias=bool(config.get("add_qkv_bias")) or bool(config.get("add_bias_linear", True)),
        qk_norm=bool(config.get("qk_layernorm")),
        qk_norm_wide=bool(config.get("model.qk_layernorm_over_heads")),
        output_gate=bool(config.get("attention_output_gate")),
        dropout=bool(config.get("hidden_dropout")),
        # one norm for attention and MLP is Cohere's, which has no bias
        norm_terms=1 if config.get("normalization") == "RMSNorm" or config.get("model.one_layernorm") else 2,
        experts=experts,
        expert_ffn=number(config, "moe_ffn_hidden_size", ffn),
        expert_hidden=number(config, "moe_latent_size", hidden),
        topk=number(config, "moe_router_topk", 2),
        shared_ffn=number(config, "moe_shared_expert_intermediate_size", 0),
        shared_gate=bool(config.get("moe_shared_expert_gate")),
        routing=Routing(
            sigmoid=config.get("moe_router_score_function") == "sigmoid",
            # Gemma 4's, a softmax over all whose chosen shares sum to 1, is one over the chosen
            pre_softmax=bool(config.get("moe_router_pre_softmax")) and not config.get("model.layer_scalars"),
            auxiliary=balanced not in ("none", "sinkhorn") and bool(config.get("moe_aux_loss_coeff")),
            fp32=config.get("moe_router_dtype") == "fp32",
            on_input=bool(config.get("moe_apply_probs_on_input")),
        ),
        tied=bool(config.get("model.share_embeddings_and_output_weights")),
        positions=as_int(config, "model.max_sequence_length")
        if config.get("model.position_embedding_type") == "learned_absolute"
        else 0,
        post_norms=bool(config.get("model.post_layernorms")),
        one_norm=bool(config.get("model.one_layernorm")),
        norms_beside=bool(config.get("model.layer_scalars")),
        layer_input=number(config, "per_layer_input_size", 0),
        layer_vocab=number(config, "per_layer_vocab_size", 0),
        latent=latent,
        delta=_delta(config) if variant else None,
        mamba=_mamba(config) if any(layer.mixer == "mamba" for layer in layers) else None,
    )


def _heads(config: Mapping[str, Value], latent: Latent | None) -> Heads:
    count = as_int(config, "num_attention_heads")
    if latent:
        return Heads(count, count, latent.head + latent.rotary, latent.value)
    width = number(config, "kv_channels", as_int(config, "hidden_size") // count)
    sinks = config.get("softmax_type") == "learnable"
    return Heads(count, number(config, "num_query_groups", count), width, number(config, "v_head_dim", width), sinks)


def _latent(config: Mapping[str, Value]) -> Latent | None:
    if not config.get("multi_latent_attention"):
        return None
    head, rotary, value = (
        number(config, k, d) for k, d in (("qk_head_dim", 128), ("qk_pos_emb_head_dim", 64), ("v_head_dim", 128))
    )
    return Latent(number(config, "q_lora_rank", 0), number(config, "kv_lora_rank", 512), head, rotary, value)


def _delta(config: Mapping[str, Value]) -> Delta:
    heads, keys = (number(config, f"linear_num_{k}_heads", d) for k, d in (("value", 32), ("key", 16)))
    key, value = (number(config, f"linear_{k}_head_dim", 128) for k in ("key", "value"))
    return Delta(keys * key, heads * value, keys, heads, number(config, "linear_conv_kernel_dim", 4))


def _mamba(config: Mapping[str, Value]) -> Mamba:
    head = number(config, "mamba_head_dim", 64)
    heads = number(config, "mamba_num_heads", 2 * as_int(config, "hidden_size") // head)
    groups, state = number(config, "mamba_num_groups", 8), number(config, "mamba_state_dim", 128)
    return Mamba(heads * head, heads, groups, state)
