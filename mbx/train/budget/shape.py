"""Sizes of a decoder and what each of its layers is made of, read from a flat config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from converters.errors import UnsupportedError
from converters.rows.expr import Value
from mbx.train.model.blueprint import as_int

Mixer: TypeAlias = Literal["attention", "latent", "delta", "mamba", ""]
Mlp: TypeAlias = Literal["dense", "experts", ""]
#: Letters of Megatron Core's hybrid pattern (megatron/core/ssm/mamba_hybrid_layer_allocation.py).
_LETTERS: Mapping[str, tuple[Mixer, Mlp]] = {
    "M": ("mamba", ""),
    "*": ("attention", ""),
    "-": ("", "dense"),
    "E": ("", "experts"),
}


@dataclass(frozen=True, slots=True)
class Layer:
    """What a layer holds: its mixer of tokens and its MLP, either may be missing; query groups and width are its own.

    `index` is its number in the decoder, -1 of a layer of multi-token prediction. `qk_norm`: queries and keys are
    normed, with weights (`Shape.qk_norm`) or without.
    """

    mixer: Mixer
    mlp: Mlp
    groups: int
    ffn: int
    qk_norm: bool = False
    index: int = -1


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
    `qk_norm_wide`: that of queries and keys has a weight a column of theirs, cut as they are.
    """

    hidden: int
    layers: tuple[Layer, ...]
    ahead: tuple[Layer, ...]
    heads: int
    head: int
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
    sinks: bool
    latent: Latent | None
    delta: Delta | None
    mamba: Mamba | None

    @property
    def q(self) -> int:
        """Columns of the query."""
        return self.heads * self.head

    @property
    def up(self) -> int:
        """Outputs of the MLP's first product, in multiples of its width."""
        return 2 if self.gated else 1


