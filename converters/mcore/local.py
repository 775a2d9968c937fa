"""Names of one rank's own `state_dict`, as legacy checkpoints keep it, against torch_dist keys.

A rank numbers its layers from 0 in each model chunk and its experts from 0 in each expert-parallel rank.
`transformer_engine` and `local` name the two layer specs of Megatron Core: they differ in how norms, experts
and `_extra_state` entries are spelt. Sources: gpt_layer_specs.py, moe/experts.py, extensions/transformer_engine.py
of megatron-core 0.16.1, and files that Megatron-LM wrote with it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from converters.errors import UnsupportedError
from converters.mcore.keys import EXPERTS
from converters.mcore.releases import CURRENT, PREDICTION_LAYERS, Release
from converters.mcore.torch_dist import has_te_state
from converters.rows.expr import Value
from converters.rows.ops import ATOM_NAMES

Spec = Literal["transformer_engine", "local"]

_LAYER = re.compile(r"^(decoder|mtp)\.layers\.(\d+)\.(.+)$")
_GROUPED = re.compile(r"^(.*mlp\.experts\.)(linear_fc[12])\.(weight|bias)(\d+)$")
_SEQUENTIAL = re.compile(r"^(.*mlp\.experts\.)local_experts\.(\d+)\.(linear_fc[12])\.(weight|bias)$")
_FLAT_EXPERTS = re.compile(r"mlp\.experts\.weight[12]$")

_LEAVES = ("layer_norm_weight", "layer_norm_bias", "weight", "bias")


@dataclass(frozen=True, slots=True)
class LocalName:
    """A name of a rank's state_dict taken apart; `param` is spelt as in torch_dist keys, experts doubled.

    `site` is "decoder", "mtp" or ""; `layer` and `expert` are this rank's own numbers.
    """

    site: str
    layer: int | None
    param: str
    expert: int | None


def parse_local(name: str, release: Release = CURRENT) -> LocalName:
    """Parts of a state_dict name, whichever spec and release wrote it, as `release` spells torch_dist keys.

    UnsupportedError for experts flattened into one tensor.
    """
    match = _LAYER.match(name)
    site, layer, param = ("", None, name) if match is None else (match[1], int(match[2]), match[3])
    if site == "mtp":
        param = _under(release.prediction_layer["gpt"], param)
    if _FLAT_EXPERTS.search(param):
        raise UnsupportedError(
            f"`{name}` holds all experts of a rank in one matrix, as --moe-use-legacy-grouped-gemm writes them",
            hint="load it once in Megatron-LM and save it with --ckpt-format torch_dist",
        )
    if found := _GROUPED.match(param):
        return LocalName(site, layer, f"{found[1]}experts.{found[2]}.{found[3]}", int(found[4]))
    if found := _SEQUENTIAL.match(param):
        return LocalName(site, layer, f"{found[1]}experts.{found[3]}.{found[4]}", int(found[2]))
    return LocalName(site, layer, param, None)


def _under(name: str, param: str) -> str:
    """`param` of a prediction head, with the layer in it called `name`; a hybrid head holds several, and keeps its."""
    inner, _, rest = param.partition(".")
    return f"{name}.{rest}" if inner in PREDICTION_LAYERS and not rest.startswith("layers.") else param


def spell_local(param: str, expert: int | None, spec: Spec, release: Release = CURRENT) -> str:
    """The name within a layer (or outside) that a model of `spec` gives a torch_dist parameter."""
    param = _under(release.plain_prediction_layer, param)
    if expert is not None:
        before, _, rest = param.partition(EXPERTS)
        if spec == "transformer_engine":
            return f"{before}mlp.experts.{rest}{expert}"
        return f"{before}mlp.experts.local_experts.{expert}.{rest}"
    if spec == "local":
        for norm in release.fused_norms:
            if norm.fused in param:
                return param.replace(norm.fused, norm.own)
    return param


def order(param: str) -> tuple[int, str, int]:
    """Sort key that puts a layer's parameters in the order of its modules."""
    module, _, leaf = param.rpartition(".")
    place = next((i for i, name in enumerate(CURRENT.module_order) if f".{param}".find(f".{name}.") >= 0), -1)
    return place, module, _LEAVES.index(leaf) if leaf in _LEAVES else len(_LEAVES)


def extra_states(names: list[str], spec: Spec, release: Release = CURRENT) -> dict[str, bool]:
    """`_extra_state` names that accompany a layer's parameters `names` (already in `spec`'s spelling).

    True where the entry is an empty tensor, False where it is None.
    """
    out: dict[str, bool] = {}
    for name in names:
        module = name.rpartition(".")[0]
        leaf = module.rpartition(".")[2]
        state = f"{module}._extra_state"
        if spec == "transformer_engine":
            before, attention, _ = name.partition("self_attention.")
            if attention and ".linear_proj." in name:
                out.setdefault(f"{before}self_attention.core_attention._extra_state", True)
            if has_te_state(module, release):
                out.setdefault(state, True)
                continue
        if leaf == "output_layer" or (spec == "local" and leaf in release.te_linears):
            out.setdefault(state, False)  # Megatron Core's own tensor-parallel linears
    return out


def atom_sizes(param: str, config: Mapping[str, Value]) -> tuple[tuple[str, int], ...]:
    """Name and rows of the parts that torch_dist stores apart and a state_dict packs; none for other parameters.

    Rows are of the whole tensor. Raises UnsupportedError when the config lacks a size.
    """
    op = {
        "self_attention.in_proj": "gdn_in",
        "self_attention.conv1d": "gdn_conv",
        "mixer.in_proj": "mamba_in",
        "mixer.conv1d": "mamba_conv",
    }.get(param.rpartition(".")[0])
    if op is None or param.rpartition(".")[2] not in ("weight", "bias"):
        return ()

    def size(*fields: str) -> int:
        product = 1
        for field in fields:
            value = config.get(field)
            if not isinstance(value, int):
                raise UnsupportedError(f"`{param}` cannot be taken apart: the config lacks `{field}`")
            product *= value
        return product

    if op.startswith("gdn"):
        key = size("linear_num_key_heads", "linear_key_head_dim")
        value = size("linear_num_value_heads", "linear_value_head_dim")
        heads = size("linear_num_value_heads")
        rows = [key, key, value, value, heads, heads]
    else:
        inner, state = size("mamba_num_heads", "mamba_head_dim"), size("mamba_num_groups", "mamba_state_dim")
        rows = [inner, inner, state, state, size("mamba_num_heads")]
    names = ATOM_NAMES[op]
    return tuple(zip(names, rows[1:] if op == "mamba_conv" else rows, strict=False))
