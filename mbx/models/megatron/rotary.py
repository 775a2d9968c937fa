"""Megatron Core's rotary tables: at other positions, and with frequencies that its own arguments cannot express."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from converters.errors import LayoutError, UnsupportedError, UsageError
from converters.rows.expr import Value
from converters.rows.isos import inexpressible_rope
from mbx.models.transformers.reference import transformers_config

if TYPE_CHECKING:
    import torch
    from torch import nn

#: Whose rotary parameters are the model's where layers of two kinds have their own.
_FULL = "full_attention"


@contextlib.contextmanager
def rotated_at(
    model: nn.Module, positions: torch.Tensor | None, axes: Sequence[int] = (), count: int | None = None
) -> Iterator[None]:
    """Make the rotary tables of `model` those of `positions`; mcore itself counts 0, 1, 2, … from the length.

    `positions: [s]`, or `[3, b, s]` by time, height and width, of which `axes` names the one that each pair of
    dimensions turns by; all are below `count`, which is found where it is None. Raises LayoutError where there are not
    as many axes as pairs.
    """
    if positions is None:
        yield
        return
    from mbx.models.megatron.core.rotary import RotaryEmbedding

    length = int(positions.max()) + 1 if count is None else count

    def lengthen(module: nn.Module, args: tuple[object, ...]) -> tuple[object, ...]:
        del module
        return (length, *args[1:])

    def pick(module: nn.Module, args: object, output: object) -> object:
        del args
        table, *rest = output if isinstance(output, tuple) else (output,)  # YaRN: the table and its magnitude
        at = positions.to(table.device)
        found = (
            table[at] if at.dim() == 1 else _turned(table, at, axes, bool(getattr(module, "rotary_interleaved", 0)))
        )
        return (found, *rest) if rest else found

    handles = []
    for module in model.modules():
        if isinstance(module, RotaryEmbedding):
            handles += [module.register_forward_pre_hook(lengthen), module.register_forward_hook(pick)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _turned(table: torch.Tensor, positions: torch.Tensor, axes: Sequence[int], interleaved: bool) -> torch.Tensor:
    """Angles of `positions: [3, b, s]` from `table: [length, 1, 1, d]`, a row a position: [s, b, 1, d].

    Dimensions of a pair stand beside each other where `interleaved`, else half the width apart.
    """
    width = table.shape[-1]
    if len(axes) * 2 != width:
        raise LayoutError(f"mrope_section names an axis for {len(axes)} rotary pairs; the model turns {width // 2}")
    by_column = _axis_of_columns(tuple(axes), interleaved, table.device)
    angles = table[:, 0, 0][positions]  # [3, b, s, d]
    picked = angles.gather(0, by_column.expand(1, *angles.shape[1:]))[0]
    return picked.transpose(0, 1)[:, :, None]


@cache  # a pass that is recorded as a CUDA graph can copy nothing from the processor
def _axis_of_columns(axes: tuple[int, ...], interleaved: bool, device: torch.device) -> torch.Tensor:
    import torch

    by_pair = torch.tensor(axes, device=device)
    return by_pair.repeat_interleave(2) if interleaved else by_pair.repeat(2)


def axes_of_pairs(sections: Sequence[int], interleaved: bool) -> list[int]:
    """Which of time, height and width (0, 1, 2) each rotary pair turns by, `sections` saying how many turn by each.

    One axis behind the other (Qwen2-VL), or `interleaved`: height and width take every third pair in turn, as far as
    their numbers go, and time the rest (Qwen3-VL).
    """
    if not interleaved:
        return [axis for axis, count in enumerate(sections) for _ in range(count)]
    axes = [0] * sum(sections)
    for axis in (1, 2):
        axes[axis : 3 * sections[axis] : 3] = [axis] * sections[axis]
    return axes


def lend_frequencies(model: nn.Module, hf_path: Path, hf_config: Mapping[str, Value]) -> tuple[str, ...]:
    """Give `model` Transformers' rotary frequencies where Megatron Core's constants differ; returns what differed."""
    lent = tuple(inexpressible_rope(hf_config))
    if lent:
        set_rope_frequencies(model, transformers_frequencies(hf_path))
    return lent


def transformers_frequencies(hf_dir: Path) -> torch.Tensor:
    """Transformers' own rotary frequencies of a checkpoint with scaled positions: [rotary_dim / 2], fp32.

    Raises `UnsupportedError` where its scaling also multiplies the tables, which Megatron Core's RotaryEmbedding
    does not, or where Transformers has no such scaling.
    """
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = transformers_config(hf_dir).get_text_config()
    said = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    by_kind = {"layer_type": _FULL} if isinstance(said.get(_FULL), Mapping) else {}
    kind = (said[_FULL] if by_kind else said).get("rope_type")
    if kind not in ROPE_INIT_FUNCTIONS:
        raise UnsupportedError(f"Transformers scales no rotary positions of type {kind!r}")
    inv_freq: torch.Tensor
    inv_freq, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), **by_kind)
    if factor != 1.0:
        raise UnsupportedError(f"rotary scaling {kind!r} multiplies its tables by {factor}; Megatron Core does not")
    return inv_freq


def set_rope_frequencies(model: nn.Module, inv_freq: torch.Tensor) -> None:
    """Give a Megatron Core model rotary frequencies that its own arguments cannot express.

    `inv_freq: [rotary_dim / 2]`, radians per position, fp32. Megatron Core fixes Llama 3's constants (low 1, high 4,
    original length 8192; `RotaryEmbedding._apply_scaling`); a model with others is compared under its own, and the
    caller says so. Raises `UnsupportedError` where the model has no such table (learned positions, YaRN, MLA),
    `UsageError` for another number of frequencies.
    """
    from mbx.models.megatron.core.rotary import RotaryEmbedding, forget_tables

    rope = getattr(model, "rotary_pos_emb", None)
    if rope is None or type(rope) is not RotaryEmbedding:
        raise UnsupportedError(
            f"rotary frequencies can be set on RotaryEmbedding only, the model has {type(rope).__name__}"
        )
    if inv_freq.shape != rope.inv_freq.shape:
        raise UsageError(f"inv_freq must be {list(rope.inv_freq.shape)}, got {list(inv_freq.shape)}")
    rope.inv_freq = inv_freq.detach().to(rope.inv_freq)
    forget_tables()  # the caches are the classes', keyed by instance and length


def turn_a_share(model: nn.Module, share: float) -> None:
    """Leave all but the fastest `share` of the rotary pairs where they are (Transformers: type "proportional").

    Frequencies are those of the whole head, which is what sets it apart from a share of the head that turns.
    """
    if (rope := getattr(model, "rotary_pos_emb", None)) is not None:
        frequencies = rope.inv_freq.clone()
        frequencies[int(share * 2 * len(frequencies) // 2) :] = 0.0
        set_rope_frequencies(model, frequencies)
