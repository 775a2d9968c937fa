"""What images add to a rank of the first pipeline stage: a tower, and what it works on.

A frozen tower keeps nothing, so it is largest while one of its layers runs: the pixels, the layer's states and its
widest product, over all patches of a micro-batch. Earlier micro-batches may be in flight then. A tower that is trained
keeps as much of each of its layers until its backward pass, behind the text model's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mbx.train.budget.load import BYTES
from mbx.train.recipe.sections import Recipe

if TYPE_CHECKING:
    from mbx.train.model.sight import Sight

#: States of a layer beside its widest product: the residual, its norm, the product's input, an fp32 norm's two.
_STATES = 7


@dataclass(frozen=True, slots=True)
class Looks:
    """A tower's `parameters` and `depth` in layers, the `width` of its states and of its `widest` product, the
    `patches` behind a token of an image and the numbers of a `patch`, and the most `tokens` of images in a row."""

    parameters: int
    depth: int
    width: int
    widest: int
    patches: float
    patch: int
    tokens: int

    def weights(self, recipe: Recipe) -> int:
        """Bytes of the tower."""
        return self.parameters * BYTES[recipe.train.precision]

    def working(self, recipe: Recipe) -> int:
        """Bytes that the tower works on at most, for a micro-batch: pixels come in fp32 and are cast."""
        b = BYTES[recipe.train.precision]
        patches = round(self.patches * self.tokens * recipe.train.micro_batch)
        layers = self.depth if recipe.train.tower == "trained" else 1
        return patches * (self.patch * (4 + b) + layers * (_STATES * self.width + self.widest) * b)


def looks_of(sight: Sight, tokens: int) -> Looks:
    """What a model's tower comes to, for rows with so many `tokens` of images; from its class, without weights."""
    import torch
    from torch import nn

    from mbx.models.transformers.tower import unfilled

    model: Any = unfilled(sight.folder)
    text = {id(p) for part in (model.get_decoder(), model.get_output_embeddings()) for p in part.parameters()}
    beside = [p for p in model.parameters() if id(p) not in text]
    inside = [m for m in model.modules() if isinstance(m, nn.Linear) and id(m.weight) not in text]
    convs = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Conv3d)) and id(m.weight) not in text]
    vision: Mapping[str, Any] = model.config.vision_config.to_dict()
    return Looks(
        sum(p.numel() for p in beside),
        int(vision.get("depth") or vision["num_hidden_layers"]),
        convs[0].out_channels,
        max(m.out_features for m in inside),
        _patches(vision, model.config),
        int(torch.tensor(convs[0].weight.shape[1:]).prod()),
        tokens,
    )


def _patches(vision: Mapping[str, Any], config: Any) -> float:
    """Patches that become one token of the text model."""
    if merge := vision.get("spatial_merge_size"):
        return float(merge) ** 2
    side = int(vision["image_size"]) // int(vision["patch_size"])
    return side**2 / float(config.mm_tokens_per_image)
