"""MXFP8 and MXFP4 of matrices: against Transformers' decoders, the bits of fp32, and their laws."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from converters.codecs import Mxfp4, Mxfp4Packed, Mxfp8, codecs_for
from converters.codecs.arithmetic.common import scale_faults
from converters.codecs.decode import Encoded
from converters.codecs.encode import encode_rows
from converters.errors import LayoutError, StorageError, UnsupportedError
from converters.tensors import StoredTensor
from tests.unit._torch_memory import peak_bytes

CODECS = {"mxfp8": Mxfp8(), "mxfp4": Mxfp4Packed()}
named = pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
seeds = st.integers(0, 2**31 - 1)
laws = settings(max_examples=25, deadline=None)


def stored(codec: Mxfp8 | Mxfp4Packed, seed: int, rows: int, groups: int, low: int = 110, high: int = 130) -> dict:
    """Parts of any codes but NaN, under exponents between two."""
    g = torch.Generator().manual_seed(seed)
    shapes = codec.stored_shapes((rows, 32 * groups))
    codes = torch.randint(0, 256, shapes["codes"], generator=g, dtype=torch.uint8)
    if isinstance(codec, Mxfp8):
        codes = torch.where(codes & 127 == 127, codes - 1, codes).view(torch.float8_e4m3fn)
    return {"codes": codes, "scale": torch.randint(low, high, shapes["scale"], generator=g, dtype=torch.uint8)}


def same(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[role].view(torch.uint8), b[role].view(torch.uint8)) for role in a)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_mxfp4_decodes_as_transformers_decodes_gpt_oss(dtype: torch.dtype) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    parts = stored(Mxfp4Packed(), 1, 24, 5, 3, 254)
    blocks = parts["codes"].reshape(1, 24, 5, 16)
    theirs = convert_moe_packed_tensors(blocks, parts["scale"].unsqueeze(0), dtype=dtype)[0].T
    assert torch.equal(Mxfp4Packed().decode(parts, dtype=dtype), theirs)
    swapped = {**parts, "codes": parts["codes"] << 4 | parts["codes"] >> 4}
    assert not torch.equal(Mxfp4Packed().decode(swapped, dtype=dtype), theirs)


def test_mxfp8_decodes_as_transformers_decodes_blocks() -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    parts = stored(Mxfp8(), 2, 24, 5)
    blocks = SimpleNamespace(quantization_config=SimpleNamespace(weight_block_size=(1, 32), scale_fmt="float"))
    scale = torch.ldexp(torch.ones(24, 5), parts["scale"].int() - 127)
    theirs = Fp8Dequantize(blocks)._dequantize_one(parts["codes"], scale, output_dtype=torch.bfloat16)
    assert torch.equal(Mxfp8().decode(parts), theirs)
    assert not torch.equal(Mxfp8().decode({**parts, "scale": parts["scale"].flip(-1)}), theirs)


@named
@laws
@given(seed=seeds)
def test_an_exponent_is_read_off_the_bits_of_the_largest(codec: Mxfp8 | Mxfp4Packed, seed: int) -> None:
    """A quarter of a mantissa is added to fp32 as a whole number; what is in its exponent then, less the offset."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(8, 64, generator=g) * torch.exp2(torch.randint(-60, 60, (8, 1), generator=g).float())
    x[0, :32] = 0
    x[1, :32] = torch.linspace(0, 1.75, 32)  # as large as its exponent lets it be, and the next
    bits = x.reshape(8, 2, 32).abs().amax(-1).view(torch.int32)
    expected = ((bits + (1 << 21)) >> 23) - {"mxfp8": 8, "mxfp4_packed": 2}[codec.name]
    parts = codec.encode(x)
    assert torch.equal(parts["scale"].int(), torch.where(bits == 0, 0, expected))
    largest = parts["codes"].view(torch.uint8) & 127 if isinstance(codec, Mxfp8) else parts["codes"] >> 4 & 7
    assert largest.reshape(8, -1)[1:].amax() <= (126 if isinstance(codec, Mxfp8) else 7)


@named
@laws
@given(seed=seeds, rows=st.integers(1, 9), groups=st.integers(1, 4))
def test_parts_come_back_under_their_scales(codec: Mxfp8 | Mxfp4Packed, seed: int, rows: int, groups: int) -> None:
    parts = stored(codec, seed, rows, groups)
    decoded = codec.decode(parts)
    assert same(codec.encode(decoded, scale=parts["scale"]), parts)
    if isinstance(codec, Mxfp4Packed):  # MXFP8 may take the exponent above, where the smallest codes are lost
        assert torch.equal(codec.decode(codec.encode(decoded)), decoded), "fresh scales lose nothing either"
    assert codec.decoded_shape({role: tuple(part.shape) for role, part in parts.items()}) == (rows, 32 * groups)


