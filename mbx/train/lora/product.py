"""The product of a frozen weight and its adapter in one autograd node, without a pass over the activations too many.

Apart, `y = W x` and `y += s · B A x` copy y once forward, and backward add two gradients of x that were both written
out. Here the small products are accumulated into the large ones' results: with T tokens, T · (2 · out + 2 · in)
elements less to read and write a linear.

Under tensor and sequence parallelism the sum is what ranks exchange, so that an adapter costs no collective of its own
but one, over the few columns between A and B.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

if TYPE_CHECKING:
    from mbx.models.megatron.core.config import TransformerConfig

#: Bases whose forward pass is a norm (the first), or nothing, and then the product.
_NORMED = ("TELayerNormColumnParallelLinear",)
_PLAIN = ("TEColumnParallelLinear", "TERowParallelLinear", "ColumnParallelLinear", "RowParallelLinear")

#: Whether products of 16 bits can be added in 32 (PyTorch from 2.8 on, on GPUs).
_ADDS_WIDE = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 8)


@dataclass(frozen=True, slots=True)
class Norm:
    """The norm in front of a product; `offset` is 1 where gamma is stored less one."""

    kind: str
    eps: float
    offset: int


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the B's lie in the matrix that joins them, whose rows are `groups` repeats of `stride`.

    `blocks`: by B, the row within a repeat at which it begins, its rows there, its first column and its columns; the
    rest is zero. `columns`: of the matrix, as many as A has rows.
    """

    groups: int
    stride: int
    columns: int
    blocks: tuple[tuple[int, int, int, int], ...]

    def is_one(self) -> bool:
        """Whether a single B is the whole matrix."""
        return self.blocks == ((0, self.stride, 0, self.columns),) and self.groups == 1


