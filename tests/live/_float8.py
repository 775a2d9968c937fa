"""Parameters that are codes, as Transformer Engine's are: what its `quantized_tensor.py` does with them, on a CPU."""

from __future__ import annotations

import torch
from torch import nn


class CurrentScaling:
    """A quantiser whose scale is of the values that it is given."""

    def scale_of(self, values: torch.Tensor) -> torch.Tensor:
        return values.float().abs().amax().clamp(min=1e-12) / 448


class Float8Quantizer(CurrentScaling):
    """Delayed scaling's, by its name there."""


class Float8(torch.Tensor):
    """Codes times a scale, and no memory of its own dtype; `transposed` is what only the parameter itself keeps."""

    codes: torch.Tensor
    scale: torch.Tensor
    transposed: torch.Tensor | None
    _quantizer: CurrentScaling | None

    @staticmethod
    def __new__(cls, codes: torch.Tensor, scale: torch.Tensor, quantizer: CurrentScaling | None = None) -> Float8:
        made = torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.bfloat16)  # type: ignore[attr-defined]
        made.codes, made.scale, made.transposed, made._quantizer = codes, scale, None, quantizer
        return made  # type: ignore[no-any-return]

    @classmethod
    def of(cls, values: torch.Tensor, quantizer: CurrentScaling) -> Float8:
        """Codes of values, and of their transpose."""
        made = cls(torch.empty_like(values, dtype=torch.float8_e4m3fn), torch.empty(()), quantizer)
        made.quantize_(values)
        return made

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if function is torch.ops.aten.detach.default:
            return cls(args[0].codes, args[0].scale, args[0]._quantizer)
        if function is torch.ops.aten.copy_.default and isinstance(args[0], cls):
            assert not isinstance(args[1], cls)
            args[0].quantize_(args[1])
            return None
        raise AssertionError(f"{function}: nobody computes with codes")

    def quantize_(self, values: torch.Tensor) -> None:
        assert self._quantizer is not None and values.shape == self.codes.shape
        self.scale.copy_(self._quantizer.scale_of(values))
        self.codes.copy_((values.float() / self.scale).to(torch.float8_e4m3fn))
        self.transposed = self.codes.t().contiguous()

    def dequantize(self) -> torch.Tensor:  # type: ignore[override]
        return (self.codes.float() * self.scale).bfloat16()


def coded(chunk: nn.Module, quantizer: CurrentScaling, *, ends: tuple[str, ...]) -> dict[str, Float8]:
    """Put codes in place of a chunk's parameters whose names end so."""
    out = {}
    for name, parameter in list(chunk.named_parameters()):
        if name.endswith(ends):
            value = nn.Parameter(Float8.of(parameter.detach(), quantizer), requires_grad=False)
            value.__dict__.update(parameter.__dict__)
            path, _, leaf = name.rpartition(".")
            setattr(chunk.get_submodule(path), leaf, value)
            out[name] = value
    return out  # type: ignore[return-value]
