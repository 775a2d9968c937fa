"""What Transformer Engine does for weights that are never trained, and need not: a second form, a gradient of gamma.

Under FP8 a linear keeps its bf16 weight to cast it again after every step; one that stays as it is needs the cast
alone. The backward pass of an RMSNorm sums a gradient of gamma over all rows, whether somebody asks for it or not.
This file imports torch when it is imported, Transformer Engine on use.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import torch
from torch import nn


def keep_casts(model: nn.Module, scaling: str) -> None:
    """Cast every frozen weight of Transformer Engine's linears to FP8 and give back its storage.

    `scaling`: `tensorwise`, `delayed` or `blockwise`. The casts are those that the first pass would make and keep,
    both ways round. Delayed scaling would scale them by a history that is empty then; they have the scale of their own
    maximum instead. From here on the weights cannot be read, only multiplied with.
    """
    quantizer = _quantizer(scaling)
    for module in model.modules():
        casts, frozen = getattr(module, "_fp8_workspaces", None), not any(p.requires_grad for p in module.parameters())
        if casts is None or not frozen:
            continue
        for name, weight in module.named_parameters(recurse=False):
            storage = weight.untyped_storage()
            if not name.startswith("weight") or storage.nbytes() != weight.nbytes:  # nor a part of a larger tensor
                continue
            casts[name] = quantizer.quantize(weight.detach())
            storage.resize_(0)
        module.is_first_microbatch = False  # type: ignore[assignment]


def _quantizer(scaling: str) -> Any:
    from transformer_engine.common.recipe import Float8BlockScaling, Float8CurrentScaling
    from transformer_engine.pytorch.constants import TE_DType
    from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer
    from transformer_engine.pytorch.tensor.float8_tensor import Float8CurrentScalingQuantizer

    recipe = Float8BlockScaling() if scaling == "blockwise" else Float8CurrentScaling()
    settings = recipe.fp8_quant_fwd_weight
    ways: dict[str, Any] = {
        "rowwise": True,
        "columnwise": True,
        "force_pow_2_scales": settings.power_2_scale,
        "amax_epsilon": settings.amax_epsilon,
    }
    dtype = TE_DType[torch.float8_e4m3fn]
    if scaling == "blockwise":
        return Float8BlockQuantizer(dtype, block_scaling_dim=recipe.w_block_scaling_dim, **ways)
    return Float8CurrentScalingQuantizer(dtype, torch.device("cuda", torch.cuda.current_device()), **ways)


def spare_gammas(model: nn.Module) -> None:
    """Let Transformer Engine's RMSNorms whose gamma is frozen compute a gradient of their input alone."""
    for module in model.modules():
        if type(module).__name__ == "RMSNorm" and type(module).__module__.startswith("transformer_engine."):
            gamma = module.weight
            assert isinstance(gamma, torch.Tensor)
            if not gamma.requires_grad and gamma.dim() == 1:
                offset = int(bool(module.zero_centered_gamma))
                module.forward = partial(rms_norm, gamma=gamma, eps=float(module.eps), offset=offset)  # type: ignore


@torch.compiler.disable  # type: ignore[untyped-decorator]
def rms_norm(x: torch.Tensor, gamma: torch.Tensor, eps: float, offset: int = 0) -> torch.Tensor:
    """`x / sqrt(mean(x²) + eps) · (gamma + offset)` over the last dimension, in fp32, rounded once."""
    out = _RmsNorm.apply(x, gamma, eps, offset)  # type: ignore[no-untyped-call]
    assert isinstance(out, torch.Tensor)
    return out


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, x: torch.Tensor, gamma: torch.Tensor, eps: float, offset: int
    ) -> torch.Tensor:
        x = x.contiguous()  # a part of a larger tensor would keep all of it until the backward pass
        ctx.save_for_backward(x, gamma)
        ctx.eps, ctx.offset = eps, offset  # type: ignore[attr-defined]
        out: torch.Tensor = _fused(_forward, x)(x, gamma, eps, offset)
        return out

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, gamma = ctx.saved_tensors  # type: ignore[attr-defined]
        run = _fused(_backward, x)
        return run(grad, x, gamma, ctx.eps, ctx.offset), None, None, None  # type: ignore[attr-defined]


def _forward(x: torch.Tensor, gamma: torch.Tensor, eps: float, offset: int) -> torch.Tensor:
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale * (gamma.float() + offset)).to(x.dtype)


def _backward(grad: torch.Tensor, x: torch.Tensor, gamma: torch.Tensor, eps: float, offset: int) -> torch.Tensor:
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    normed, given = wide * scale, grad.float() * (gamma.float() + offset)
    return (scale * (given - normed * (given * normed).mean(-1, keepdim=True))).to(x.dtype)


def _fused(function: Any, x: torch.Tensor) -> Any:
    """`function` as one kernel where there is a GPU; on a CPU it runs as it stands."""
    return _compiled(function) if x.is_cuda else function


@cache
def _compiled(function: Any) -> Any:
    return torch.compile(function)
