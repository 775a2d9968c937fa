"""FP8 by blocks on a GPU: the codes and scales that a CPU makes, bit for bit."""

from __future__ import annotations

import pytest
import torch

from converters.codecs import Fp8Block
from converters.codecs.arithmetic.reencode import reencode

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8).cpu()


@pytest.mark.parametrize("rule", ["amax", "reciprocal", "ue8m0"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(4096, 14336), (300, 200), (3, 256, 130)])
def test_a_gpu_encodes_as_a_cpu(rule: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    codec = Fp8Block(scale_rule=rule)  # type: ignore[arg-type]
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
