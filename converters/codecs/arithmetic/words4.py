"""Unsigned 4-bit codes about a zero, eight to a word: decode and encode."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from converters.codecs.arithmetic.common import Arithmetic, Parts, divisors, part, require_finite
from converters.codecs.words4 import PER_WORD
from converters.errors import StorageError
from converters.tensors import Shape

if TYPE_CHECKING:
    from converters.codecs.words4 import Words4

_SHIFTS = 4 * torch.arange(PER_WORD, dtype=torch.int32)
#: Which output of eight lies in each of a word's nibbles, from the lowest on.
_AWQ_ORDER = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
_LARGEST = 15
#: One in every nibble of a word.
_ONES = 0x11111111


def decode_words4(codec: Words4, parts: Parts, dtype: torch.dtype | None) -> torch.Tensor:
    """`Words4.decode`."""
    codes, scale = part(parts, "codes", torch.int32), part(parts, "scale", torch.float16, torch.bfloat16)
    zeros, group = _zeros(codec, parts), _group_of(codec, parts, codes)
    unpacked = _unpack(codes, codec.awq) if codec.awq else _unpack(codes.t(), False).t()
    # [in, out]: whole numbers that the scale's dtype holds, then one product
    values = (unpacked - zeros[group]).to(scale.dtype) * scale[group]
    return values.t().to(dtype or scale.dtype)


def encode_words4(
    codec: Words4, tensor: torch.Tensor, scale: torch.Tensor | None, _shape: Shape | None
) -> dict[str, torch.Tensor]:
    """`Words4.encode`, about the zeros that the codec holds."""
    if any(role not in codec.held for role in codec.constant_parts):
        raise StorageError(f"{codec.name}: the source's zeros are not at hand, about which its codes lie")
    values = tensor.t().to(torch.float32)
    require_finite(values.abs().amax(dim=0), codec.name)
    held = {role: codec.held[role].to(tensor.device) for role in codec.constant_parts}
    zeros, group = _zeros(codec, held), _group_of(codec, held, None, tensor.shape[1]).to(tensor.device)
    if scale is None:
        scale = _scales_of(values, zeros, group).to(torch.float16)
    codes = ((values / divisors(scale)[group]).round_() + zeros[group]).clamp_(0, _LARGEST).to(torch.int32)
    words = _pack(codes, True) if codec.awq else _pack(codes.t(), False).t()
    return {"codes": words.contiguous(), "scale": scale, **held}


def any_by_words4_scale(codec: Words4, mask: torch.Tensor) -> torch.Tensor:
    """`Words4.any_by_scale`."""
    inputs = mask.t()
    group = _group_of(codec, codec.held, None, inputs.shape[0])
    group = group.to(mask.device)
    count = torch.zeros((int(group.max()) + 1, inputs.shape[1]), dtype=torch.int32, device=mask.device)
    return count.index_add_(0, group, inputs.to(torch.int32)) > 0


def _scales_of(values: torch.Tensor, zeros: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    """Least scale [groups, out] under which every value of a group lies between code 0 and 15."""
    index = group.unsqueeze(1).expand_as(values)
    none = torch.zeros(zeros.shape, device=values.device)
    high, low = none.scatter_reduce(0, index, values, "amax"), none.scatter_reduce(0, index, values, "amin")
    above, below = (_LARGEST - zeros).clamp(min=1), zeros.clamp(min=1)
    scale = torch.maximum(high / above, -low / below)
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def _zeros(codec: Words4, parts: Parts) -> torch.Tensor:
    """Zeros [groups, out]. GPTQ's one is taken off whole words: a zero of 0 borrows from the next."""
    words = part(parts, "zeros", torch.int32)
    return _unpack(words if codec.awq else words + codec.zero_offset * _ONES, codec.awq)


def _group_of(codec: Words4, parts: Parts, codes: torch.Tensor | None, width: int = 0) -> torch.Tensor:
    """Number of each input's group, int64 [in]."""
    if not codec.awq:
        group = part(parts, "groups", torch.int32, torch.int64).long()
        zeros = parts["zeros"]
        if bool((group < 0).any()) or bool((group >= zeros.shape[0]).any()):
            raise StorageError(f"`g_idx` names groups beyond the {zeros.shape[0]} that are stored")
        return group
    inputs = width if codes is None else codes.shape[0]
    return torch.arange(inputs, device=parts["zeros"].device) // (codec.group or inputs)


def _unpack(words: torch.Tensor, awq: bool) -> torch.Tensor:
    """int32 [n, m] → [n, 8 m] codes of 0 to 15."""
    nibbles = (words.unsqueeze(-1) >> _SHIFTS.to(words.device)) & _LARGEST
    if awq:
        nibbles = nibbles[..., torch.argsort(_AWQ_ORDER)]
    return nibbles.flatten(1)


def _pack(codes: torch.Tensor, awq: bool) -> torch.Tensor:
    """[n, 8 m] codes → int32 [n, m]."""
    nibbles = codes.reshape(codes.shape[0], -1, PER_WORD)
    if awq:
        nibbles = nibbles[..., _AWQ_ORDER]
    return (nibbles.to(torch.int32) << _SHIFTS.to(codes.device)).sum(-1, dtype=torch.int64).to(torch.int32)


WORDS4 = Arithmetic(decode_words4, encode_words4, any_by_words4_scale)
