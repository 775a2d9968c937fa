"""Codecs on a GPU: the codes and scales that a CPU makes, bit for bit."""

from __future__ import annotations

import pytest
import torch

from converters.codecs import Fp8Block
from converters.codecs.arithmetic.reencode import reencode
from converters.codecs.base import Codec
from converters.codecs.fresh import FRESH

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8).cpu()


def encoded_alike(
    codec: Codec, shape: tuple[int, ...], dtype: torch.dtype
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Hold a GPU's codes, their values, and the codes of these with one changed against a CPU's; the changed values,
    and the codes of those before."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    values[..., :128, :128] = 0
    there = values.cuda()
    cpu, gpu = codec.encode(values), codec.encode(there)
    assert all(torch.equal(bits(gpu[role]), bits(cpu[role])) for role in cpu)
    assert torch.equal(there.cpu(), values), "values are read alone"
    decoded = codec.decode(gpu, dtype=dtype)
    assert torch.equal(bits(decoded), bits(codec.decode(cpu, dtype=dtype)))
    values = decoded.cpu()
    values[..., 5, 7] += 3
    again, expected = reencode(codec, values.cuda(), gpu["scale"]), reencode(codec, values, cpu["scale"])
    assert all(torch.equal(bits(again[role]), bits(expected[role])) for role in expected)
    return values, cpu


@pytest.mark.parametrize("rule", ["amax", "reciprocal", "ue8m0"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(4096, 14336), (300, 200), (3, 256, 130)])
def test_a_gpu_encodes_as_a_cpu(rule: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    encoded_alike(Fp8Block(scale_rule=rule), shape, dtype)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["gpt_oss", *FRESH])
def test_every_codec_of_a_live_model(name: str, dtype: torch.dtype) -> None:
    """Fresh scales, a source's, and those of what other ranks hold, too."""
    fresh = FRESH["mxfp4"].own["gpt_oss"] if name == "gpt_oss" else FRESH[name]
    codec, shape = fresh.codec, (2, 256, 96) if fresh.stacked else (1000, 4096)
    values, cpu = encoded_alike(codec, shape, dtype)
    if codec.maxima_role is not None:
        largest = torch.full(cpu[codec.maxima_role].shape, 7.3)
        under = codec.encode_under(values, largest, shape=shape)
        other = codec.encode_under(values.cuda(), largest.cuda(), shape=shape)
        assert all(torch.equal(bits(other[role]), bits(under[role])) for role in under)
