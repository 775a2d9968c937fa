"""Casts without torch equal torch's, whatever the bits; NaN stays NaN."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from converters.casts import convert, overflown
from converters.torch_casts import TORCH_DTYPES
from converters.torch_casts import convert as by_torch

ROOT = Path(__file__).resolve().parents[2]
FLOATS = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8}


def _nan(data: np.ndarray, dtype: str) -> np.ndarray:
    return np.isnan(by_torch(data, dtype, "F64", 0).view(np.float64))


@pytest.mark.parametrize("shift", [0, 1, -1])
@pytest.mark.parametrize("target", FLOATS)
@pytest.mark.parametrize("source", FLOATS)
@pytest.mark.parametrize("count", [0, 1, 1000, 200_003])
def test_any_bits_become_what_torch_makes_of_them(source: str, target: str, shift: int, count: int) -> None:
    """Random bits hold subnormals, both infinities, NaN and values beyond the target's range."""
    data = np.random.default_rng(count).integers(0, 256, count * FLOATS[source], np.uint8)
    wanted, got = by_torch(data, source, target, shift), convert(data, source, target, shift)
    assert got.shape == wanted.shape == (count * FLOATS[target],)
    nan = _nan(wanted, target)
    assert np.array_equal(_nan(got, target), nan)
    rows = got.reshape(count, FLOATS[target]), wanted.reshape(count, FLOATS[target])
    assert np.array_equal(rows[0][~nan], rows[1][~nan])


def test_every_16_bit_value_survives_the_way_through_fp32() -> None:
    words = np.arange(1 << 16, dtype=np.uint16)
    for dtype in ("BF16", "F16"):
        back = convert(convert(words.view(np.uint8), dtype, "F32"), "F32", dtype).view(np.uint16)
        quiet = words[~_nan(words.view(np.uint8), dtype)]
        assert np.array_equal(back[quiet], quiet)
    ties = np.array([0x3F808000, 0x3F818000, 0x7F7FFFFF], np.uint32)  # to even, down and up; beyond the range
    assert convert(ties.view(np.uint8), "F32", "BF16").view(np.uint16).tolist() == [0x3F80, 0x3F82, 0x7F80]


def test_the_result_lies_where_it_was_asked_for() -> None:
    data, out = np.ones(64, np.float32).view(np.uint8), np.zeros(128, np.uint8)
    made = convert(data, "F32", "BF16", 0, out)
    assert np.shares_memory(made, out) and out.any()


def test_no_torch_is_needed() -> None:
    code = "import sys, numpy as np; from converters.casts import convert\n"
    code += "convert(np.zeros(8, np.uint8), 'F32', 'BF16', 1); assert 'torch' not in sys.modules\n"
    code += "convert(np.zeros(8, np.uint8), 'F8_E4M3', 'BF16', 0); assert 'torch' in sys.modules"  # negative control
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("source", ["BF16", "F32", "F64"])
def test_values_that_a_cast_to_half_makes_infinite_are_counted(source: str) -> None:
    values = torch.tensor([65504.0, 65536.0, -1e9, float("inf"), float("-inf"), float("nan"), 0.0, 65504.0])
    stored = values.to(TORCH_DTYPES[source]).view(torch.uint8).numpy()
    finite = values.to(TORCH_DTYPES[source]).isfinite() & values.to(TORCH_DTYPES[source]).to(torch.float16).isinf()
    wanted = int(finite.sum())
    assert wanted == (4 if source == "BF16" else 2)  # 65504 itself is 65536 in bf16
    many = np.tile(stored, 20_000)
    assert overflown(convert(stored, source, "F16"), stored, source) == wanted
    assert overflown(convert(many, source, "F16"), many, source) == 20_000 * wanted
    assert overflown(convert(stored[:0], source, "F16"), stored[:0], source) == 0


@pytest.mark.parametrize("every", [3, 11, 200])
def test_bf16_becomes_half_by_arithmetic_as_by_torch(every: int) -> None:
    """Each 16-bit value among weights, thinly and thickly spread, at every place of a group and at the ragged end."""
    weights = np.random.default_rng(0).standard_normal((1 << 16) * every + 5, np.float32) * 0.02
    words = torch.from_numpy(weights).to(torch.bfloat16).view(torch.uint8).numpy().view(np.uint16)
    words[:-5:every] = np.arange(1 << 16, dtype=np.uint16)
    words[-5:] = (0x0000, 0x8000, 0x477F, 0x4780, 0xFF80)
    data = words.view(np.uint8)
    wanted, got = by_torch(data, "BF16", "F16", 0), convert(data, "BF16", "F16")
    nan = _nan(wanted, "F16")
    assert np.array_equal(_nan(got, "F16"), nan)
    assert np.array_equal(got.view(np.uint16)[~nan], wanted.view(np.uint16)[~nan])
    finite = torch.from_numpy(data).view(torch.bfloat16).isfinite().numpy()
    assert overflown(got, data, "BF16") == int((np.isinf(wanted.view(np.float16)) & finite).sum()) > 0
