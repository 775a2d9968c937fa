"""What each layer of a decoder is made of, read from a flat config: its mixer, its heads, its MLP."""

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
class Heads:
    """Heads of attention: those of queries, those of keys and values, the columns of a key's and of a value's.

    `sinks`: the softmax has a weight a head besides. `shares`: keys and values are another layer's.
    """

    count: int
    groups: int
    width: int
    value: int
    sinks: bool = False
    shares: bool = False

    @property
    def q(self) -> int:
        """Columns of the query."""
        return self.count * self.width

    @property
    def k(self) -> int:
        """Columns of the keys."""
        return self.groups * self.width

    @property
    def v(self) -> int:
        """Columns of the values."""
        return self.groups * self.value

    @property
    def rows(self) -> int:
        """Columns of the queries, keys and values that the layer makes."""
        return self.q + (0 if self.shares else self.k + self.v)

    @property
    def out(self) -> int:
        """Columns of what attention gives."""
        return self.count * self.value


@dataclass(frozen=True, slots=True)
class Layer:
    """What a layer holds: its mixer of tokens and its MLP, either may be missing; heads and width are its own.

    `index` is its number in the decoder, -1 of a layer of multi-token prediction. `qk_norm`: queries and keys are
    normed, with weights (`Shape.qk_norm`) or without. `bounded`: the halves of a gated MLP are bounded in front of
    its activation, those of routed experts and those of any other.
    """

    mixer: Mixer
    mlp: Mlp
    heads: Heads
    ffn: int
    qk_norm: bool = False
    index: int = -1
    bounded: tuple[bool, bool] = (False, False)


def number(config: Mapping[str, Value], key: str, otherwise: int) -> int:
    """An integer of a flat config, `otherwise` where it is absent or none."""
    value = config.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) else otherwise


def layers_of_config(config: Mapping[str, Value], heads: Heads) -> tuple[Layer, ...]:
    """The decoder's layers, whose attention has `heads` unless the config says otherwise of a kind of layers."""
    count, hidden = as_int(config, "num_layers"), as_int(config, "hidden_size")
    latent = bool(config.get("multi_latent_attention"))
    ffn, qk_norm = number(config, "ffn_hidden_size", 4 * hidden), bool(config.get("qk_layernorm"))
    pattern = config.get("model.hybrid_override_pattern")
    if config.get("model.mcore_model") == "hybrid" and isinstance(pattern, str):
        letters = [letter for letter in pattern if letter in _LETTERS]
        return tuple(Layer(*_LETTERS[letter], heads, ffn, qk_norm, n) for n, letter in enumerate(letters))
    blocks = config.get("block_configs")
    if config.get("heterogeneous_block_specs") and isinstance(blocks, list | tuple):
        return tuple(_block(block, heads, hidden, n) for n, block in enumerate(blocks))
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
    own = [_of_layer(config, heads, ffn, index) for index in range(count)]
    bounds = zip(*(_bounds(config, name, count) for name in ("swiglu_limits", "swiglu_limits_shared")), strict=True)
    return tuple(
        Layer(mixer, "experts" if flag else "dense", *own[n], norm, n, bounded)
        for n, (mixer, flag, norm, bounded) in enumerate(zip(mixers, routed, normed, bounds, strict=True))
    )


def _of_layer(config: Mapping[str, Value], heads: Heads, ffn: int, index: int) -> tuple[Heads, int]:
    """Heads and width of the MLP of one layer: of its kind, and without keys or wider where the last ones are so."""
    apart = any(field.startswith("windowed_") for field, value in config.items() if value is not None)
    if apart and _windowed(config, index):
        width = number(config, "windowed_kv_channels", heads.width)
        heads = Heads(
            number(config, "windowed_num_attention_heads", heads.count),
            number(config, "windowed_num_query_groups", heads.groups),
            width,
            number(config, "v_head_dim", width),
            (config.get("windowed_softmax_type") or config.get("softmax_type")) == "learnable",
        )
    if index >= as_int(config, "num_layers") - number(config, "num_kv_shared_layers", 0):
        heads, ffn = replace(heads, shares=True), ffn * (2 if config.get("use_double_wide_mlp") else 1)
    return heads, ffn


def _windowed(config: Mapping[str, Value], index: int) -> bool:
    """Whether a layer is of the windowed kind (megatron/core/transformer/utils.py, `is_layer_window_attention`)."""
    every = config.get("window_attn_skip_freq")
    if not config.get("window_size"):
        return False
    if isinstance(every, list | tuple):
        return bool(every[index])
    return every is None or (index + 1) % int(str(every)) != 0


def _bounds(config: Mapping[str, Value], name: str, count: int) -> list[bool]:
    limits = config.get(name)
    return [bool(limit) for limit in limits] if isinstance(limits, list | tuple) else [False] * count


def _block(block: Value, heads: Heads, hidden: int, index: int) -> Layer:
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
        replace(heads, groups=heads.count // share if isinstance(share, int) and share else heads.count),
        width if isinstance(width, int) else 0,
        index=index,
    )
