"""The loss of vocabulary-parallel logits as a sum of terms, in fp32, without a copy of the logits.

Tokens go through in chunks. A micro-batch takes two exchanges between the ranks of tensor parallelism, of maxima and
of sums of every token; the backward pass takes none, and writes the gradient where the logits were.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F

from mbx.train.distill.terms import Columns, Share, Term, Top, normalised, others
from mbx.train.model.teacher import LOSS_CHUNK


def total_loss(
    logits: torch.Tensor, terms: Sequence[Term], group: torch.distributed.ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor]:
    """Σ factor · term of every token, [tokens] in fp32, and each term by itself, [terms, tokens], without a gradient.

    logits: [tokens, width], this rank's columns. They are gone once the gradient was asked for. Collective.
    """
    loss, values = _Sum.apply(logits, terms, group)  # type: ignore[no-untyped-call]
    return loss, values


def likeliest(logits: torch.Tensor, k: int, temperature: float, held: Columns) -> Top:
    """The k likeliest tokens of logits [tokens, width], no more than the vocabulary has; collective over the ranks."""
    tokens = torch.cat([_best(_scaled(x[:, : held.real], temperature), k, held) for _, x in _chunks(logits)])
    parts = [
        others(_scaled(x[:, : held.real], temperature), held.here(tokens[rows], held.real))
        for rows, x in _chunks(logits)
    ]
    picked, tail, lse = normalised(*_everywhere([_joined(parts)], held.group)[0])
    return Top(tokens, picked - lse[:, None], tail - lse)


def _best(x: torch.Tensor, k: int, held: Columns) -> torch.Tensor:
    """Tokens of the k highest values over all ranks, [n, k]; x: [n, real]."""
    values, at = x.topk(min(k, x.shape[1]), dim=1)
    at = at + held.first
    ranks, each = held.group.size(), min(k, held.width)
    if ranks == 1:
        return at
    missing = each - values.shape[1]  # a rank that holds padding has fewer
    mine = (F.pad(values, (0, missing), value=-torch.inf), F.pad(at, (0, missing)))
    every = [[torch.empty_like(part) for _ in range(ranks)] for part in mine]
    for received, part in zip(every, mine, strict=True):
        torch.distributed.all_gather(received, part, group=held.group)
    best = torch.cat(every[0], 1).topk(k, dim=1).indices
    return torch.cat(every[1], 1).gather(1, best)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        logits: torch.Tensor,
        terms: Sequence[Term],
        group: torch.distributed.ProcessGroup,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        parts: list[list[Share]] = [[] for _ in terms]
        for rows, x in _chunks(logits):
            for term, mine in zip(terms, parts, strict=True):
                mine.append(term.local(rows, _scaled(x[:, : term.columns], term.temperature)))
        whole = _everywhere([_joined(mine) for mine in parts], group)
        each = torch.stack([term.settle(*share) for term, share in zip(terms, whole, strict=True)])
        ctx.save_for_backward(logits)
        ctx.terms = terms  # type: ignore[attr-defined]
        ctx.mark_non_differentiable(each)
        return torch.stack([term.factor * value for term, value in zip(terms, each, strict=True)]).sum(0), each

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad: torch.Tensor, _: torch.Tensor
    ) -> tuple[torch.Tensor, None, None]:
        (logits,) = ctx.saved_tensors  # type: ignore[attr-defined]
        terms: Sequence[Term] = ctx.terms  # type: ignore[attr-defined]
        # a schedule keeps the loss, and so this node, through the next micro-batch's forward pass
        ctx.terms = ()  # type: ignore[attr-defined]
        for rows, x in _chunks(logits):
            found = torch.zeros_like(x)
            for term in terms:
                mine = term.gradient(rows, _scaled(x[:, : term.columns], term.temperature))
                found[:, : term.columns] += mine.mul_((grad[rows] * (term.factor / term.temperature))[:, None])
            logits[rows] = found
        return logits, None, None


def _chunks(logits: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Rows, and what they hold in fp32: [n, width]."""
    step = max(1, LOSS_CHUNK // logits.shape[1])
    for first in range(0, len(logits), step):
        rows = slice(first, first + step)
        yield rows, logits[rows].float()


def _scaled(x: torch.Tensor, temperature: float) -> torch.Tensor:
    return x if temperature == 1.0 else x / temperature


def _joined(parts: Sequence[Share]) -> Share:
    maxima, sums, plain = zip(*parts, strict=True)
    return torch.cat(maxima, 1), torch.cat(sums, 1), torch.cat(plain, 1)


def _everywhere(shares: Sequence[Share], group: torch.distributed.ProcessGroup) -> list[Share]:
    """Each share's maxima [a, n], sums [a, n] relative to them and plain sums [c, n] over the ranks of `group`."""
    if group.size() == 1:
        return list(shares)
    highest = torch.cat([maxima for maxima, _, _ in shares])
    torch.distributed.all_reduce(highest, torch.distributed.ReduceOp.MAX, group=group)
    peaks = torch.split(highest, [len(maxima) for maxima, _, _ in shares])
    moved = [
        # a rank without a column has no maximum, and nothing to add
        sums * (maxima - peak).exp().masked_fill(maxima == -torch.inf, 0.0)
        for (maxima, sums, _), peak in zip(shares, peaks, strict=True)
    ]
    summed = torch.cat([part for sums, (_, _, plain) in zip(moved, shares, strict=True) for part in (sums, plain)])
    torch.distributed.all_reduce(summed, group=group)
    parts = torch.split(summed, [len(part) for _, sums, plain in shares for part in (sums, plain)])
    return [(peak, parts[2 * n], parts[2 * n + 1]) for n, peak in enumerate(peaks)]
