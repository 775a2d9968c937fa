"""Norms whose gamma is frozen, in the form that a CPU runs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mbx.models.megatron.core.frozen import rms_norm


@pytest.mark.parametrize("offset", [0, 1])
def test_the_norm_and_its_gradient_are_those_of_torch(offset: int) -> None:
    x = torch.randn(5, 3, 16, dtype=torch.float64).float().requires_grad_()
    gamma, given = torch.randn(16), torch.randn(5, 3, 16)
    found = rms_norm(x, gamma, 1e-5, offset)
    expected = F.rms_norm(x, (16,), gamma + offset, 1e-5)
    torch.testing.assert_close(found, expected)
    (ours,) = torch.autograd.grad(found, x, given)
    (theirs,) = torch.autograd.grad(expected, x, given)
    torch.testing.assert_close(ours, theirs)


def test_a_half_is_rounded_once() -> None:
    x, gamma = torch.randn(7, 64, dtype=torch.bfloat16), torch.randn(64, dtype=torch.bfloat16)
    wide = F.rms_norm(x.double(), (64,), gamma.double(), 1e-5)
    torch.testing.assert_close(rms_norm(x, gamma, 1e-5).double(), wide, rtol=2**-8, atol=0)
