"""Mamba-2's convolution and scan in plain torch, without the mamba-ssm and causal-conv1d kernels.

Those take fp32 products in TF32. The recurrence is the definition that they compute in chunks (Dao and Gu,
"Transformers are SSMs", 2024, section 6): h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t, y_t = C_t h_t + D x_t. Slow, and
exact in fp32.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


class GatedRMSNorm(nn.Module):
    """RMSNorm over groups of channels after the gate SiLU(z); the constructor's arguments are mamba-ssm's."""

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        assert not norm_before_gate
        self.eps, self.group_size = eps, group_size or hidden_size
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))

    def forward(self, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """x, z: [..., hidden]"""
        gated = x.float() * F.silu(z.float())
        groups = gated.unflatten(-1, (-1, self.group_size))
        scale = torch.rsqrt(groups.square().mean(-1, keepdim=True) + self.eps)
        return ((groups * scale).flatten(-2) * self.weight.float()).to(x.dtype)


def scan(
    x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, D: torch.Tensor
) -> torch.Tensor:
    """x: [b, s, heads, d], dt: [b, s, heads], A, D: [heads], B, C: [b, s, heads, n] → [b, s, heads, d], in fp32."""
    state = x.new_zeros(x.shape[0], x.shape[2], x.shape[3], B.shape[-1])
    out = []
    for t in range(x.shape[1]):
        decay = torch.exp(dt[:, t] * A)[..., None, None]
        state = state * decay + torch.einsum("bh,bhn,bhd->bhdn", dt[:, t], B[:, t], x[:, t])
        out.append(torch.einsum("bhdn,bhn->bhd", state, C[:, t]) + D[:, None] * x[:, t])
    return torch.stack(out, 1)


def _training(self: Any, zxBCdt: torch.Tensor, packed_seq_params: object = None) -> torch.Tensor:
    """MambaMixer._ssm_training: [s, b, z|x|B|C|dt] → [s, b, inner]."""
    assert packed_seq_params is None and not self.D_has_hdim
    cp = self.cp
    inner, groups, heads = cp.d_inner_local_tpcp, cp.ngroups_local_tpcp, cp.nheads_local_tpcp
    both = groups * self.d_state
    z, xBC, dt = zxBCdt.transpose(0, 1).split([inner, inner + 2 * both, heads], -1)
    weight, length = cp.get_conv1d_weight(), xBC.shape[1]
    xBC = F.conv1d(
        xBC.transpose(1, 2), weight, cp.get_conv1d_bias(), padding=weight.shape[-1] - 1, groups=weight.shape[0]
    )
    x, B, C = F.silu(xBC[..., :length].transpose(1, 2)).float().split([inner, both, both], -1)
    per_group = heads // groups
    B, C = (m.unflatten(-1, (groups, -1)).repeat_interleave(per_group, 2) for m in (B, C))
    step = F.softplus(dt.float() + cp.get_dt_bias().float())
    y = scan(x.unflatten(-1, (heads, -1)), step, -torch.exp(cp.get_A_log().float()), B, C, cp.get_D().float())
    y, z = (m.transpose(0, 1).contiguous() for m in (y.flatten(-2).to(zxBCdt.dtype), z))
    out: torch.Tensor = self.norm(y, z) if self.rmsnorm else y * F.silu(z)
    return out


def _no_kernel() -> None:
    """A kernel that nothing calls."""
    raise AssertionError("a kernel of mamba-ssm is called")


def stand_in() -> None:
    """Let Megatron Core's MambaMixer, which nothing has imported yet, run on this module."""
    names = ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton")
    kernels = {
        "mamba_ssm.ops.triton.selective_state_update": ("selective_state_update",),
        "mamba_ssm.ops.triton.layernorm_gated": ("RMSNorm",),
        "mamba_ssm.ops.triton.ssd_combined": ("mamba_chunk_scan_combined", "mamba_split_conv1d_scan_combined"),
    }
    modules = {name: types.ModuleType(name) for name in (*names, *kernels)}
    for name, functions in kernels.items():
        for function in functions:
            setattr(modules[name], function, GatedRMSNorm if function == "RMSNorm" else _no_kernel)
    sys.modules.update(modules)
    try:
        mixer: Any = importlib.import_module("megatron.core.ssm.mamba_mixer")
        parallel: Any = importlib.import_module("megatron.core.ssm.mamba_context_parallel")
    finally:
        for name in modules:
            del sys.modules[name]
    mixer.HAVE_EINOPS = parallel.HAVE_EINOPS = True  # only the paths replaced here use it
    mixer.MambaMixer._ssm_training = _training
