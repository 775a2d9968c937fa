"""Drawn pictures for the classes of Transformers that see, a prompt around them, and what a class made of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from mbx.formats.hf import read_config
from mbx.models.pictures import EVERY, WINDOWED, Pictures, Seen
from mbx.models.prompts import Batch
from mbx.models.transformers.equivalents import Twin, twin_of
from mbx.models.transformers.reference import transformers_config

if TYPE_CHECKING:
    import torch

    #: Tokens that each picture takes, and what the class takes of all.
    Drawn: TypeAlias = tuple[list[int], dict[str, torch.Tensor]]

#: Merged patches of two drawn pictures, high and wide. Neither is square: height and width turn by other angles.
_GRIDS = ((2, 3), (3, 2))
#: Tokens of text before, between and behind the pictures.
_TEXT = (7, 5, 9)


@dataclass(frozen=True, slots=True)
class Kind:
    """How the classes of one kind take pictures: `draw(config, generator)`, and what `Pictures` says of these."""

    draw: Callable[[Any, torch.Generator], Drawn]
    two_way: Callable[[Any], str] = lambda config: ""
    under: Callable[[Any], bool] = lambda config: False


def _patches(config: Any, generator: torch.Generator) -> Drawn:
    """Flattened patches of all pictures, one behind the other, and their grids in patches."""
    import torch

    vision = config.vision_config
    channels = getattr(vision, "in_channels", None) or vision.num_channels
    merge, size = vision.spatial_merge_size, channels * vision.temporal_patch_size * vision.patch_size**2
    grids = torch.tensor([[1, high * merge, wide * merge] for high, wide in _GRIDS])
    pixels = torch.randn(int(grids.prod(-1).sum()), size, generator=generator)
    return [high * wide for high, wide in _GRIDS], {"pixel_values": pixels, "image_grid_thw": grids}


def _cut_patches(config: Any, generator: torch.Generator) -> Drawn:
    """The same, of patches that are still pictures: [patches, 3, height, width]."""
    import torch

    vision = config.vision_config
    high, wide = vision.merge_kernel_size
    grids = torch.tensor([[1, rows * high, columns * wide] for rows, columns in _GRIDS])
    pixels = torch.randn(int(grids.prod(-1).sum()), 3, vision.patch_size, vision.patch_size, generator=generator)
    return [rows * columns for rows, columns in _GRIDS], {"pixel_values": pixels, "image_grid_thw": grids}


def _squares(tokens: Callable[[Any], int]) -> Callable[[Any, torch.Generator], Drawn]:
    """Pictures of the one size that the tower takes, each `tokens(config)` long."""

    def draw(config: Any, generator: torch.Generator) -> Drawn:
        import torch

        size = config.vision_config.image_size
        high, wide = size if isinstance(size, list | tuple) else (size, size)
        return [tokens(config)] * 2, {"pixel_values": torch.randn(2, 3, high, wide, generator=generator)}

    return draw


def _sized(config: Any, generator: torch.Generator) -> Drawn:
    """Pictures of any size, padded to the largest, and their sizes in pixels."""
    import torch

    side = config.vision_config.patch_size * config.spatial_merge_size
    sizes = torch.tensor([[high * side, wide * side] for high, wide in _GRIDS])
    high, wide = sizes.amax(0).tolist()
    pixels = torch.randn(len(_GRIDS), 3, high, wide, generator=generator)
    return [high * wide for high, wide in _GRIDS], {"pixel_values": pixels, "image_sizes": sizes}


def _placed_patches(config: Any, generator: torch.Generator) -> Drawn:
    """Flattened patches of each picture, and where each patch stands in it, across and down."""
    import torch

    vision, pooled = config.vision_config, config.vision_config.pooling_kernel_size
    places = [torch.cartesian_prod(*(torch.arange(side * pooled) for side in sides)).flip(1) for sides in _GRIDS]
    pixels = torch.rand(len(places), len(places[0]), 3 * vision.patch_size**2, generator=generator)
    return [high * wide for high, wide in _GRIDS], {"pixel_values": pixels, "image_position_ids": torch.stack(places)}


def _shuffled(ratio: Callable[[Any], float]) -> Callable[[Any], int]:
    """Tokens of a square picture whose patches are merged by `ratio(config)` of each side."""

    def tokens(config: Any) -> int:
        vision = config.vision_config
        sides = zip(_pair(vision.image_size), _pair(vision.patch_size), strict=True)
        high, wide = (int(size // patch * ratio(config)) for size, patch in sides)
        return high * wide

    return tokens


def _pair(size: Any) -> tuple[int, int]:
    return (size[0], size[1]) if isinstance(size, list | tuple) else (size, size)


_PATCHES = Kind(_patches)
#: Model type → how its class takes pictures.
KINDS: Mapping[str, Kind] = {
    "gemma3": Kind(_squares(lambda config: config.mm_tokens_per_image), two_way=lambda config: EVERY),
    "gemma4": Kind(
        _placed_patches,
        two_way=lambda config: WINDOWED if config.text_config.use_bidirectional_attention == "vision" else "",
        under=lambda config: bool(config.text_config.hidden_size_per_layer_input),
    ),
    "glm4v": _PATCHES,
    "glm4v_moe": _PATCHES,
    "internvl": Kind(_squares(_shuffled(lambda config: config.downsample_ratio))),
    "kimi_k25": Kind(_cut_patches),
    "llama4": Kind(_squares(_shuffled(lambda config: config.vision_config.pixel_shuffle_ratio))),
    "minimax_m3_vl": _PATCHES,
    "mistral3": Kind(_sized),
    "qwen2_vl": _PATCHES,
    "qwen2_5_vl": _PATCHES,
    "qwen3_vl": _PATCHES,
    "qwen3_vl_moe": _PATCHES,
    "qwen3_5": _PATCHES,
    "qwen3_5_moe": _PATCHES,
}


def sees(config: Mapping[str, Any]) -> bool:
    """Whether pictures can be drawn for the class of a config.json."""
    return config.get("model_type") in KINDS and isinstance(config.get("vision_config"), Mapping)


def compared_as(config: Mapping[str, Any]) -> Twin | None:
    """The twin that a forward comparison runs a config.json's model as; None for a class of its own, which runs whole.

    A model that sees is its own reference, though a training takes its text model alone.
    """
    return None if sees(config) else twin_of(config)


def pictured_pass(hf_dir: Path, vocab: int, seed: int) -> Batch | None:
    """Two drawn pictures within drawn text, for the class of a folder; None for one that sees nothing.

    The token of the config stands for a picture, the last of the `vocab` where it lies outside.
    """
    import torch

    raw = read_config(hf_dir)
    if not sees(raw):
        return None
    kind, config = KINDS[str(raw["model_type"])], transformers_config(hf_dir, whole=True)
    generator = torch.Generator().manual_seed(seed)
    counts, inputs = kind.draw(config, generator)
    named = picture_token(config, vocab)
    token = vocab - 1 if named is None else named
    text = torch.randint(0, vocab - 1, (sum(_TEXT),), generator=generator)
    parts: list[torch.Tensor] = list(torch.split(text + (text >= token), list(_TEXT)))  # any token but that one
    for number, count in enumerate(counts):
        parts.insert(2 * number + 1, torch.full((count,), token))
    ids = torch.cat(parts)
    if under := kind.under(config):
        ids[0] = config.text_config.pad_token_id
    return Batch(ids[None], pictures=Pictures(token, inputs, kind.two_way(config), under))


def picture_token(config: Any, vocab: int) -> int | None:
    """The token that stands for a picture's features by a class's `config`; None where it is none of `vocab`."""
    named = getattr(config, "image_token_id", None)
    return named if isinstance(named, int) and 0 <= named < vocab else None


def name_picture(frame: Any, token: int, under: int) -> None:
    """Tell every part of a model that sees that `token`, and no other, stands for a picture, film or sound.

    `under` is the token whose embedding stands there before its features do.
    """
    named = {"image_token_id": token, "video_token_id": -1, "audio_token_id": -1, "pad_token_id": under}
    for module in frame.modules():
        config = getattr(module, "config", None)
        for name, value in named.items():
            if hasattr(config, name):
                setattr(config, name, value)


def arguments(batch: Batch, takes: Mapping[str, object], dtype: torch.dtype, device: str) -> dict[str, torch.Tensor]:
    """What a class whose forward `takes` these arguments is given beside `batch.ids`; pixels in `dtype`."""
    pictures = batch.pictures
    if pictures is None:
        return {}
    kinds = pictures.places(batch.ids).long().to(device)
    given = {name: kinds for name in ("mm_token_type_ids", "token_type_ids") if name in takes}
    for name, value in pictures.inputs.items():
        given[name] = value.to(device, dtype) if value.is_floating_point() else value.to(device)
    return given


def seen(batch: Batch, decoder: Mapping[str, Any]) -> Seen | None:
    """What the tower made of a pass's pictures, from the arguments that its class gave the text `decoder`."""
    pictures = batch.pictures
    if pictures is None:
        return None
    embeddings = decoder["inputs_embeds"]
    here = pictures.places(batch.ids).to(embeddings.device)
    positions = decoder.get("position_ids")
    if positions is not None:  # some classes count text in a row of its own before
        positions = positions[-3:] if positions.dim() == 3 else None
    return Seen(embeddings[here], tuple(decoder.get("deepstack_visual_embeds") or ()), positions)
