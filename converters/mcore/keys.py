"""The parts of a torch_dist key: where its layer and expert are said, in the name or as leading dimensions."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

from converters.mcore.releases import CURRENT, PREDICTION_LAYERS, Release

#: Layers of the decoder and of the multi-token-prediction block.
_LAYER = re.compile(r"^(decoder|mtp)\.layers\.(?:(\d+)\.)?(.+)$")
EXPERTS = "mlp.experts.experts."
ONE_EXPERT = re.compile(r"mlp\.experts\.experts\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class Key:
    """A key taken apart: `site` ("decoder", "mtp" or ""), `param` within the layer, and where numbers stand.

    `layer` is the number in the key; `stacked` says that the layers are the first dimension instead.
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
        layer = index[0] if self.stacked else self.layer if self.site == "decoder" else None
        return layer, index[-1] if self.experts else None


def parse_key(key: str) -> Key:
    """Parts of a torch_dist key; a key outside the layers is all `param`."""
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


def canonical_names(keys: Collection[str], release: Release = CURRENT) -> dict[str, str]:
    """Each key → its name in Transformer Engine's spelling, whichever layer spec wrote it.

    Norms of their own become the fused names where Transformer Engine fuses them. Law: applied to its own
    values it changes nothing.
    """
    present = set(keys)
    out = {}
    for key in keys:
        prefix = _layer_prefix(key)
        name = key[len(prefix) :]
        out[key] = key
        if not prefix:
            continue
        for norm in release.fused_norms:
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
    match = _LAYER.match(key)
    if match is None:
        return ""
    prefix = key[: len(key) - len(match[3])]
    inner = match[3].partition(".")[0]
    if inner in PREDICTION_LAYERS:
        prefix += f"{inner}."
    return prefix