@dataclass(frozen=True, slots=True)
class Shared:
    """Ranks that share the tokens between linears, and of this linear its output rows, or (`by_columns`) its columns.

    By rows: x and its gradient are of this rank's tokens, y is of all. By columns: the other way round.
    """

    group: torch.distributed.ProcessGroup
    by_columns: bool

    def gathered(self, mine: torch.Tensor) -> torch.Tensor:
        """The tokens of all ranks: [tokens / ranks, n] → [tokens, n]."""
        whole = mine.new_empty(len(mine) * self.group.size(), mine.shape[1])
        torch.distributed.all_gather_into_tensor(whole, mine.contiguous(), group=self.group)
        return whole

    def summed(self, part: torch.Tensor) -> Callable[[], torch.Tensor]:
        """This rank's tokens of a sum over ranks, once it is asked for: [tokens, n] → [tokens / ranks, n]."""
        mine = part.new_empty(len(part) // self.group.size(), part.shape[1])
        work = torch.distributed.reduce_scatter_tensor(mine, part.contiguous(), group=self.group, async_op=True)

        def wait() -> torch.Tensor:
            assert work is not None
            work.wait()
            return mine

        return wait


class _Product(torch.autograd.Function):
    """`y = x Wᵀ + bias`, then each B added to its rows of y from its columns of `s · x Aᵀ`; gradients for x, A, B."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        scale: float,
        layout: Layout,
        unread: bool,
        shared: Shared | None,
        a: torch.Tensor,
        *factors: torch.Tensor,
    ) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        by_columns = shared is not None and shared.by_columns
        seen = rows if shared is None or by_columns else shared.gathered(rows)
        h = _scaled(seen, a.t(), scale)
        if unread:
            y = rows.new_empty(len(seen) // (shared.group.size() if shared and by_columns else 1), weight.shape[0])
        else:
            y = F.linear(seen, weight, None if by_columns else bias)
            for b, outputs, ranks in _places(factors, layout):
                y[:, outputs].addmm_(h[:, ranks], b.t())
            if shared is not None and by_columns:
                y = shared.summed(y)()
                y = y if bias is None else y.add_(bias)
        ctx.save_for_backward(rows, weight, h, a, *factors)
        ctx.scale, ctx.layout, ctx.shared = scale, layout, shared  # type: ignore[attr-defined]
        return y.view(-1, *x.shape[1:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, weight, h, a, *factors = ctx.saved_tensors  # type: ignore[attr-defined]
        scale: float = ctx.scale  # type: ignore[attr-defined]
        layout: Layout = ctx.layout  # type: ignore[attr-defined]
        shared: Shared | None = ctx.shared  # type: ignore[attr-defined]
        by_rows = shared is not None and not shared.by_columns
        g = grad.reshape(-1, grad.shape[-1])
        if shared is not None and shared.by_columns:
            g = shared.gathered(g)
        places = list(_places(factors, layout))
        gh: torch.Tensor
        if len(places) == 1:
            gh = _scaled(g[:, places[0][1]], places[0][0], scale)
        else:
            gh, begun = g.new_empty(len(g), layout.columns), set[int]()
            for b, outputs, ranks in places:
                beta = int(ranks.start in begun)  # several B's may share an A
                gh[:, ranks].addmm_(g[:, outputs], b, beta=beta, alpha=scale)
                begun.add(ranks.start)
        mine = shared.summed(gh) if shared is not None and by_rows else None
        gx, summed = None, None
        if ctx.needs_input_grad[0]:  # type: ignore[attr-defined]
            gx = (g @ weight).addmm_(gh, a)
            summed = shared.summed(gx) if shared is not None and by_rows else None
        if layout.groups > 1:
            gb = _parted(g.t() @ h, factors, layout)
        else:
            gb = [_gradient(b, g[:, outputs].t(), h[:, ranks]) for b, outputs, ranks in places]
        ga = _gradient(a, (mine() if mine is not None else gh).t(), rows)
        gx = summed() if summed is not None else gx
        gx = None if gx is None else gx.view(-1, *grad.shape[1:-1], weight.shape[1])
        return gx, None, None, None, None, None, None, ga, *gb


def _scaled(left: torch.Tensor, right: torch.Tensor, scale: float) -> torch.Tensor:
    """`scale · left @ right` in one kernel."""
    return torch.addmm(left.new_empty(()), left, right, beta=0, alpha=scale)


def _gradient(factor: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The gradient `left @ right` of a factor.

    Where Megatron Core holds the sum over a step's micro-batches, the product is added to it as it is computed, in its
    precision, and what is returned is read by nobody: a gradient less to write, read and round, which were 396 of the
    3,778 kernels of a step of an 8B model's adapters.
    """
    held = getattr(factor, "main_grad", None)
    if not isinstance(held, torch.Tensor) or not factor.is_leaf:
        return left @ right
    if held.dtype == left.dtype:
        held.addmm_(left, right)
    elif _ADDS_WIDE and left.is_cuda and held.dtype == torch.float32:
        torch.addmm(held, left, right, out_dtype=torch.float32, out=held)
    else:
        return left @ right
    factor.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    return torch.empty_like(factor)


def _places(factors: Sequence[torch.Tensor], layout: Layout) -> Iterator[tuple[torch.Tensor, slice, slice]]:
    """Each B with its rows of the output and its columns of `x Aᵀ`; interleaved B's are one, with zeros between."""
    if layout.groups > 1:
        joined = joined_factors(factors, layout)
        yield joined, slice(0, joined.shape[0]), slice(0, joined.shape[1])
        return
    for b, (row, size, column, width) in zip(factors, layout.blocks, strict=True):
        yield b, slice(row, row + size), slice(column, column + width)


def stacked(factors: Sequence[torch.Tensor], groups: int = 1) -> Layout:
    """B's with an A each, one behind the other in every repeat."""
    blocks, row, column = [], 0, 0
    for b in factors:
        blocks.append((row, b.shape[0] // groups, column, b.shape[1]))
        row, column = row + b.shape[0] // groups, column + b.shape[1]
    return Layout(groups, row, column, tuple(blocks))


def joined_factors(factors: Sequence[torch.Tensor], layout: Layout) -> torch.Tensor:
    """`factors` as one [rows, columns] of a layout, zero elsewhere; one that is all of it is itself.

    Dimensions in front of a factor's two stay.
    """
    if layout.is_one():
        return factors[0]
    before = factors[0].shape[:-2]
    joined = factors[0].new_zeros(*before, layout.groups, layout.stride, layout.columns)
    for b, (row, size, column, width) in zip(factors, layout.blocks, strict=True):
        joined[..., row : row + size, column : column + width] = b.view(*before, layout.groups, size, width)
    return joined.view(*before, -1, layout.columns)


def _parted(joined: torch.Tensor, factors: Sequence[torch.Tensor], layout: Layout) -> list[torch.Tensor]:
    """The inverse of `joined_factors`: each B's part of a joined gradient."""
    repeats = joined.view(layout.groups, layout.stride, layout.columns)
    pairs = zip(factors, layout.blocks, strict=True)
    return [repeats[:, row : row + size, at : at + width].reshape(b.shape) for b, (row, size, at, width) in pairs]


def product(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    a: torch.Tensor,
    factors: Sequence[torch.Tensor],
    scale: float,
    *,
    layout: Layout | None = None,
    unread: bool = False,
    shared: Shared | None = None,
) -> torch.Tensor:
    """`x Wᵀ + bias + scale · (x Aᵀ) Bᵀ` with W and bias frozen.

    x: [..., in], weight: [out, in], a: [columns, in], factors as `layout` joins them to B: [out, columns], by default
    `stacked`; all of one dtype. `unread`: the output's values matter to nobody (a recomputed layer's last product) and
    are not computed. `shared`: W is this rank's part, A its columns or B its rows; gradients of the factor that every
    rank holds whole are this rank's share of a sum.
    """
    layout = layout or stacked(factors)
    out = _Product.apply(x, weight, bias, scale, layout, unread, shared, a, *factors)  # type: ignore[no-untyped-call]
    assert isinstance(out, torch.Tensor)
    return out


def kind_of(base: nn.Module) -> str:
    """Megatron Core's class of a linear, also where ours is derived from it and puts a norm behind the product."""
    kind = type(base)
    return (kind.__mro__[1] if hasattr(base, "behind") else kind).__name__


def normed(x: torch.Tensor, base: nn.Module, norm: Norm) -> torch.Tensor:
    """The base's own norm of x, computed in fp32 and rounded once."""
    gamma = base.layer_norm_weight
    assert isinstance(gamma, torch.Tensor)
    if norm.offset:
        gamma = gamma + norm.offset
    if norm.kind == "RMSNorm":
        return F.rms_norm(x, (x.shape[-1],), gamma, norm.eps)
    beta = base.layer_norm_bias
    assert isinstance(beta, torch.Tensor)
    return F.layer_norm(x, (x.shape[-1],), gamma, beta, norm.eps)


def norm_of(base: nn.Module) -> Norm | None:
    """The norm that is part of `base`, None where it has none."""
    if kind_of(base) not in _NORMED:
        return None
    return Norm(str(base.normalization), float(base.eps), int(bool(base.zero_centered_gamma)))  # type: ignore[arg-type]


def biases(base: nn.Module) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The bias that `base` adds and the one it hands to its caller instead; at most one is not None."""
    bias = getattr(base, "bias", None)
    if not isinstance(bias, torch.Tensor) or not bias.numel():
        return None, None
    deferred = getattr(base, "te_return_bias", None)
    if deferred is None:
        deferred = base.skip_bias_add
    return (None, bias) if deferred else (bias, None)


def fits(base: nn.Module, *, tp: int, quantized: bool) -> bool:
    """Whether `product` may stand for `base`: a frozen, unquantized weight of a known linear, whole or with its tokens
    shared out as well."""
    weight, kind = base.weight, kind_of(base)
    return (
        (tp == 1 or bool(getattr(base, "sequence_parallel", False)))
        and not quantized
        and (kind in _PLAIN or (kind in _NORMED and hasattr(base, "layer_norm_weight")))
        and isinstance(weight, torch.Tensor)
        and not weight.requires_grad
    )


def ends_checkpoint(parent: nn.Module, leaf: str, config: TransformerConfig) -> bool:
    """Whether nothing but a residual addition lies between this linear and the end of a checkpointed span.

    Then its output is not read when the span is computed again: an addition's backward pass needs no operand. It holds
    for the MLP's second product where every layer is a span of its own.
    """
    whole = config.recompute_granularity == "full" and config.recompute_method == "uniform"
    return whole and config.recompute_num_layers == 1 and leaf == "linear_fc2" and type(parent).__name__ == "MLP"
