"""Codes of a table under magnitudes that may be codes themselves: decode."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import torch

from converters.codecs.arithmetic.common import Arithmetic, Parts, part
from converters.codecs.nf4 import BLOCK, NESTED_BLOCK
from converters.errors import StorageError
from converters.tensors import Shape

if TYPE_CHECKING:
    from converters.codecs.nf4 import Nf4

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def decode_nf4(codec: Nf4, parts: Parts, dtype: torch.dtype | None) -> torch.Tensor:
    """`Nf4.decode`: first to the dtype that the weights had, as the library does."""
    codes, table = part(parts, "codes", torch.uint8), part(parts, "map", torch.float32)
    shape = codec.decoded_shape({role: tuple(tensor.shape) for role, tensor in parts.items()})
    said = json.loads(bytes(part(parts, "state", torch.uint8).tolist()))
    if said.get("blocksize") != BLOCK or said.get("nested_blocksize", NESTED_BLOCK) != NESTED_BLOCK:
        raise StorageError(f"bitsandbytes' blocks of {said.get('blocksize')} are not read; of {BLOCK} are")
    magnitudes = part(parts, "absmax", torch.uint8 if codec.nested else torch.float32)
    if codec.nested:
        nested = part(parts, "nested", torch.float32).repeat_interleave(NESTED_BLOCK)[: len(magnitudes)]
        own = part(parts, "nested_map", torch.float32)
        magnitudes = own[magnitudes.long()] * nested + float(said["nested_offset"])
    flat = codes.flatten()
    values = table[torch.stack((flat >> 4, flat & 15), dim=-1).flatten().long()]
    values = values * magnitudes.repeat_interleave(BLOCK)[: len(values)]
    had, asked = _DTYPES[str(said.get("dtype"))], dtype or torch.bfloat16
    if torch.promote_types(had, asked) != asked:
        names = [str(kind).removeprefix("torch.") for kind in (had, asked)]
        raise StorageError(
            f"bitsandbytes quantised weights of {names[0]}; config.json says that the model's are {names[1]}",
            hint=f'say `"dtype": "{names[0]}"` in config.json',
        )
    return values.to(had).to(asked).reshape(shape)


def _encode(
    codec: Nf4, tensor: torch.Tensor, scale: torch.Tensor | None, shape: Shape | None
) -> dict[str, torch.Tensor]:
    raise StorageError(f"{codec.name} is read and not written")


def _any_by_scale(codec: Nf4, mask: torch.Tensor) -> torch.Tensor:
    raise StorageError(f"{codec.name} is read and not written")


NF4 = Arithmetic(decode_nf4, _encode, _any_by_scale)