def shape_of(config: Mapping[str, Value]) -> Shape:
    """Read the sizes; UnsupportedError for attention that is counted nowhere here."""
    variant = config.get("experimental_attention_variant")
    if variant not in (None, "gated_delta_net"):
        raise UnsupportedError(f"the budget does not cover {variant} attention")
    if any(field.startswith("windowed_") for field, value in config.items() if value is not None):
        raise UnsupportedError("the budget does not cover layers of two kinds, whose heads differ")
    heads, hidden = as_int(config, "num_attention_heads"), as_int(config, "hidden_size")
    latent = _latent(config)
    experts, ffn = _number(config, "num_moe_experts", 0), _number(config, "ffn_hidden_size", 4 * hidden)
    layers = _layers(config)
    balanced = config.get("moe_router_load_balancing_type", "aux_loss")
    # behind layers that are listed Megatron Core builds no prediction layers: such a run is refused
    listed = any(isinstance(config.get(key), list | tuple) for key in ("window_attn_skip_freq", "no_rope_freq"))
    return Shape(
        hidden=hidden,
        layers=tuple(replace(layer, index=number) for number, layer in enumerate(layers)),
        ahead=() if listed else layers[-1:] * _number(config, "mtp_num_layers", 0),
        heads=heads,
        head=latent.head + latent.rotary if latent else _number(config, "kv_channels", hidden // heads),
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
        expert_ffn=_number(config, "moe_ffn_hidden_size", ffn),
        expert_hidden=_number(config, "moe_latent_size", hidden),
        topk=_number(config, "moe_router_topk", 2),
        shared_ffn=_number(config, "moe_shared_expert_intermediate_size", 0),
        shared_gate=bool(config.get("moe_shared_expert_gate")),
        routing=Routing(
            sigmoid=config.get("moe_router_score_function") == "sigmoid",
            pre_softmax=bool(config.get("moe_router_pre_softmax")),
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
        sinks=config.get("softmax_type") == "learnable",
        latent=latent,
        delta=_delta(config) if variant else None,
        mamba=_mamba(config) if any(layer.mixer == "mamba" for layer in layers) else None,
    )


def _number(config: Mapping[str, Value], key: str, otherwise: int) -> int:
    value = config.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) else otherwise


def _latent(config: Mapping[str, Value]) -> Latent | None:
    if not config.get("multi_latent_attention"):
        return None
    head, rotary, value = (
        _number(config, k, d) for k, d in (("qk_head_dim", 128), ("qk_pos_emb_head_dim", 64), ("v_head_dim", 128))
    )
    return Latent(_number(config, "q_lora_rank", 0), _number(config, "kv_lora_rank", 512), head, rotary, value)


def _delta(config: Mapping[str, Value]) -> Delta:
    heads, keys = (_number(config, f"linear_num_{k}_heads", d) for k, d in (("value", 32), ("key", 16)))
    key, value = (_number(config, f"linear_{k}_head_dim", 128) for k in ("key", "value"))
    return Delta(keys * key, heads * value, keys, heads, _number(config, "linear_conv_kernel_dim", 4))


def _mamba(config: Mapping[str, Value]) -> Mamba:
    head = _number(config, "mamba_head_dim", 64)
    heads = _number(config, "mamba_num_heads", 2 * as_int(config, "hidden_size") // head)
    groups, state = _number(config, "mamba_num_groups", 8), _number(config, "mamba_state_dim", 128)
    return Mamba(heads * head, heads, groups, state)


def _layers(config: Mapping[str, Value]) -> tuple[Layer, ...]:
    count, heads = as_int(config, "num_layers"), as_int(config, "num_attention_heads")
    hidden = as_int(config, "hidden_size")
    latent = bool(config.get("multi_latent_attention"))
    groups = heads if latent else _number(config, "num_query_groups", heads)
    ffn, qk_norm = _number(config, "ffn_hidden_size", 4 * hidden), bool(config.get("qk_layernorm"))
    pattern = config.get("model.hybrid_override_pattern")
    if config.get("model.mcore_model") == "hybrid" and isinstance(pattern, str):
        letters = [letter for letter in pattern if letter in _LETTERS]
        return tuple(Layer(*_LETTERS[letter], groups, ffn, qk_norm) for letter in letters)
    blocks = config.get("block_configs")
    if config.get("heterogeneous_block_specs") and isinstance(blocks, list | tuple):
        return tuple(_block(block, heads, hidden) for block in blocks)
    mixers: list[Mixer] = ["latent" if latent else "attention"] * count
    if config.get("experimental_attention_variant"):  # every so many layers, the last of them, attend to everything
        every = config.get("linear_attention_freq")
        flags = every if isinstance(every, list | tuple) else [(n + 1) % int(str(every)) != 0 for n in range(count)]
        mixers = ["delta" if flag else "attention" for flag in flags]
    frequency = config.get("moe_layer_freq", 1)
    if not config.get("num_moe_experts"):
        routed = [False] * count
    elif isinstance(frequency, list | tuple):
        routed = [bool(flag) for flag in frequency]
    else:
        routed = [layer % int(str(frequency)) == 0 for layer in range(count)]
    normed = [qk_norm] * count
    if config.get("qk_l2_norm"):  # where positions are rotated
        unrotated = config.get("no_rope_freq")
        normed = [not flag for flag in unrotated] if isinstance(unrotated, list | tuple) else [True] * count
    return tuple(
        Layer(mixer, "experts" if flag else "dense", groups, ffn, norm)
        for mixer, flag, norm in zip(mixers, routed, normed, strict=True)
    )


def _block(block: Value, heads: int, hidden: int) -> Layer:
    """A layer of unequal width (megatron/core/transformer/heterogeneous/heterogeneous_config.py)."""
    if not isinstance(block, Mapping):
        raise UnsupportedError(f"a layer's block config is no table: {block!r}")
    attention, mlp = block.get("attention"), block.get("ffn")
    if not isinstance(attention, Mapping) or not isinstance(mlp, Mapping):
        raise UnsupportedError("a layer's block config lacks `attention` or `ffn`")
    if attention.get("replace_with_linear") or mlp.get("replace_with_linear"):
        raise UnsupportedError("the budget does not cover blocks that are replaced with a linear")
    share, factor = attention.get("n_heads_in_group"), mlp.get("ffn_mult")
    width = mlp.get("intermediate_size")
    if isinstance(factor, int | float):
        width = -(-int(2 * factor * hidden / 3) // 256) * 256
    return Layer(
        "" if attention.get("no_op") else "attention",
        "" if mlp.get("no_op") else "dense",
        heads // share if isinstance(share, int) and share else heads,
        width if isinstance(width, int) else 0,
    )
