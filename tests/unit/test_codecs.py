"""Codecs against Transformers' own dequantisation, slow references, and their laws."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from converters.codecs import CODECS, Codec, Fp8Block, Fp8Scaled, Int4Packed, Mxfp4, assemble, codecs_for
from converters.codecs.arithmetic.common import scale_faults
from converters.errors import LayoutError, StorageError, UnsupportedError
from tests.unit._torch_memory import peak_bytes

FP8 = torch.float8_e4m3fn
seeds = st.integers(0, 2**31 - 1)
laws = settings(max_examples=40, deadline=None)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bits(a), _bits(b))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().flatten().view(torch.uint8) if tensor.numel() else tensor.flatten()


def same_parts(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(same_bits(a[role], b[role]) for role in a)


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_weight(seed: int, *shape: int) -> torch.Tensor:
    """bf16 values of the spread of real weights, with rows and columns of different size."""
    g = rng(seed)
    rows = torch.rand(*shape[:-1], 1, generator=g) * 4
    return (torch.randn(*shape, generator=g) * 0.02 * rows).to(torch.bfloat16)


def random_mxfp4(seed: int, experts: int, rows: int, groups: int, low: int = 110, high: int = 130) -> dict:
    g = rng(seed)
    return {
        "blocks": torch.randint(0, 256, (experts, rows, groups, 16), generator=g, dtype=torch.uint8),
        "scale": torch.randint(low, high, (experts, rows, groups), generator=g, dtype=torch.uint8),
    }


def transformers_fp8(block: tuple[int, int], scale_fmt: str = "float"):
    from types import SimpleNamespace

    return SimpleNamespace(quantization_config=SimpleNamespace(weight_block_size=block, scale_fmt=scale_fmt))


# ---- fp8_block ------------------------------------------------------------------------------------------------------


def transformers_dequantize(weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    return Fp8Dequantize(transformers_fp8((128, 128)))._dequantize_one(weight, scale, output_dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(256, 384), (3, 128, 256)])
def test_fp8_block_decodes_as_transformers(shape, dtype):
    codes = torch.randint(0, 256, shape, generator=rng(0), dtype=torch.uint8).view(FP8)  # NaN codes among them
    scale = torch.rand(CODECS["fp8_block"].stored_shapes(shape)["scale"], generator=rng(1)) * 1e-2
    ours = CODECS["fp8_block"].decode({"weight": codes, "scale": scale}, dtype=dtype)
    theirs = transformers_dequantize(codes, scale, dtype)
    assert torch.equal(torch.isnan(ours), torch.isnan(theirs))
    assert torch.equal(ours.nan_to_num(), theirs.nan_to_num())
    transposed = CODECS["fp8_block"].decode({"weight": codes, "scale": scale.flip(-1)}, dtype=dtype)
    assert not torch.equal(transposed.nan_to_num(), theirs.nan_to_num())


@laws
@given(st.integers(1, 300), st.integers(1, 300), seeds)
def test_fp8_block_of_any_shape_decodes_as_its_padding_does(rows, columns, seed):
    """Transformers refuses ragged shapes, so its result on the padded weight is the reference."""
    codec = Fp8Block()
    weight = codec.encode(random_weight(seed, rows, columns))["weight"]
    shape = codec.stored_shapes((rows, columns))["scale"]
    scale = torch.rand(shape, generator=rng(seed)) + 0.01
    padded = torch.zeros(shape[0] * 128, shape[1] * 128, dtype=FP8)
    padded[:rows, :columns] = weight
    expected = transformers_dequantize(padded, scale, torch.bfloat16)[:rows, :columns]
    assert same_bits(codec.decode({"weight": weight, "scale": scale}), expected.contiguous())


def test_fp8_block_with_a_transposed_scale_grid_differs():
    codec = Fp8Block()
    parts = codec.encode(random_weight(3, 256, 256))
    assert not same_bits(codec.decode(parts), codec.decode({**parts, "scale": parts["scale"].T.contiguous()}))


@pytest.mark.parametrize(("rule", "fmt"), [("reciprocal", "float"), ("ue8m0", "ue8m0")])
def test_fp8_block_encodes_as_transformers(rule, fmt):
    from transformers.integrations.finegrained_fp8 import Fp8Quantize

    x = random_weight(4, 1024, 1152)
    x[:128, :128] = 0
    x[128:256, :128] = 2e-36  # its scale lies below the normal fp32 numbers
    theirs = Fp8Quantize(transformers_fp8((128, 128), fmt))._quantize_one("a.weight", x)
    ours = Fp8Block(scale_rule=rule, scale_dtype="F8_E8M0" if rule == "ue8m0" else "F32").encode(x)
    assert same_bits(ours["weight"], theirs["a.weight"])
    assert same_bits(ours["scale"], theirs["a.weight_scale_inv"])


@laws
@given(
    st.sampled_from(["amax", "reciprocal", "ue8m0"]),
    st.sampled_from([(128, 128), (32, 64), (1, 32)]),
    st.integers(1, 200),
    st.integers(1, 200),
    seeds,
)
def test_fp8_block_laws(rule, block, rows, columns, seed):
    codec = Fp8Block(block=block, scale_rule=rule)
    parts = codec.encode(random_weight(seed, rows, columns))
    decoded = codec.decode(parts)
    assert same_parts(codec.encode(decoded, scale=parts["scale"]), parts)
    again = codec.encode(decoded)
    assert same_bits(codec.decode(again), decoded)
    if rule == "amax":
        assert same_parts(again, parts)


def test_fp8_block_scales_of_an_fp32_master_need_the_scale_given():
    """The stated exception of the amax rule, and its way out."""
    codec = Fp8Block()
    parts = codec.encode(torch.randn(256, 256, generator=rng(5)))
    decoded = codec.decode(parts)
    assert not same_parts(codec.encode(decoded), parts)
    assert same_parts(codec.encode(decoded, scale=parts["scale"]), parts)


def test_fp8_block_zero_blocks_and_bad_values():
    codec = Fp8Block()
    zero = codec.encode(torch.zeros(130, 10, dtype=torch.bfloat16))
    assert zero["scale"].eq(1).all() and not codec.decode(zero).any()
    beyond = codec.encode(torch.tensor([[-1000.0, 1000.0]]), scale=torch.ones(1, 1))
    assert codec.decode(beyond).tolist() == [[-448, 448]], "a given scale too small saturates, and makes no NaN"
    tiny = codec.encode(torch.full((4, 4), 1e-44))
    assert not codec.decode(tiny, dtype=torch.float32).any()
    for bad in (float("nan"), float("inf")):
        x = torch.ones(4, 4)
        x[2, 1] = bad
        with pytest.raises(StorageError, match="1 of 1 blocks"):
            codec.encode(x)
    scale = torch.tensor([[float("nan"), 0.0], [-1.0, float("inf")]])
    assert scale_faults(scale) == {"NaN": 1, "zero": 1, "negative": 1, "infinite": 1}
    assert scale_faults(torch.ones(3)) == {}
    weight = torch.ones(256, 256).to(FP8)
    decoded = codec.decode({"weight": weight, "scale": scale})
    assert decoded[0, 0].isnan() and decoded[0, 200] == 0 and decoded[200, 0] == -1


@pytest.mark.parametrize("stored", [torch.float8_e8m0fnu, torch.uint8])
def test_fp8_block_reads_e8m0_scales(stored):
    codec = Fp8Block(scale_rule="ue8m0", scale_dtype="F8_E8M0")
    parts = codec.encode(random_weight(6, 256, 256))
    plain = codec.decode({**parts, "scale": parts["scale"].to(torch.float32)})
    assert same_bits(codec.decode({**parts, "scale": parts["scale"].view(stored)}), plain)
    assert same_bits(plain, transformers_dequantize(parts["weight"], parts["scale"].view(stored), torch.bfloat16))


# ---- fp8_scaled -----------------------------------------------------------------------------------------------------


@laws
@given(st.sampled_from(["tensor", "channel"]), st.integers(1, 40), st.integers(1, 40), seeds)
def test_fp8_scaled_laws(strategy, rows, columns, seed):
    codec = Fp8Scaled(strategy=strategy)
    x = random_weight(seed, rows, columns)
    parts = codec.encode(x)
    expected = torch.tensor(
        [
            [float(w) * float(parts["scale"].flatten()[r if strategy == "channel" else 0]) for w in row]
            for r, row in enumerate(parts["weight"].to(torch.float32).tolist())
        ],
        dtype=torch.float64,
    )
    decoded = codec.decode(parts)
    assert same_bits(decoded, expected.to(torch.float32).to(torch.bfloat16))
    assert same_parts(codec.encode(decoded), parts)
    # E4M3 keeps 4 significant bits, and its subnormals have steps of 2**-9.
    step = parts["scale"].to(torch.float32).reshape(-1, 1)
    assert ((expected - x).abs() <= x.abs() * 2**-4 * 1.001 + step * 2**-10).all()


# ---- mxfp4 ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("low", "high"), [(110, 130), (0, 256)])
def test_mxfp4_decodes_as_transformers(low, high, dtype):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    parts = random_mxfp4(7, 3, 24, 5, low, high)
    if high == 256:
        parts["scale"][0, :2, 0], parts["scale"][1, :2, 0] = 255, 0
        assert scale_faults(parts["scale"])["NaN"] >= 2
    ours = CODECS["mxfp4"].decode(parts, dtype=dtype)
    theirs = convert_moe_packed_tensors(parts["blocks"], parts["scale"], dtype=dtype)
    assert ours.shape == (3, 160, 24) == CODECS["mxfp4"].decoded_shape({k: tuple(v.shape) for k, v in parts.items()})
    assert torch.equal(torch.isnan(ours), torch.isnan(theirs))
    assert same_bits(ours.nan_to_num(), theirs.nan_to_num())
    swapped = (parts["blocks"] << 4) | (parts["blocks"] >> 4)
    assert not torch.equal(CODECS["mxfp4"].decode({**parts, "blocks": swapped}, dtype=dtype), theirs)


@laws
@given(st.integers(1, 3), st.integers(1, 20), st.integers(1, 4), seeds)
def test_mxfp4_laws(experts, rows, groups, seed):
    codec = Mxfp4()
    parts = random_mxfp4(seed, experts, rows, groups)
    decoded = codec.decode(parts)
    again = codec.encode(decoded)
    assert same_bits(codec.decode(again), decoded)
    assert same_parts(codec.encode(decoded, scale=parts["scale"]), parts)
    largest = torch.maximum(parts["blocks"] & 7, (parts["blocks"] >> 4) & 7).amax(-1)
    kept = largest >= 6  # codes 6 and 7 are 4.0 and 6.0
    assert torch.equal(again["scale"][kept], parts["scale"][kept])
    assert torch.equal(again["blocks"][kept], parts["blocks"][kept])


def test_mxfp4_rounds_to_nearest_with_ties_to_even():
    """Every quarter step in one block that 6.0 pins to exponent 127, against a search over the magnitudes."""
    magnitudes = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    for sign in (1, -1):
        values = [sign * i / 4 for i in range(25)] + [6.0] * 7
        parts = Mxfp4().encode(torch.tensor(values).reshape(1, 32, 1))
        assert parts["scale"].item() == 127
        codes = [int(c) for byte in parts["blocks"].flatten() for c in (byte & 15, byte >> 4)]
        for value, code in zip(values, codes, strict=True):
            best = min(range(8), key=lambda c: (abs(magnitudes[c] - abs(value)), c % 2))
            assert code & 7 == best
            assert code >> 3 == int(math.copysign(1, value) < 0)


def test_mxfp4_zero_blocks_and_bad_values():
    zero = Mxfp4().encode(torch.zeros(1, 32, 2, dtype=torch.bfloat16))
    assert not zero["scale"].any() and not Mxfp4().decode(zero).any()
    with pytest.raises(StorageError, match="NaN or infinite"):
        Mxfp4().encode(torch.full((1, 32, 1), float("inf")))
    with pytest.raises(LayoutError, match="multiple of 32"):
        Mxfp4().encode(torch.zeros(1, 33, 1))


# ---- int4_packed ----------------------------------------------------------------------------------------------------


def slow_int4(parts: Mapping[str, torch.Tensor], group: int) -> torch.Tensor:
    """One element at a time, by shifts of Python integers."""
    rows, columns = parts["shape"].tolist()
    out = torch.empty(rows, columns, dtype=parts["scale"].dtype)
    for r in range(rows):
        for c in range(columns):
            word = int(parts["packed"][r, c // 8]) & 0xFFFFFFFF
            code = ((word >> (4 * (c % 8))) & 15) - 8
            out[r, c] = torch.tensor(code * float(parts["scale"][r, c // group]))
    return out


def random_int4(seed: int, rows: int, columns: int, group: int) -> dict:
    g = rng(seed)
    words, groups = -(-columns // 8), -(-columns // group)
    packed = torch.randint(-(2**31), 2**31, (rows, words), generator=g)
    if columns % 8:
        packed[:, -1] &= (1 << 4 * (columns % 8)) - 1
        packed = packed.to(torch.int32)
    scale = (torch.rand(rows, groups, generator=g) * 0.03 + 1e-3).to(torch.bfloat16)
    return {"packed": packed.to(torch.int32), "scale": scale, "shape": torch.tensor([rows, columns])}


@laws
@given(st.integers(1, 6), st.integers(1, 80), st.sampled_from([8, 32]), seeds)
def test_int4_decodes_as_the_slow_reference(rows, columns, group, seed):
    parts = random_int4(seed, rows, columns, group)
    codec = Int4Packed(group=group)
    assert same_bits(codec.decode(parts), slow_int4(parts, group))
    assert same_bits(codec.decode(parts, dtype=torch.float32), slow_int4(parts, group).to(torch.float32))


def test_int4_with_swapped_nibbles_or_transposed_scales_differs():
    parts = random_int4(8, 8, 256, 32)
    codec = Int4Packed()
    expected = slow_int4(parts, 32)
    raw = parts["packed"].view(torch.uint8)
    swapped = ((raw << 4) | (raw >> 4)).view(torch.int32)
    assert not same_bits(codec.decode({**parts, "packed": swapped}), expected)
    assert not same_bits(codec.decode({**parts, "scale": parts["scale"].T.contiguous()}), expected)


@laws
@given(st.integers(1, 12), st.integers(1, 100), st.sampled_from([8, 32]), seeds)
def test_int4_laws(rows, columns, group, seed):
    codec = Int4Packed(group=group)
    parts = random_int4(seed, rows, columns, group)
    decoded = codec.decode(parts)
    again = codec.encode(decoded)
    assert same_bits(codec.decode(again), decoded)
    assert same_parts(codec.encode(decoded, scale=parts["scale"]), parts)


def test_int4_groups_of_full_range_come_back_bitwise():
    codec = Int4Packed()
    parts = random_int4(9, 64, 1024, 32)
    codes = (codec.decode({**parts, "scale": torch.ones_like(parts["scale"])})).view(64, 32, 32)
    full = codes.abs().amax(-1) >= 7
    again = codec.encode(codec.decode(parts))
    assert full.float().mean() > 0.9
    assert torch.equal(again["scale"][full], parts["scale"][full])
    assert torch.equal(again["packed"].view(64, 32, 4)[full], parts["packed"].view(64, 32, 4)[full])


def test_int4_of_ordinary_weights_is_within_half_a_step():
    x = random_weight(10, 16, 256)
    parts = Int4Packed().encode(x)
    amax = x.float().view(16, 8, 32).abs().amax(-1)
    assert same_bits(parts["scale"], (amax / 7.5).to(torch.bfloat16))
    step = parts["scale"].float().unsqueeze(-1)
    error = (Int4Packed().decode(parts).float() - x.float()).view(16, 8, 32).abs()
    # Half a step, and two bf16 roundings (of the scale and of the product) of at most 8 * 2**-8 steps each.
    assert (error <= (0.5 + 2 * 8 * 2**-8) * step).all() and error.max() > 0.3 * step.min()


def test_int4_zero_groups_and_bad_parts():
    codec = Int4Packed()
    zero = codec.encode(torch.zeros(2, 64, dtype=torch.bfloat16))
    assert zero["scale"].gt(0).all() and not codec.decode(zero).any()
    with pytest.raises(StorageError, match="weight_shape"):
        codec.decode({**zero, "shape": torch.tensor([2, 128])})
    with pytest.raises(StorageError, match="expected a part `shape`"):
        codec.decode({k: v for k, v in zero.items() if k != "shape"})
    with pytest.raises(StorageError, match=r"got torch\.int64"):
        codec.decode({**zero, "packed": zero["packed"].long()})


# ---- all ------------------------------------------------------------------------------------------------------------

SLAB_CASES: list[tuple[Codec, torch.Tensor, int]] = [
    (Fp8Block(), random_weight(11, 400, 200), 400),
    (Fp8Block(block=(32, 32)), random_weight(12, 5, 64, 96), 5),
    (Fp8Scaled(), random_weight(13, 50, 30), 50),
    (Fp8Scaled(strategy="tensor"), random_weight(14, 50, 30), 50),
    (Mxfp4(), random_weight(15, 7, 64, 24), 7),
    (Int4Packed(), random_weight(16, 40, 96), 40),
]


@pytest.mark.parametrize(("codec", "x", "rows"), SLAB_CASES, ids=lambda v: getattr(v, "name", None))
def test_slabs_equal_the_whole(codec: Codec, x: torch.Tensor, rows: int):
    parts = codec.encode(x)
    shapes = {role: tuple(t.shape) for role, t in parts.items()}
    assert shapes == codec.stored_shapes(tuple(x.shape))
    assert codec.decoded_shape(shapes) == tuple(x.shape)
    scales = {"F32": torch.float32, "BF16": torch.bfloat16}[getattr(codec, "scale_dtype", "F32")]
    assert {role: t.dtype for role, t in parts.items()} == {
        Fp8Block: {"weight": torch.float8_e4m3fn, "scale": scales},
        Fp8Scaled: {"weight": torch.float8_e4m3fn, "scale": scales},
        Mxfp4: {"blocks": torch.uint8, "scale": torch.uint8},
        Int4Packed: {"packed": torch.int32, "scale": scales, "shape": torch.int64},
    }[type(codec)]
    whole = codec.decode(parts)
    step = max(codec.row_alignment(tuple(x.shape)), 3 if codec.row_alignment(tuple(x.shape)) == 1 else 0)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        slab = {}
        for role, tensor in parts.items():
            cut = codec.part_rows(role, start, stop, shapes)
            slab[role] = tensor if cut is None else tensor[cut[0] : cut[1]]
        assert same_bits(codec.decode(slab), whole[start:stop])
        given_scale = codec.encode(whole[start:stop], scale=slab["scale"])
        assert all(same_bits(given_scale[r], slab[r]) for r in slab if r != "shape")
    if codec.row_alignment(tuple(x.shape)) > 1:
        with pytest.raises(LayoutError, match="multiple of 128"):
            codec.part_rows("weight", 1, rows, shapes)


@pytest.mark.parametrize(
    ("codec", "shape"),
    [
        (Fp8Block(), (2048, 2050)),
        (Fp8Scaled(), (2048, 2048)),
        (Mxfp4(), (2, 1024, 2048)),
        (Int4Packed(), (2048, 2048)),
    ],
    ids=lambda v: getattr(v, "name", None),
)
def test_decoding_and_encoding_stay_within_six_times_the_slab(codec, shape):
    x = random_weight(17, *shape)
    parts = codec.encode(x)
    bound = 6 * x.numel() * 2
    assert peak_bytes(lambda: codec.decode(parts)) <= bound
    assert peak_bytes(lambda: codec.encode(x)) <= bound
    assert peak_bytes(lambda: x.double().add(1).mul(2)) > bound  # the meter does see torch's memory


def test_assemble_finds_the_parts_by_name():
    names = {
        "a.weight", "a.weight_scale_inv", "a.activation_scale", "b.weight", "c.weight_scale_inv",
        "e_blocks", "e_scales", "f_blocks",
        "k.weight_packed", "k.weight_scale", "k.weight_shape", "m.weight", "m.weight_scale",
    }  # fmt: skip
    found = assemble(CODECS.values(), names)
    assert {name: codec.name for name, codec in found.items()} == {
        "a.weight": "fp8_block",
        "e": "mxfp4",
        "k.weight": "int4_packed",
        "m.weight": "fp8_scaled",
    }
    assert "a.activation_scale".endswith(CODECS["fp8_block"].discards) and not CODECS["mxfp4"].discards
    assert CODECS["int4_packed"].part_names("k.weight")["shape"] == "k.weight_shape"
    with pytest.raises(StorageError, match="stored twice"):
        assemble(CODECS.values(), names | {"a.weight_scale"})


KIMI = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True},
        }
    },
}


def test_codecs_for_reads_the_quantization_config():
    assert codecs_for(None) == ()
    assert codecs_for({"quant_method": "fp8", "weight_block_size": [128, 128]}) == (
        Fp8Block(),
        Fp8Block(scale_suffix="_scale"),
    )
    assert codecs_for({"quant_method": "fp8", "weight_block_size": [64, 32], "scale_fmt": "ue8m0"}) == (
        Fp8Block(block=(64, 32), scale_rule="ue8m0"),
        Fp8Block(block=(64, 32), scale_rule="ue8m0", scale_suffix="_scale"),
    )
    assert codecs_for({"quant_method": "fp8", "weight_block_size": None}) == (
        Fp8Scaled(strategy="tensor", scale_suffix="_scale_inv"),
        Fp8Scaled(strategy="tensor", scale_suffix="_scale"),
    )
    assert codecs_for({"quant_method": "mxfp4"}) == (Mxfp4(),)
    assert codecs_for(KIMI) == (Int4Packed(),)


@pytest.mark.parametrize(
    "config",
    [
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "fp8", "weight_block_size": [128]},
        {"quant_method": "fp8", "weight_block_size": [128, 128], "expert_dtype": "fp4"},
        {"quant_method": "compressed-tensors"},
        {**KIMI, "format": "marlin-24"},
        {**KIMI, "config_groups": {"g": {"weights": {**KIMI["config_groups"]["group_0"]["weights"], "num_bits": 3}}}},
        {
            **KIMI,
            "config_groups": {"g": {"weights": {**KIMI["config_groups"]["group_0"]["weights"], "actorder": "group"}}},
        },
        {
            **KIMI,
            "config_groups": {"g": {"weights": {**KIMI["config_groups"]["group_0"]["weights"], "symmetric": False}}},
        },
    ],
)
def test_codecs_for_refuses_what_it_cannot_decode(config):
    with pytest.raises(UnsupportedError, match="no codec|without|weight_block_size"):
        codecs_for(config)
