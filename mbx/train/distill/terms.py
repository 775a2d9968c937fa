"""What a loss over the vocabulary is the sum of: the data's cross entropy, and a teacher's divergence.

Each term sees a rank's columns of the logits, some rows at a time in fp32. What it needs of the other columns are
maxima and sums over them: it gives this rank's share (`local`), is told the whole (`settle`), and then knows the
gradient of every logit without another exchange (`gradient`).

KL(p | q) of a teacher p and a student q at temperature τ is Σ p (log p - log q), in nats, both softmaxes over
logits / τ and over the tokens of the vocabulary alone, so that rows of padding change nothing. Its gradient by a logit
shrinks with 1 / τ², which the factor of the term undoes (arXiv 1503.02531).

Of a teacher's k likeliest tokens alone, all others are one more outcome, whose probability both sides have exactly:
p_rest = 1 - Σ p_k and q_rest likewise. This is a divergence of its own, 0 where student and teacher agree, and by the
chain rule it falls short of the whole by p_rest · KL(p | q among the rest), which is never negative. Renormalised to
the k tokens it would not see what a student gives to the rest, and the student could give it anything.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

import torch

#: A rank's part of what is summed over ranks: maxima [a, n], sums [a, n] relative to them, plain sums [c, n].
Share: TypeAlias = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Columns:
    """A rank's columns of the logits: `width` of them from the token `first` on, of which `real` are tokens and the
    others pad the vocabulary; `group` are the ranks that share them out."""

    first: int
    width: int
    real: int
    group: torch.distributed.ProcessGroup

    @staticmethod
    def of(width: int, vocabulary: int, group: torch.distributed.ProcessGroup) -> Columns:
        """Of this rank, where each of `group` has `width`."""
        first = group.rank() * width
        return Columns(first, width, min(max(vocabulary - first, 0), width), group)

    def here(self, tokens: torch.Tensor, real: int) -> torch.Tensor:
        """Columns of `tokens`; `real`, one behind the last, for those of other ranks."""
        own = tokens - self.first
        return torch.where((own >= 0) & (own < real), own, real)


class Term(Protocol):
    """A loss of every token, `factor` times what it says; it reads `columns` of the logits, over `temperature`."""

    factor: float
    temperature: float

    @property
    def columns(self) -> int:
        """Columns that it reads, from the first."""
        ...

    def local(self, rows: slice, x: torch.Tensor) -> Share:
        """This rank's share, of x [n, columns]."""
        ...

    def settle(self, maxima: torch.Tensor, sums: torch.Tensor, plain: torch.Tensor) -> torch.Tensor:
        """The loss of every token, [tokens], from the same over all ranks."""
        ...

    def gradient(self, rows: slice, x: torch.Tensor) -> torch.Tensor:
        """The loss's gradient by x, [n, columns]."""
        ...


