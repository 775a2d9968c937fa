"""Boxes of a tensor encoded by themselves: the parts of the whole, wherever a codec says that one may cut."""

from __future__ import annotations

import pytest
import torch

from converters.codecs import Codec, Fp8Block, Fp8Scaled, Int4Packed, Mxfp4, Mxfp8, Nvfp4, Words4
from converters.codecs.int8 import Int8
from converters.codecs.mx import Mxfp4Packed
from converters.tensors import Shape

#: Each with a tensor's shape and boxes that make it, of which none is one of the others' mirror.
CODECS: dict[str, tuple[Codec, Shape, tuple[tuple[tuple[int, int], ...], ...]]] = {
    "fp8_block": (Fp8Block((16, 32)), (40, 80), (((0, 16), (0, 80)), ((16, 40), (0, 32)), ((16, 40), (32, 80)))),
    "fp8_stack": (Fp8Block((16, 32)), (3, 40, 80), (((0, 2), (0, 40), (0, 64)), ((2, 3), (16, 40), (64, 80)))),
    "fp8_channel": (Fp8Scaled("channel"), (40, 80), (((0, 7), (0, 80)), ((7, 40), (0, 80)))),
    "mxfp8": (Mxfp8(), (40, 96), (((0, 7), (0, 32)), ((7, 40), (32, 96)))),
    "mxfp4": (Mxfp4Packed(), (40, 96), (((0, 7), (0, 32)), ((7, 40), (32, 96)))),
    "mxfp4_experts": (Mxfp4(), (3, 96, 40), (((0, 1), (0, 32), (0, 7)), ((1, 3), (32, 96), (7, 40)))),
    "int4": (Int4Packed(16), (40, 80), (((0, 7), (0, 16)), ((7, 40), (16, 80)))),
    "int4_row": (Int4Packed(None), (40, 80), (((0, 7), (0, 80)), ((7, 40), (0, 80)))),
    "int8": (Int8(), (40, 80), (((0, 7), (0, 80)), ((7, 40), (0, 80)))),
    "int8_packed": (Int8(packed=True, group=16), (40, 80), (((0, 7), (0, 16)), ((7, 40), (16, 80)))),
}
#: Those whose scales reach over boxes of any columns.
SHARED: dict[str, Codec] = {
    "fp8_channel": Fp8Scaled("channel", scale_dtype="BF16"),
    "fp8_tensor": Fp8Scaled("tensor"),
    "int8": Int8(),
    "nvfp4": Nvfp4(),
    "nvfp4_inverse": Nvfp4(inverse=True),
}


def values_of(shape: Shape) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(shape, generator=generator)
        .mul_(torch.rand(shape[0], generator=generator).view(-1, *[1] * (len(shape) - 1)))
        .bfloat16()
    )


def picked(tensor: torch.Tensor, box: tuple[tuple[int, int], ...]) -> torch.Tensor:
    return tensor[tuple(slice(*span) for span in box)]


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    bits = (one.contiguous().view(-1).view(torch.uint8) for one in (a, b))
    return a.shape == b.shape and torch.equal(*bits)


@pytest.mark.parametrize("name", CODECS)
def test_a_box_is_encoded_as_in_the_whole(name: str) -> None:
    codec, shape, boxes = CODECS[name]
    values = values_of(shape)
    whole = codec.encode(values)
    for box in boxes:
        made = codec.encode(picked(values, box), shape=shape)
        for role, part in whole.items():
            grain = codec.grain(role, shape)
            assert grain is not None
            for (start, stop), size, dim in zip(box, grain, shape, strict=True):
                assert start % size == 0 and (stop == dim or stop % size == 0), "the test cuts where it may"
            assert same(made[role], picked(part, codec.part_box(role, box, shape))), (role, box)


@pytest.mark.parametrize("name", SHARED)
def test_boxes_of_one_scale_need_its_largest_magnitude_alone(name: str) -> None:
    codec, shape = SHARED[name], (40, 96)
    values = values_of(shape)
    whole, role = codec.encode(values), str(codec.maxima_role)
    grain = codec.grain(role, shape) or ()
    largest = values.abs().amax([dim for dim, size in enumerate(grain) if size > 1], keepdim=True).float()
    assert all(size in (1, dim) for size, dim in zip(grain, shape, strict=True))
    alone = []
    for box in (((0, 7), (0, 32)), ((7, 40), (32, 96))):
        own = picked(largest.view(whole[role].shape), codec.part_box(role, box, shape))
        made = codec.encode_under(picked(values, box), own, shape=shape)
        assert all(same(made[r], picked(part, codec.part_box(r, box, shape))) for r, part in whole.items()), box
        alone.append(same(codec.encode(picked(values, box), shape=shape)[role], made[role]))
    assert not all(alone), "a box's own scale is another"


def test_words_of_several_rows_have_no_boxes() -> None:
    assert Words4().grain("codes", (16, 16)) is None
    with pytest.raises(AssertionError, match="no scale that largest magnitudes decide"):
        Mxfp8().encode_under(torch.ones(1, 32), torch.ones(1, 1), shape=(1, 32))
