"""The one-node product of a frozen weight and its adapter, against the products it joins."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mbx.train.lora.product import biases, fits, joined_factors, norm_of, normed, product, stacked


def _tensors(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = {"x": (5, 2, 8), "weight": (12, 8), "bias": (12,), "a": (3, 8), "b": (12, 3)}
    made = {name: torch.randn(size, generator=generator, dtype=torch.float64) for name, size in sizes.items()}
    return {name: t.requires_grad_(name in ("x", "a", "b")) for name, t in made.items()}


@pytest.mark.parametrize("with_bias", [False, True])
def test_output_and_gradients_are_those_of_the_parts(with_bias: bool) -> None:
    ours, theirs = _tensors(0), _tensors(0)
    bias = ours["bias"] if with_bias else None
    y = product(ours["x"], ours["weight"], bias, ours["a"], [ours["b"]], 0.7)
    expected = F.linear(theirs["x"], theirs["weight"], bias)
    expected = expected + 0.7 * F.linear(F.linear(theirs["x"], theirs["a"]), theirs["b"])
    torch.testing.assert_close(y, expected)
    seed = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1))
    y.backward(seed)
    expected.backward(seed)
    for name in ("x", "a", "b"):
        torch.testing.assert_close(ours[name].grad, theirs[name].grad, msg=name)
    assert ours["weight"].grad is None


def test_gradients_are_added_where_megatron_core_holds_them() -> None:
    """Two passes, as of two micro-batches, against autograd's sum."""
    ours, theirs = _tensors(2), _tensors(2)
    factors = {name: nn.Parameter(ours[name].detach()) for name in ("a", "b")}
    for factor in factors.values():
        factor.main_grad = torch.full_like(factor, 0.25)  # type: ignore[attr-defined]
        factor.grad_added_to_main_grad = False  # type: ignore[attr-defined]
    for _ in range(2):
        product(ours["x"], ours["weight"], None, factors["a"], [factors["b"]], 0.7).square().sum().backward()
        product(theirs["x"], theirs["weight"], None, theirs["a"], [theirs["b"]], 0.7).square().sum().backward()
    torch.testing.assert_close(ours["x"].grad, theirs["x"].grad)
    for name, factor in factors.items():
        assert factor.grad_added_to_main_grad and factor.grad is not None  # type: ignore[attr-defined]
        torch.testing.assert_close(factor.main_grad - 0.25, theirs[name].grad, msg=name)  # type: ignore[attr-defined]


def test_factors_of_their_own_rows_are_a_block_diagonal_one() -> None:
    t = _tensors(4)
    parts = [torch.randn(7, 1, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)]
    parts = [part.requires_grad_() for part in parts]
    y = product(t["x"], t["weight"], None, t["a"], parts, 0.5)
    joined = product(t["x"], t["weight"], None, t["a"], [torch.block_diag(*parts)], 0.5)
    torch.testing.assert_close(y, joined)
    wanted = [t["x"], t["a"], *parts]
    grads = [torch.autograd.grad(out.square().sum(), wanted) for out in (y, joined)]
    torch.testing.assert_close(*grads)
    swapped = product(t["x"], t["weight"], None, t["a"], parts[::-1], 0.5)
    assert not torch.allclose(swapped, y)


def test_interleaved_factors_are_one_with_zeros_between() -> None:
    """Two groups of (2 rows of the first, 1 of the second) against the same rows gathered by hand."""
    t = _tensors(5)
    weight = t["weight"][:6]
    parts = [torch.randn(4, 1, dtype=torch.float64), torch.randn(2, 2, dtype=torch.float64)]
    parts = [part.requires_grad_() for part in parts]
    y = product(t["x"], weight, None, t["a"], parts, 0.5, layout=stacked(parts, 2))
    order = [0, 1, 4, 2, 3, 5]  # rows of the block-diagonal factor in interleaved order
    joined = torch.block_diag(*parts)[order]
    torch.testing.assert_close(joined_factors(parts, stacked(parts, 2)), joined.detach())
    expected = product(t["x"], weight, None, t["a"], [joined], 0.5)
    torch.testing.assert_close(y, expected)
    wanted = [t["x"], t["a"], *parts]
    grads = [torch.autograd.grad(out.square().sum(), wanted) for out in (y, expected)]
    torch.testing.assert_close(*grads)