def exponentials(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The maximum of each row, and exponentials relative to it; x: [n, columns], of which there may be none."""
    peak = x.amax(1) if x.shape[1] else x.new_full((len(x),), -torch.inf)
    return peak, (x - peak.masked_fill(peak == -torch.inf, 0.0)[:, None]).exp_()


@dataclass
class CrossEntropy:
    """The negative logarithm of the label's probability over all columns, as Megatron Core's; labels: [tokens]."""

    labels: torch.Tensor
    held: Columns
    factor: float
    temperature: float = 1.0
    lse: torch.Tensor = field(init=False)

    @property
    def columns(self) -> int:
        """All columns: padding takes part in the softmax."""
        return self.held.width

    def local(self, rows: slice, x: torch.Tensor) -> Share:
        """The softmax's sum, and the label's logit."""
        peak, e = exponentials(x)
        at = self.held.here(self.labels[rows], self.columns)
        picked = x.gather(1, at.clamp(max=self.columns - 1)[:, None])[:, 0].masked_fill(at == self.columns, 0.0)
        return peak[None], e.sum(1)[None], picked[None]

    def settle(self, maxima: torch.Tensor, sums: torch.Tensor, plain: torch.Tensor) -> torch.Tensor:
        """The loss of every token."""
        self.lse = maxima[0] + sums[0].log()
        return self.lse - plain[0]

    def gradient(self, rows: slice, x: torch.Tensor) -> torch.Tensor:
        """softmax(x) less 1 at the label."""
        found = (x - self.lse[rows, None]).exp_()
        at = self.held.here(self.labels[rows], self.columns)
        mine = (at < self.columns).to(found.dtype)
        return found.scatter_add_(1, at.clamp(max=self.columns - 1)[:, None], -mine[:, None])


@dataclass
class Whole:
    """KL from a teacher's whole distribution; logits: [tokens, width], as the student's are cut."""

    logits: torch.Tensor
    held: Columns
    factor: float
    temperature: float
    lse: torch.Tensor = field(init=False)
    student: torch.Tensor = field(init=False)

    @property
    def columns(self) -> int:
        """Those of tokens."""
        return self.held.real

    def local(self, rows: slice, x: torch.Tensor) -> Share:
        """The sums of both softmaxes, and the expected difference of the logits."""
        y = self._teacher(rows)
        peak, e = exponentials(x)
        above, p = exponentials(y)
        sums = torch.stack((e.sum(1), p.sum(1), p.mul_(y.sub_(x)).sum(1)))
        return torch.stack((peak, above, above)), sums, x.new_empty(0, len(x))

    def settle(self, maxima: torch.Tensor, sums: torch.Tensor, plain: torch.Tensor) -> torch.Tensor:
        """KL of every token."""
        self.student, self.lse = maxima[:2] + sums[:2].log()
        return sums[2] / sums[1] - self.lse + self.student

    def gradient(self, rows: slice, x: torch.Tensor) -> torch.Tensor:
        """q - p."""
        q = (x - self.student[rows, None]).exp_()
        return q.sub_((self._teacher(rows).sub_(self.lse[rows, None])).exp_())

    def _teacher(self, rows: slice) -> torch.Tensor:
        return self.logits[rows, : self.columns].to(torch.float32, copy=True).div_(self.temperature)


@dataclass(frozen=True)
class Top:
    """A teacher's k likeliest tokens at some temperature: `tokens` [n, k], `logprobs` [n, k] in fp32, and `rest` [n],
    the logarithm of what all others have together."""

    tokens: torch.Tensor
    logprobs: torch.Tensor
    rest: torch.Tensor


@dataclass
class Likeliest:
    """KL from a teacher's k likeliest tokens and all others as one."""

    top: Top
    held: Columns
    factor: float
    temperature: float
    picked: torch.Tensor = field(init=False)
    lse: torch.Tensor = field(init=False)
    tail: torch.Tensor = field(init=False)

    @property
    def columns(self) -> int:
        """Those of tokens."""
        return self.held.real

    def local(self, rows: slice, x: torch.Tensor) -> Share:
        """The sum over the others, and the logits of the k tokens that are here."""
        return others(x, self.held.here(self.top.tokens[rows], self.columns))

    def settle(self, maxima: torch.Tensor, sums: torch.Tensor, plain: torch.Tensor) -> torch.Tensor:
        """KL of every token."""
        self.picked, self.tail, self.lse = normalised(maxima, sums, plain)
        p, rest = self.top.logprobs.exp(), self.top.rest
        known = (p * (self.top.logprobs - self.picked + self.lse[:, None])).sum(1)
        unknown = rest.exp() * (rest - self.tail + self.lse)
        return known + torch.where(rest > -torch.inf, unknown, 0.0)  # k tokens may be all there are

    def gradient(self, rows: slice, x: torch.Tensor) -> torch.Tensor:
        """q - p of the k tokens; of another, q less its share of what the teacher gives to the rest."""
        at = self.held.here(self.top.tokens[rows], self.columns)
        found = x.new_empty(len(x), self.columns + 1)
        found[:, : self.columns] = (x - self.lse[rows, None]).exp_()
        found[:, : self.columns] -= (x - (self.tail - self.top.rest)[rows, None]).exp_()
        known = (self.picked[rows] - self.lse[rows, None]).exp() - self.top.logprobs[rows].exp()
        return found.scatter_(1, at, known)[:, : self.columns]


def others(x: torch.Tensor, at: torch.Tensor) -> Share:
    """Maximum and sum over the columns of x, [n, columns], but those `at` [n, k], and the values there, [k, n]: 0
    where a column is another rank's."""
    columns = x.shape[1]
    wide = x.new_zeros(len(x), columns + 1)
    wide[:, :columns] = x
    picked = wide.gather(1, at)
    wide.scatter_(1, at, -torch.inf)
    peak, e = exponentials(wide[:, :columns])
    return peak[None], e.sum(1)[None], picked.t()


def normalised(
    maxima: torch.Tensor, sums: torch.Tensor, plain: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What `others` gave over all ranks, as logarithms: the values picked [n, k], Σ exp of the others [n], of all."""
    picked, tail = plain.t(), maxima[0] + sums[0].log()
    return picked, tail, torch.logaddexp(tail, picked.logsumexp(1))