@named
def test_faults_are_named(codec: Mxfp8 | Mxfp4Packed) -> None:
    with pytest.raises(StorageError, match="NaN or infinite"):
        codec.encode(torch.full((2, 32), float("nan")))
    with pytest.raises(LayoutError, match="multiple of 32"):
        codec.stored_shapes((4, 48))
    with pytest.raises(StorageError, match="parts: expected codes"):
        codec.decoded_shape({"codes": (4, 32), "scale": (4, 3)})
    parts = stored(codec, 3, 4, 2)
    with pytest.raises(StorageError, match="given scales"):
        codec.encode(codec.decode(parts), scale=parts["scale"][:2])
    with pytest.raises(StorageError, match="part `scale`: expected"):
        codec.decode({**parts, "scale": parts["scale"].float()})
    assert scale_faults(torch.tensor([255, 0, 1], dtype=torch.uint8)) == {"NaN": 1}


@pytest.mark.parametrize("codec", [*CODECS.values(), Mxfp4()], ids=[*CODECS, "mxfp4_experts"])
def test_no_finite_value_is_stored_as_infinite(codec: Mxfp8 | Mxfp4Packed | Mxfp4) -> None:
    """Every magnitude of bf16 in its last octave alone in a block: it comes back finite, or is refused."""
    refused = []
    for bits in range(0x7F00, 0x7F80):
        x = torch.zeros(2, 64, dtype=torch.bfloat16)
        x[1, 40] = torch.tensor(bits, dtype=torch.int16).view(torch.bfloat16)
        x = x.T.unsqueeze(0).contiguous() if isinstance(codec, Mxfp4) else x
        assert x.isfinite().all()
        try:
            assert codec.decode(codec.encode(x)).isfinite().all()
        except StorageError as error:
            assert error.fact.startswith("1 finite values")
            refused.append(bits)
    first = 0x7F78 if isinstance(codec, Mxfp8) else 0x7F60  # 1.9375 and 1.75 times 2 ** 127
    assert refused == list(range(first, 0x7F80))


def test_the_tensor_is_named_whose_values_are_so_large() -> None:
    shape = (4, 64)
    parts = {
        "codes": StoredTensor("w.weight", "F8_E4M3", shape, ()),
        "scale": StoredTensor("w.weight_scale", "U8", (4, 2), ()),
    }
    whole = Encoded(StoredTensor("w.weight", "BF16", shape, ()), Mxfp8(), parts)
    data = torch.full(shape, 3.38e38, dtype=torch.bfloat16).view(torch.uint8).numpy()
    with pytest.raises(StorageError, match="mxfp8 would round them to infinity") as error:
        encode_rows(SimpleNamespace(), whole, {}, (), 0, data, "BF16")
    assert any("`w.weight`, rows 0 to 3" in line for line in error.value.details)


@named
def test_scratch_stays_within_six_times_the_slab(codec: Mxfp8 | Mxfp4Packed) -> None:
    x = torch.randn(2048, 2048).bfloat16()
    parts = codec.encode(x)
    assert peak_bytes(lambda: codec.decode(parts)) <= 6 * x.numel() * 2
    assert peak_bytes(lambda: codec.encode(x)) <= 6 * x.numel() * 2


def test_a_config_calls_for_them() -> None:
    def said(storage: str, bits: int, size: int = 32) -> dict[str, object]:
        weights = {"num_bits": bits, "type": "float", "strategy": "group", "group_size": size, "symmetric": True}
        groups = {"g": {"targets": ["Linear"], "weights": weights}}
        return {"quant_method": "compressed-tensors", "format": storage, "config_groups": groups}

    assert codecs_for(said("mxfp8-quantized", 8)) == (Mxfp8(),)
    assert codecs_for(said("mxfp4-pack-quantized", 4)) == (Mxfp4Packed(),)
    assert codecs_for({"quant_method": "modelopt", "quant_algo": "MXFP8"}) == (Mxfp8(),)
    for wrong in (said("mxfp8-quantized", 4), said("mxfp4-pack-quantized", 4, 16), said("mxfp6-pack-quantized", 6)):
        with pytest.raises(UnsupportedError, match="no codec for compressed-tensors group `g`"):
            codecs_for(wrong)
