"""What stays of a model: ascending numbers of layers, and of a width's parts, as the model numbered them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from converters.errors import CoverageError
from converters.rows.pack import Rows

#: Widths that can be pruned: Megatron Core's field → the choice that asks for it.
WIDTHS: Mapping[str, str] = {
    "hidden_size": "hidden",
    "ffn_hidden_size": "ffn",
    "moe_ffn_hidden_size": "expert-ffn",
    "moe_shared_expert_intermediate_size": "shared-ffn",
    "num_attention_heads": "heads",
    "num_query_groups": "kv-heads",
    "num_moe_experts": "experts",
}
#: A layer and an expert; None where a width is the same in all.
Spot = tuple[int | None, int | None]


@dataclass(frozen=True, slots=True, eq=False)
class Kept:
    """The decoder `layers` that stay, and of each pruned width, by its field, the parts that stay at each spot.

    A width keeps as many parts at every spot. What stays is named by the unpruned model's numbers throughout. `ahead`
    says that multi-token-prediction layers stay.
    """

    layers: tuple[int, ...]
    widths: Mapping[str, Mapping[Spot, Rows]] = field(default_factory=dict)
    ahead: bool = True

    def of(self, width: str, layer: int | None, expert: int | None = None) -> Rows | None:
        """The parts of a width that stay at a layer, or an expert of it; None where all do.

        CoverageError where nothing says which.
        """
        if (sets := self.widths.get(width)) is None:
            return None
        for spot in ((layer, expert), (layer, None), (None, None)):
            if spot in sets:
                return sets[spot]
        raise CoverageError(f"nothing says which ‹{WIDTHS[width]}› stay at layer {layer}")

    def size(self, width: str) -> int:
        """How many parts of a pruned width stay."""
        return len(next(iter(self.widths[width].values())))

    def number(self, layer: int) -> int:
        """What a layer that stays is called then."""
        return self.layers.index(layer)


def in_ranges(layers: tuple[int, ...]) -> str:
    """`0-20,24` of numbers of layers, in the order that they come in; `(none)` of none."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and runs[-1][1] == layer - 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs) or "(none)"
