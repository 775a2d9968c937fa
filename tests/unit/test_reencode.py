"""Encoding again: how far values move, that they move once, and which scales stay."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from converters.codecs import Codec, Fp8Block, Fp8Scaled, Int4Packed, Mxfp4, Mxfp4Packed, Mxfp8
from converters.codecs.arithmetic.common import scale_to_fp32
from converters.codecs.arithmetic.reencode import reencode
from converters.engine.pieces import DECODE_SCRATCH, ENCODED_COPIES
from tests.unit._torch_memory import peak_bytes

CODECS: dict[str, Codec] = {
    "fp8_block": Fp8Block(block=(16, 32)),
    "fp8_block_bf16": Fp8Block(block=(16, 32), scale_dtype="BF16"),
    "fp8_block_ue8m0": Fp8Block(block=(16, 32), scale_rule="ue8m0", scale_dtype="U8"),
    "fp8_channel": Fp8Scaled(),
    "fp8_tensor": Fp8Scaled(strategy="tensor", scale_suffix="_scale_inv"),
    "mxfp4": Mxfp4(),
    "int4": Int4Packed(),
    "mxfp8_rows": Mxfp8(),
    "mxfp4_rows": Mxfp4Packed(),
}
named = pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
seeds = st.integers(0, 2**31 - 1)
laws = settings(max_examples=15, deadline=None)


def weight(codec: Codec, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Values of very different sizes; not a multiple of a block where the codec allows that."""
    g = torch.Generator().manual_seed(seed)
    shape = (
        (3, 64, 24) if isinstance(codec, Mxfp4) else (40, 96) if isinstance(codec, (Mxfp8, Mxfp4Packed)) else (40, 80)
    )
    values = torch.randn(shape, generator=g) * torch.rand(*shape[:-1], 1, generator=g)
    return values.to(dtype)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Elements as whole numbers, flat."""
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.reshape(-1).view(words[tensor.element_size()])


def step(codec: Codec, x: torch.Tensor, parts: dict[str, torch.Tensor]) -> torch.Tensor:
    """The most that storing may move each value: half the distance of codes around it, and the rounding to bf16."""
    scale = scale_to_fp32(parts["scale"])
    if isinstance(codec, Mxfp4):  # codes up to 6, at most 2 apart
        spread, half = scale.transpose(1, 2).repeat_interleave(32, 1), 1.0
    elif isinstance(codec, (Mxfp8, Mxfp4Packed)):
        spread, half = scale.repeat_interleave(32, 1), 1.0 if isinstance(codec, Mxfp4Packed) else 2.0**-10
    elif isinstance(codec, Int4Packed):  # 7.5 scales, rounded to bf16, and 7 is the last code
        spread, half = scale.repeat_interleave(32, 1)[:, : x.shape[1]], 0.55
    elif isinstance(codec, Fp8Block):
        wide = scale.repeat_interleave(codec.block[0], 0).repeat_interleave(codec.block[1], 1)
        spread, half = wide[: x.shape[0], : x.shape[1]], 2.0**-10
    else:
        spread, half = scale.reshape(-1, 1).expand(x.shape), 2.0**-10
    relative = 0.0 if isinstance(codec, (Mxfp4, Mxfp4Packed, Int4Packed)) else 1 / 16
    return half * spread + (relative + 2.0**-8) * x.abs()


@named
@laws
@given(seed=seeds)
def test_values_move_by_less_than_a_step_and_then_stand_still(codec: Codec, seed: int) -> None:
    x = weight(codec, seed)
    parts = codec.encode(x)
    once = codec.decode(parts)
    assert ((once.float() - x).abs() <= step(codec, x, parts)).all()
    again = codec.encode(once)
    third = codec.encode(codec.decode(again))
    assert all(torch.equal(bits(again[role]), bits(third[role])) for role in codec.suffixes)


@named
@laws
@given(seed=seeds)
def test_known_scales_give_the_parts_back(codec: Codec, seed: int) -> None:
    parts = codec.encode(weight(codec, seed))
    for dtype in (torch.bfloat16, torch.float32):
        got = reencode(codec, codec.decode(parts).to(dtype), parts["scale"])
        assert all(torch.equal(bits(got[role]), bits(parts[role])) for role in parts)


@named
@laws
@given(seed=seeds)
def test_scales_that_do_not_fit_are_replaced_and_no_others(codec: Codec, seed: int) -> None:
    x = codec.decode(codec.encode(weight(codec, seed)))
    fresh = codec.encode(x)
    other = codec.encode(1000 * weight(codec, seed + 1))["scale"]
    got = reencode(codec, x, other)
    own, kept = bits(got["scale"]) == bits(fresh["scale"]), bits(got["scale"]) == bits(other)
    exact = ~codec.any_by_scale(codec.decode(got) != x).flatten()
    assert (own | kept).all() and exact[~own].all()
    assert torch.equal(codec.any_by_scale(codec.decode(got) != codec.decode(fresh)).flatten() & own, own & False)
    assert own.any(), "scales a thousand times too large fit nothing but zeros"


@named
def test_a_mask_is_seen_under_its_scale_alone(codec: Codec) -> None:
    x = weight(codec, 0)
    parts = codec.encode(x)
    mask = torch.zeros(x.shape, dtype=torch.bool)
    assert not codec.any_by_scale(mask).any()
    where = tuple(size - 1 for size in x.shape)
    mask[where] = True
    seen = codec.any_by_scale(mask)
    assert seen.shape == parts["scale"].shape and seen.sum() == 1
    spoilt = parts["scale"].clone()
    (spoilt.view(torch.uint8) if spoilt.element_size() == 1 else spoilt)[seen] = 0 if isinstance(codec, Mxfp4) else 1
    moved = codec.decode({**parts, "scale": spoilt}) != codec.decode(parts)
    assert torch.equal(codec.any_by_scale(moved), seen)


@named
@pytest.mark.parametrize("known", [True, False])
def test_slabs_encode_as_the_whole(codec: Codec, known: bool) -> None:
    x = weight(codec, 5, torch.bfloat16)
    shape = tuple(x.shape)
    whole = reencode(codec, x, codec.encode(2 * x)["scale"] if known else None)
    shapes = {role: tuple(part.shape) for role, part in whole.items()}
    rows = codec.encode_alignment(shape)
    for start in range(0, shape[0], rows):
        stop = min(start + rows, shape[0])
        cuts = {role: codec.part_rows(role, start, stop, shapes) for role in whole}
        scale = codec.encode(2 * x)["scale"]
        cut = cuts["scale"]
        got = reencode(codec, x[start:stop], (scale if cut is None else scale[slice(*cut)]) if known else None, shape)
        for role, part in got.items():
            rows_of = cuts[role]
            wanted = whole[role] if rows_of is None else whole[role][slice(*rows_of)]
            assert torch.equal(part, wanted), role


@named
def test_the_codec_of_stored_headers_writes_such_parts(codec: Codec) -> None:
    x = weight(codec, 1)
    names = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.uint8: "U8"}
    for dtype in (torch.float32, torch.bfloat16, torch.float16) if isinstance(codec, (Fp8Block, Fp8Scaled)) else ():
        shapes = {role: tuple(part.shape) for role, part in codec.encode(x).items()}
        stored = codec.as_stored({"weight": "F8_E4M3", "scale": names[dtype]}, shapes)
        assert stored.encode(x)["scale"].dtype == dtype
    single = {"weight": (40, 80), "scale": (1, 1)}
    if isinstance(codec, Fp8Scaled):
        assert codec.as_stored({"weight": "F8_E4M3", "scale": "F32"}, single).encode_alignment((40, 80)) == 40


@pytest.mark.parametrize("shape", [(256, 1024), (2048, 1024)])
@named
def test_encoding_stays_within_the_memory_a_piece_declares(codec: Codec, shape: tuple[int, int]) -> None:
    x = torch.randn((1, *shape) if isinstance(codec, Mxfp4) else shape).to(torch.bfloat16)
    known = codec.encode(2 * x)["scale"]
    bound = ENCODED_COPIES * x.nbytes + DECODE_SCRATCH
    assert peak_bytes(lambda: reencode(codec, x, known)) <= bound
    assert peak_bytes(lambda: reencode(codec, codec.decode(codec.encode(x)), None)) <= bound
    assert peak_bytes(lambda: x.double().repeat(2 * bound // x.nbytes, 1, 1)) > bound, "the meter sees torch's memory"