def test_an_unread_output_changes_no_gradient() -> None:
    ours, theirs = _tensors(6), _tensors(6)
    seed = torch.randn(5, 2, 12, dtype=torch.float64)
    for t, unread in ((ours, True), (theirs, False)):
        product(t["x"], t["weight"], None, t["a"], [t["b"]], 0.7, unread=unread).backward(seed)
    for name in ("x", "a", "b"):
        torch.testing.assert_close(ours[name].grad, theirs[name].grad, rtol=0, atol=0, msg=name)


def test_gradients_agree_with_finite_differences() -> None:
    t = _tensors(2)
    assert torch.autograd.gradcheck(
        lambda x, a, b: product(x, t["weight"], t["bias"], a, [b], 1.3), (t["x"], t["a"], t["b"])
    )


def test_an_input_that_needs_no_gradient_gets_none() -> None:
    t = _tensors(3)
    x = t["x"].detach()
    product(x, t["weight"], None, t["a"], [t["b"]], 1.0).sum().backward()
    assert x.grad is None and t["a"].grad is not None and t["b"].grad is not None


class TELayerNormColumnParallelLinear(nn.Module):
    """The attributes that Transformer Engine's class has and the product reads."""

    def __init__(self, kind: str, *, zero_centered: bool, deferred: bool) -> None:
        super().__init__()
        self.normalization, self.eps, self.zero_centered_gamma = kind, 1e-5, zero_centered
        self.weight = nn.Parameter(torch.ones(4, 6), requires_grad=False)
        self.bias = nn.Parameter(torch.ones(4), requires_grad=False)
        self.layer_norm_weight = nn.Parameter(torch.full((6,), 0.5), requires_grad=False)
        self.layer_norm_bias = nn.Parameter(torch.full((6,), 2.0), requires_grad=False)
        self.te_return_bias = deferred


def test_the_norm_of_a_fused_linear() -> None:
    x = torch.randn(3, 6)
    root = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    for zero_centered, gamma in ((False, 0.5), (True, 1.5)):
        base = TELayerNormColumnParallelLinear("RMSNorm", zero_centered=zero_centered, deferred=False)
        norm = norm_of(base)
        assert norm is not None
        torch.testing.assert_close(normed(x, base, norm), root * gamma)
    base = TELayerNormColumnParallelLinear("LayerNorm", zero_centered=False, deferred=True)
    norm = norm_of(base)
    assert norm is not None
    torch.testing.assert_close(normed(x, base, norm), F.layer_norm(x, (6,)) * 0.5 + 2.0)
    assert norm_of(nn.Linear(2, 2)) is None


def test_who_adds_the_bias() -> None:
    added = TELayerNormColumnParallelLinear("RMSNorm", zero_centered=False, deferred=False)
    assert biases(added) == (added.bias, None)
    deferred = TELayerNormColumnParallelLinear("RMSNorm", zero_centered=False, deferred=True)
    assert biases(deferred) == (None, deferred.bias)


def test_which_bases_it_stands_for() -> None:
    base = TELayerNormColumnParallelLinear("RMSNorm", zero_centered=False, deferred=False)
    assert fits(base, tp=1, quantized=False)
    assert not fits(base, tp=2, quantized=False), "the input is gathered between the factors"
    assert not fits(base, tp=1, quantized=True), "FP8 products stay Transformer Engine's"
    base.weight.requires_grad_(True)
    assert not fits(base, tp=1, quantized=False), "a trained weight needs its gradient"
    assert not fits(nn.Linear(6, 4), tp=1, quantized=False)
