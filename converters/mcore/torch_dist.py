"""The torch_dist dialect: keys, stacking and `_extra_state` objects of Megatron Core's distributed checkpoints.

Sources: `sharded_state_dict` in megatron/core/transformer/{transformer_block,mlp,attention}.py,
moe/experts.py, extensions/transformer_engine.py and ssm/ of megatron-core 0.16.1.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from converters.mcore.keys import bare, parse_key
from converters.mcore.releases import CURRENT, Release
from converters.rows.expr import Value
from converters.rows.ops import ATOM_NAMES
from converters.rows.table import Row
from converters.tensors import Shape

DECODER = "decoder.layers.{L}."
#: What a site's place in a stack is called in its names.
_NUMBERS = re.compile(r"\{[IL]\}\.")
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


def stacks_layers(family: str, config: Mapping[str, Value], release: Release = CURRENT) -> bool:
    """Whether decoder layers are stored as one tensor each with the layer as first dimension.

    Mixed layers (dense and MoE, attention and linear attention, heterogeneous blocks) and hybrid models keep
    a key per layer.
    """
    patterns = [config.get(field) for field in release.layer_patterns]
    mixed = any(isinstance(pattern, list) or int(pattern or 1) > 1 for pattern in patterns)  # type: ignore[arg-type]
    return family in release.stacked_kinds and not mixed and not any(config.get(field) for field in release.apart)


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
    """Keys of a row's parameter; several where the format stores fused atoms apart.

    `num_layers` are those of the decoder; a tower's rows know their own.
    """
    index: tuple[int, ...] = ()
    stack: tuple[int, ...] = ()
    if stacked and row.index is not None and (row.count is not None or bare(row.site) == DECODER):
        prefix, index, stack = _NUMBERS.sub("", row.site), (row.index,), (row.count or num_layers,)
    else:
        prefix = (
            row.site if row.index is None else row.site.replace("{I}", str(row.index)).replace("{L}", str(row.layer))
        )
    param = row.spec.param
    if row.expert is not None:
        param = param.replace("mlp.experts.", "mlp.experts.experts.").replace("{E}", "")
        index, stack = (*index, row.expert), (*stack, num_experts)
    if len(params := row.spec.params) > 1:
        return tuple(Home(prefix + one, index, stack, (i,)) for i, one in enumerate(params))
    key = prefix + param
    if names := ATOM_NAMES.get(row.spec.op):
        return tuple(Home(f"{key}.{name}", index, stack, (i,)) for i, name in enumerate(names))
    return (Home(key, index, stack),)


def extra_states_of(
    key: str,
    index: tuple[int, ...],
    stack: tuple[int, ...],
    kind: str,
    release: Release = CURRENT,
    *,
    shared: bool = False,
    own: bool = False,
) -> tuple[str, ...]:
    """Names of the `_extra_state` objects beside the entry `index` of the key; none where its module has none.

    `kind` is the model's, one of a release's. A norm whose weight tensor ranks share is `shared`: Transformer Engine
    has none such, and a tool's own class no state. `own` says that the module has one whatever it is called.
    """
    module, _, leaf = key.rpartition(".")
    if leaf in _ATOM_LEAVES:
        module = module.rpartition(".")[0]
    with_state = bare(module + ".") == "output_layer." and kind in release.output_state
    own_class = shared and module.endswith("norm")
    owners = [module] if own or with_state or has_te_state(module, release) and not own_class else []
    if release.head_core_state and parse_key(key).site == "mtp" and key.endswith(".self_attention.linear_proj.weight"):
        owners.append(module.removesuffix("linear_proj") + "core_attention")
    offset = ".".join(map(str, index)) or "0"
    shape = ".".join(map(str, stack)) or "1"
    return tuple(f"{name}._extra_state/shard_{offset}_{shape}" for name in owners)


def states_of_model(kind: str, release: Release = CURRENT, prefix: str = "") -> tuple[str, ...]:
    """Names of the `_extra_state` objects of a whole model: a tied output layer has one, and no weight beside it.

    `prefix` is what a model around it puts before its keys.
    """
    return (f"{prefix}output_layer._extra_state/shard_0_1",) if kind in release.output_state else ()


def has_te_state(module: str, release: Release = CURRENT) -> bool:
    """Whether Transformer Engine backs the module of this name, and so gives it a state beside its weights."""
    owner = module.rpartition(".")[2]
    is_norm = owner.endswith(("layernorm", "norm")) and not module.endswith(release.torch_norms)
    return is_norm or owner == "core_attention" or owner in release.te_linears
