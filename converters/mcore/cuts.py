"""How tensor parallelism cuts a Megatron Core parameter, told by its name.

A table's ops say the same for the architectures that have one; a checkpoint without a table has names alone.
Sources: `sharded_state_dict` and the weight shapes of ColumnParallelLinear, RowParallelLinear and their
Transformer Engine counterparts in megatron-core 0.16.1, ssm/gated_delta_net.py and ssm/mamba_mixer.py.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from converters.errors import UnsupportedError
from converters.mcore.keys import bare, inner_prefix, parse_key
from converters.rows.ops import ATOM_NAMES, Form
from converters.tensors import Shape

_COLUMN = frozenset(
    """linear_qkv linear_q_proj linear_q_up_proj linear_kv_up_proj linear_fc1 in_proj conv1d eh_proj output_layer
    word_embeddings linear_q linear_kv added_linear_qkv""".split()
)
_ROW = frozenset("linear_proj linear_fc2 out_proj added_linear_proj".split())
_WHOLE = frozenset(
    """router linear_q_down_proj linear_kv_down_proj fc1_latent_proj fc2_latent_proj position_embeddings
    shared_experts tokentype_embeddings linear_wq_b linear_wk linear_weights_proj""".split()
)
#: Bare parameters of a module, without `.weight`.
_BARE: dict[str, int | None] = {"softmax_offset": 0, "A_log": 0, "dt_bias": 0, "D": 0, "gate_weight": None}
_ATOMS = frozenset(name for names in ATOM_NAMES.values() for name in names)
#: Modules of a tower that Megatron Core's own classes make, outside its layers: by the end of their names.
_NATIVE = {
    "vision_model.merger.linear_fc1": 0,
    "vision_model.merger.linear_fc2": 1,
    "vision_model.embedder": 0,
    "vision_model.video_embedder": 0,
    "vision_projection.encoder.linear_fc1": 0,
    "vision_projection.encoder.linear_fc2": 1,
    "sound_projection.encoder.linear_fc1": 0,
    "sound_projection.encoder.linear_fc2": 1,
    "multi_modal_projector.proj": 0,
}
#: Modules of a diffusion transformer that every rank has whole, by how names within the model or a layer begin; and
#: those of a layer's modulation that are cut by rows.
_OF_DIFFUSION = frozenset(
    """patch_embedding text_embedding time_embedder time_proj head adaLN norm3 img_embed txt_embed timestep_embedding
    vector_embedding guidance_embedding norm_out proj_out""".split()
)
_MODULATION = (("adaln", "linear"), ("adaln_context", "linear"))
VOCAB = frozenset(("embedding.word_embeddings.weight", "output_layer.weight", "output_layer.bias"))


@dataclass(frozen=True, slots=True)
class Cut:
    """Dimension of the parameter (leading layers and experts not counted) that ranks share, None for a copy each.

    `gated` rows are two halves, gate and up, each cut for itself.
    """

    dim: int | None
    gated: bool = False


def is_gated(key: str, shapes: Mapping[str, Shape]) -> bool:
    """Whether a linear_fc1 holds gate and up: it has twice as many rows as its linear_fc2 has columns.

    `shapes` are of whole tensors, or of one rank's shards throughout. UnsupportedError when neither fits.
    """
    partner = key.replace("linear_fc1.bias", "linear_fc1.weight").replace("linear_fc1", "linear_fc2")
    if partner not in shapes:
        raise UnsupportedError(f"`{key}` has no `{partner}` beside it: whether it is gated cannot be told")
    depth = parse_key(key).depth
    rows, width = shapes[key][depth], shapes[partner][-1]
    if rows not in (width, 2 * width):
        raise UnsupportedError(f"`{key}` has {rows} rows and `{partner}` {width} columns: neither gated nor plain")
    return rows == 2 * width


def cut_of(key: str, gated: bool = False) -> Cut:
    """The cut of a torch_dist key; `gated` applies to linear_fc1. UnsupportedError for a name that is not known."""
    parts = parse_key(key).param.split(".")
    if parts[-1] in _ATOMS:
        parts.pop()
    leaf, module = parts[-1], parts[-2] if len(parts) > 1 else ""
    if parts[-3:] == ["mixer", "norm", "weight"]:
        return Cut(0)
    if leaf in _BARE:
        return Cut(_BARE[leaf])
    if leaf.startswith("layer_norm_") or module.endswith("norm"):
        return Cut(None)
    if module in _WHOLE or (module in _ROW and leaf == "bias"):
        return Cut(None)
    if module in _COLUMN and leaf in ("weight", "bias"):
        return Cut(0, gated and module == "linear_fc1")
    if module in _ROW and leaf == "weight":
        return Cut(1)
    if tuple(parts[-3:-1]) in _MODULATION:
        return Cut(0)
    if parts[0] in _OF_DIFFUSION:
        return Cut(None)
    raise UnsupportedError(
        f"`{key}`: how tensor parallelism cuts this parameter is not known",
        hint="a torch_dist checkpoint at ‹tp› 1 needs no cut",
    )


def is_vocab(key: str) -> bool:
    """Whether the rows of a key are the vocabulary's."""
    return bare(key) in VOCAB


def _tower_cut(key: str, keys: Collection[str]) -> Cut:
    """The cut of what stands beside a text model: every rank has the whole of Hugging Face's own modules."""
    if parse_key(key).site == "tower":
        return cut_of(key)
    module, _, leaf = key.rpartition(".")
    dim = next((dim for end, dim in _NATIVE.items() if f".{module}".endswith(f".{end}")), None)
    native = dim is not None and any(parse_key(other).site == "tower" for other in keys)
    native |= module == "multi_modal_projector.proj"
    if not native or leaf.startswith("layer_norm_") or (dim == 1 and leaf == "bias"):
        return Cut(None)
    return Cut(dim)


def form_of(cut: Cut, rows: int) -> Form:
    """The cut as a Form that `layout.boxes` takes, for a parameter of `rows` rows."""
    if cut.dim == 0 and cut.gated:
        return Form((rows // 2, rows // 2), ((1, (0, 1)),), cut=0)
    return Form((rows,), ((1, (0,)),), cut=cut.dim)


def cuts_of(shapes: Mapping[str, Shape], *, cut: bool = True) -> dict[str, Cut]:
    """The cut of every key; where nothing is to be `cut`, unknown names are whole. Raises as `cut_of` does."""
    out = {}
    inside = any(map(inner_prefix, shapes))
    for key in shapes:
        if not cut:
            out[key] = Cut(None)
        elif inside and not inner_prefix(key):
            out[key] = _tower_cut(key, shapes)
        elif ".linear_fc1." in key and not key.rpartition(".")[2].startswith("layer_norm"):
            out[key] = cut_of(key, is_gated(key, shapes))
        else:
            out[key] = cut_of(key)
    return out
