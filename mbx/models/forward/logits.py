"""The difference of two sets of logits, a part of the vocabulary at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from converters.errors import DifferenceError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class FarLimit:
    """The limit from position `start` on: not below `floor`, what one ulp of the rotary frequencies changes there."""

    start: int
    tolerance: float
    floor: float


@dataclass(frozen=True, slots=True)
class Bf16Noise:
    """Most likely tokens outside the noise of bf16 (`mbx.models.forward.bf16_noise`).

    `largest`: the largest |Δlogit| between the reference in bf16 and in fp32. Of `num_positions` near ones, `outside`
    have a margin of over twice the noise there; `disagreements` numbers those of them with another most likely token.
    """

    largest: float
    outside: int
    num_positions: int
    disagreements: tuple[int, ...] = ()

    @property
    def agreement(self) -> float:
        """Share of the positions outside the noise with the same most likely token; NaN where there are none."""
        return 1 - len(self.disagreements) / self.outside if self.outside else math.nan


@dataclass(frozen=True, slots=True)
class LogitDiff:
    """How far two logit tensors of one prompt set are apart.

    `max_abs`: largest absolute difference of two logits, infinite where either side is not finite.
    `kl`: KL(a || b) over the vocabulary in nats, mean over all positions of all rows; NaN where not finite.
    `top1_agreement`: share of positions with the same arg max. `first_bad_position`: (row, position) of the first
    position, in reading order, that is not finite or differs by more than `tolerance`; None where there is none.
    `has_nan`: either side holds NaN or an infinity. `largest`: the largest |Δ| of each position. `far`: the limit of
    far positions, where one of their own was measured (`rotary_floor`). `other_top1`: numbers of the positions with
    another arg max. `noise`: those outside the noise of bf16, where it was measured. `spread`: the standard deviation
    of a position's logits of `a` over the vocabulary, root mean square over positions.
    """

    max_abs: float
    kl: float
    top1_agreement: float
    first_bad_position: tuple[int, int] | None
    has_nan: bool
    num_positions: int
    tolerance: float
    largest: tuple[float, ...] = ()
    far: FarLimit | None = None
    other_top1: tuple[int, ...] = ()
    noise: Bf16Noise | None = None
    spread: float = math.nan

    @property
    def ok(self) -> bool:
        """True only where all is finite, every logit within its limit, and top-1 the same outside the bf16 noise."""
        if self.noise is not None and self.noise.disagreements:
            return False
        limit = self.tolerance if self.far is None else self.far.tolerance
        return not self.has_nan and self.first_bad_position is None and self.max_abs <= limit


class LogitTally:
    """Compares logits a part of the vocabulary at a time, in float64: nothing grows with the vocabulary.

    `tolerance` is a difference of two logits, or with `relative` a share of their spread.
    """

    def __init__(self, tolerance: float, *, relative: bool = False) -> None:
        self.tolerance, self.relative = tolerance, relative
        self.tokens = 0
        self._empty = True

    def add(self, a: torch.Tensor, b: torch.Tensor) -> None:
        """a, b: [positions, tokens], the next tokens of the vocabulary; DifferenceError for unequal shapes."""
        import torch

        if a.shape != b.shape:
            raise DifferenceError(f"logits of unequal shape: got {list(a.shape)} against {list(b.shape)}")
        if self._empty:
            self._empty = False
            rows = a.shape[0]
            self.finite = torch.ones(rows, dtype=torch.bool)
            self.largest = torch.zeros(rows, dtype=torch.float64)
            self.log_sums = torch.full((2, rows), -math.inf, dtype=torch.float64)
            self.weighted = torch.zeros(rows, dtype=torch.float64)
            self.best = torch.full((2, rows), -math.inf, dtype=torch.float64)
            self.best_token = torch.zeros((2, rows), dtype=torch.long)
            self.sums = torch.zeros((2, rows), dtype=torch.float64)
        both = torch.stack((a.detach().double().cpu(), b.detach().double().cpu()))
        difference = both[0] - both[1]
        self.finite &= both.isfinite().all(-1).all(0)
        self.largest = torch.maximum(self.largest, difference.abs().amax(-1))
        self.sums += torch.stack((both[0].sum(-1), both[0].square().sum(-1)))
        log_sums = torch.logaddexp(self.log_sums, both.logsumexp(-1))
        # The expected difference under softmax(a) so far, carried over to the new sum.
        mine = (both[0] - log_sums[0][:, None]).exp()
        self.weighted = self.weighted * (self.log_sums[0] - log_sums[0]).exp() + (mine * difference).sum(-1)
        self.log_sums = log_sums
        best, token = both.max(-1)
        better = best > self.best
        self.best_token = torch.where(better, token + self.tokens, self.best_token)
        self.best = torch.where(better, best, self.best)
        self.tokens += a.shape[1]

    def result(self, rows: int = 1) -> LogitDiff:
        """The difference over everything added, for positions that are `rows` equal rows; DifferenceError for none."""
        import torch

        if self._empty or not self.tokens or not self.finite.numel():
            raise DifferenceError("no logits to compare")
        largest = self.largest.masked_fill(~self.finite, math.inf)
        mean, square = self.sums / self.tokens
        spread = math.sqrt(max(0.0, float((square - mean.square()).mean())))
        tolerance = self.tolerance * spread if self.relative and math.isfinite(spread) else self.tolerance
        bad = torch.nonzero(largest > tolerance)
        has_nan = not bool(self.finite.all())
        same = self.best_token[0] == self.best_token[1]
        kl = self.weighted - self.log_sums[0] + self.log_sums[1]
        return LogitDiff(
            max_abs=float(largest.max()),
            kl=math.nan if has_nan else float(kl.mean()),
            top1_agreement=float(same.double().mean()),
            first_bad_position=divmod(int(bad[0]), largest.numel() // rows) if len(bad) else None,
            has_nan=has_nan,
            num_positions=largest.numel(),
            tolerance=tolerance,
            largest=tuple(largest.tolist()),
            other_top1=tuple(torch.nonzero(~same).flatten().tolist()),
            spread=spread,
        )
