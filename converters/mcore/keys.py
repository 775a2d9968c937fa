"""The parts of a torch_dist key: where its layer and expert are said, in the name or as leading dimensions."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from converters.mcore.releases import CURRENT, PREDICTION_LAYERS, Release

#: What begins a key of the text model inside a larger one, told by what can follow it.
_INNER = re.compile(r"^(?:\w+\.)*?language_model\.(?=(?:embedding|decoder|mtp|output_layer)\.)")
#: Layers of the decoder and of the multi-token-prediction block.
_LAYER = re.compile(r"^(decoder|mtp)\.layers\.(?:(\d+)\.)?(.+)$")
#: Layers, and the list of mergers beside them, of a vision tower that Megatron Core's own transformer block holds.
_TOWER = re.compile(r"^((?:\w+\.)*?vision_model\.decoder\.(?:layers|deepstack_merger_list))\.(?:(\d+)\.)?(.+)$")
EXPERTS = "mlp.experts.experts."
EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"
#: The weight of the router within a layer that has experts.
ROUTER = "mlp.router.weight"
#: The field that says that the one is the other as well.
TIED = "model.share_embeddings_and_output_weights"
ONE_EXPERT = re.compile(r"mlp\.experts\.experts\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class Key:
    """A key taken apart: `site` ("decoder", "mtp", "tower" or ""), `param` within the layer, and where numbers stand.

    The text model's keys are taken without what a model around it puts before them. `layer` is the number in the key;
    `stacked` says that the layers are the first dimension instead.
    `experts` says that the experts are a leading dimension, behind the layers if both are.
    """

    site: str
    layer: int | None
    param: str
    stacked: bool
    experts: bool

    @property
    def depth(self) -> int:
        """Leading dimensions that are no part of the parameter itself."""
        return int(self.stacked) + int(self.experts)

    def at(self, index: tuple[int, ...]) -> tuple[int | None, int | None]:
        """Layer and expert of the entry at `index` of the leading dimensions, None where there is none."""
        layer = index[0] if self.stacked else self.layer
        return layer if self.site == "decoder" else None, index[-1] if self.experts else None


def inner_prefix(key: str) -> str:
    """What a model around the text model puts before a key of it; empty for every other key."""
    return found[0] if (found := _INNER.match(key)) else ""


def bare(key: str) -> str:
    """A key of a text model as it is where nothing is around that; every other key as it is."""
    return key[len(inner_prefix(key)) :]


def held_as(wanted: str, keys: Iterable[str]) -> str:
    """The key among `keys` that is `wanted` but for what stands before a text model; `wanted` where there is none."""
    return next((key for key in keys if key.endswith(wanted) and bare(key) == wanted), wanted)


def parse_key(key: str) -> Key:
    """Parts of a torch_dist key; a key outside the layers is all `param`."""
    if tower := _TOWER.match(key):
        return Key("tower", int(tower[2]) if tower[2] else None, tower[3], not tower[2], False)
    key = bare(key)
    match = _LAYER.match(key)
    if match is None:
        return Key("", None, key, False, False)
    site, number, param = match.groups()
    stacked = number is None and site == "decoder"
    return Key(
        site,
        None if number is None else int(number),
        param,
        stacked,
        EXPERTS in param and not ONE_EXPERT.search(param),
    )


#: Megatron Core's own local spec also calls the norm of a MoE layer by the dense layer's fused name.
_MISNAMED = ("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm.", "mlp.router.weight")


#: What mcore-bridge calls norms of its own classes.
_ALIASES = {
    "self_attention.q_norm.": "self_attention.q_layernorm.",
    "self_attention.k_norm.": "self_attention.k_layernorm.",
}


#: Norms that are the layer's own: nothing is fused in such a layer (Gemma 4 and Kimi K3 in Megatron-Bridge).
_APART = ("post_mlp_layernorm.weight", "mlp_res_norm.weight")


def canonical_names(keys: Collection[str], release: Release = CURRENT) -> dict[str, str]:
    """Each key → its name in Transformer Engine's spelling, whichever layer spec wrote it.

    Norms of their own become the fused names where Transformer Engine fuses them, and fused ones their own where it
    does not. Law: applied to its own values it changes nothing.
    """
    present = set(keys)
    apart = [
        norm for norm in release.fused_norms if norm.apart_beside and any(norm.apart_beside in key for key in present)
    ]
    fused_norms = [norm for norm in release.fused_norms if norm not in apart]
    out = {}
    for key in keys:
        prefix = _layer_prefix(key)
        name = key[len(prefix) :]
        out[key] = key
        for own, usual in _ALIASES.items():
            if name.startswith(own) and prefix + usual + name[len(own) :] not in present:
                out[key] = prefix + usual + name[len(own) :]
        if not prefix or any(prefix + norm in present for norm in _APART):
            continue
        for norm in apart:
            if name.startswith(norm.fused):
                out[key] = prefix + norm.own + name[len(norm.fused) :]
        for norm in fused_norms:
            if name.startswith(norm.own) and prefix + norm.witness in present:
                out[key] = prefix + norm.fused + name[len(norm.own) :]
                break
        else:
            fused, own, router = _MISNAMED
            dense = prefix + "mlp.linear_fc1.weight"
            if name.startswith(fused) and prefix + router in present and dense not in present:
                out[key] = prefix + own + name[len(fused) :]
    return out


def _layer_prefix(key: str) -> str:
    match = _LAYER.match(bare(key))
    if match is None:
        return ""
    prefix = key[: len(key) - len(match[3])]
    inner = match[3].partition(".")[0]
    if inner in PREDICTION_LAYERS:
        prefix += f"{inner}."
    return prefix
