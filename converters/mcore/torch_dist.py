"""The torch_dist dialect: keys, stacking and `_extra_state` objects of Megatron Core's distributed checkpoints.

Sources: `sharded_state_dict` in megatron/core/transformer/{transformer_block,mlp,attention}.py,
moe/experts.py, extensions/transformer_engine.py and ssm/ of megatron-core 0.16.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from converters.mcore.keys import parse_key
from converters.rows.expr import Value
from converters.rows.ops import ATOM_NAMES
from converters.rows.table import Row
from converters.tensors import Shape

DECODER = "decoder.layers.{L}."
#: Modules that Transformer Engine backs, and so carry an `_extra_state` object beside their weights.
_TE_LINEARS = frozenset(
    """linear_qkv linear_proj linear_fc1 linear_fc2 linear_q_proj linear_q_down_proj linear_q_up_proj
    linear_kv_down_proj linear_kv_up_proj in_proj out_proj eh_proj fc1_latent_proj fc2_latent_proj""".split()
)
_NORM_SUFFIXES = ("layernorm", "norm")
#: Norms that are plain torch modules even in a Transformer Engine model.
_TORCH_NORMS = ("mixer.norm",)
_ATOM_LEAVES = frozenset(name for names in ATOM_NAMES.values() for name in names)


@dataclass(frozen=True, slots=True)
class Home:
    """Where a parameter lives: the key, and the leading index (layer, expert) into a stack of `stack` entries.

    `atoms` names the atoms stored under this key; None means all of them, packed.
    """

    key: str
    index: tuple[int, ...]
    stack: tuple[int, ...]
    atoms: tuple[int, ...] | None = None


def stacks_layers(family: str, config: Mapping[str, Value]) -> bool:
    """Whether decoder layers are stored as one tensor each with the layer as first dimension.

    Mixed layers (dense and MoE, attention and linear attention, heterogeneous blocks) and hybrid models keep
    a key per layer.
    """
    mixed = any(
        isinstance(config.get(field), list) or int(config.get(field) or 1) > 1  # type: ignore[arg-type]
        for field in ("moe_layer_freq", "linear_attention_freq")
    )
    return (
        family == "gpt"
        and not mixed
        and not config.get("heterogeneous_block_specs")
        and not config.get("hetereogenous_dist_checkpoint")
    )


def layers_alike(shapes: Mapping[str, Shape]) -> bool:
    """Whether every decoder layer has the same parameters in the same shapes: stacking takes no less.

    `shapes` are by key of a single layer, of whole tensors or of one rank's shards throughout.
    """
    layers: dict[int, set[tuple[str, Shape]]] = {}
    for key, shape in shapes.items():
        parsed = parse_key(key)
        if parsed.site == "decoder" and parsed.layer is not None:
            layers.setdefault(parsed.layer, set()).add((parsed.param, shape))
    kinds = list(layers.values())
    return all(kind == kinds[0] for kind in kinds)


def homes(row: Row, stacked: bool, num_layers: int, num_experts: int) -> tuple[Home, ...]:
    """Keys of a row's parameter; several where the format stores fused atoms apart."""
    index: tuple[int, ...] = ()
    stack: tuple[int, ...] = ()
    if stacked and row.site == DECODER and row.index is not None:
        prefix, index, stack = "decoder.layers.", (row.index,), (num_layers,)
    else:
        prefix = (
            row.site if row.index is None else row.site.replace("{I}", str(row.index)).replace("{L}", str(row.layer))
        )
    param = row.spec.param
    if row.expert is not None:
        param = param.replace("mlp.experts.", "mlp.experts.experts.").replace("{E}", "")
        index, stack = (*index, row.expert), (*stack, num_experts)
    key = prefix + param
    if names := ATOM_NAMES.get(row.spec.op):
        return tuple(Home(f"{key}.{name}", index, stack, (i,)) for i, name in enumerate(names))
    return (Home(key, index, stack),)


def extra_states_of(key: str, index: tuple[int, ...], stack: tuple[int, ...], *, hybrid: bool) -> tuple[str, ...]:
    """Names of the `_extra_state` objects beside the entry `index` of the key; none where its module has none.

    Two are asked for by accident of Megatron Core 0.16: multi-token-prediction layers are first saved by the default
    rule, so their attention core keeps a state that decoder layers drop, and hybrid models do not drop the output
    layer's.
    """
    module, _, leaf = key.rpartition(".")
    if leaf in _ATOM_LEAVES:
        module = module.rpartition(".")[0]
    owner = module.rpartition(".")[2]
    owners = []
    known = owner in _TE_LINEARS or owner == "core_attention" or owner.endswith(_NORM_SUFFIXES)
    if (known and not module.endswith(_TORCH_NORMS)) or (hybrid and module == "output_layer"):
        owners.append(module)
    if key.startswith("mtp.") and key.endswith(".self_attention.linear_proj.weight"):
        owners.append(module.removesuffix("linear_proj") + "core_attention")
    offset = ".".join(map(str, index)) or "0"
    shape = ".".join(map(str, stack)) or "1"
    return tuple(f"{name}._extra_state/shard_{offset}_{shape}" for name in owners)
