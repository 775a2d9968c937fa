"""Forward parity: logits of Megatron Core against logits of Transformers, two independent implementations."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from converters.errors import DifferenceError, UnsupportedError, UsageError

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True, slots=True)
class FarLimit:
    """The limit from position `start` on: not below `floor`, what one ulp of the rotary frequencies changes there."""

    start: int
    tolerance: float
    floor: float


@dataclass(frozen=True, slots=True)
class Bf16Noise:
    """Most likely tokens outside the noise of bf16 (`mbx.mcore.bf16_noise`).

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
    far positions, where one of their own was measured (`mbx.mcore.rotary_floor`). `other_top1`: numbers of the
    positions with another arg max. `noise`: those outside the noise of bf16, where it was measured.
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

    @property
    def ok(self) -> bool:
        """True only where all is finite, every logit within its limit, and top-1 the same outside the bf16 noise."""
        if self.noise is not None and self.noise.disagreements:
            return False
        limit = self.tolerance if self.far is None else self.far.tolerance
        return not self.has_nan and self.first_bad_position is None and self.max_abs <= limit


class LogitTally:
    """Compares logits a part of the vocabulary at a time, in float64: nothing grows with the vocabulary."""

    def __init__(self, tolerance: float) -> None:
        self.tolerance = tolerance
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
        both = torch.stack((a.detach().double().cpu(), b.detach().double().cpu()))
        difference = both[0] - both[1]
        self.finite &= both.isfinite().all(-1).all(0)
        self.largest = torch.maximum(self.largest, difference.abs().amax(-1))
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
        bad = torch.nonzero(largest > self.tolerance)
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
            tolerance=self.tolerance,
            largest=tuple(largest.tolist()),
            other_top1=tuple(torch.nonzero(~same).flatten().tolist()),
        )


def compare_logits(a: torch.Tensor, b: torch.Tensor, *, tolerance: float = 1e-4) -> LogitDiff:
    """Compare two logit tensors position by position in float64.

    a, b: [b, s, vocab]. Raises `DifferenceError` for unequal shapes (unequal vocabularies included) or no positions.
    """
    if a.shape != b.shape:
        raise DifferenceError(
            f"logits of unequal shape: got {list(a.shape)} against {list(b.shape)} ([batch, sequence, vocab])",
            hint="trim padding rows to the true vocabulary size on both sides before comparing",
        )
    if a.dim() != 3:
        raise UsageError(f"logits must be [batch, sequence, vocab], got {list(a.shape)}")
    if a.numel() == 0:
        raise DifferenceError(f"no logits to compare: shape {list(a.shape)}")
    tally = LogitTally(tolerance)
    tally.add(a.flatten(0, 1), b.flatten(0, 1))
    return tally.result(rows=a.shape[0])


def mcore_logits(
    model: nn.Module, input_ids: torch.Tensor, *, vocab_size: int, positions: torch.Tensor | None = None
) -> torch.Tensor:
    """Run a Megatron Core GPT or hybrid model in eval mode: `input_ids: [b, s]` → fp32 logits `[b, s, vocab_size]`.

    `vocab_size` is the true one; mcore's padding columns behind it are trimmed. `positions: [s]` places the tokens
    elsewhere than at 0, 1, 2, …. Gathers over tensor parallelism, so it is collective. Raises `UnsupportedError` for
    a pipeline of more than one stage, `DifferenceError` where the model has fewer columns than `vocab_size`,
    `UsageError` for token ids outside the vocabulary.
    """
    import torch
    from megatron.core import parallel_state

    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        raise UnsupportedError("forward parity runs one pipeline stage; got pipeline_model_parallel_size > 1")
    check_ids(input_ids, vocab_size)
    device = next(model.parameters()).device
    ids = input_ids.to(device)
    places = torch.arange(ids.shape[1]) if positions is None else positions
    position_ids = places.to(device).expand_as(ids)

    outputs: list[torch.Tensor] = []

    def keep(module: nn.Module, args: tuple[object, ...], output: tuple[torch.Tensor, object]) -> None:
        del module, args
        outputs[:] = [output[0].clone()]  # a copy: mcore's cross entropy works on the logits in place

    was_training = model.training
    model.eval()
    handle = model.get_submodule("output_layer").register_forward_hook(keep)
    try:
        with torch.no_grad(), rotated_at(model, positions):
            # With MTP heads GPTModel wants labels even for logits (it clones them); the loss is thrown away, and the
            # hook keeps the main head's logits, which are computed last. Labels change no logits.
            labels = ids if getattr(model, "mtp_process", False) else None
            model(ids, position_ids, None, labels=labels)
    finally:
        handle.remove()
        model.train(was_training)
    logits = outputs[0].transpose(0, 1)  # [s, b, vocab / tp] -> [b, s, vocab / tp]
    logits = gather_vocab(logits.contiguous())
    if logits.shape[-1] < vocab_size:
        raise DifferenceError(
            f"Megatron Core gives {logits.shape[-1]} logits a position, the vocabulary has {vocab_size}"
        )
    return logits[..., :vocab_size].float()


@contextlib.contextmanager
def rotated_at(model: nn.Module, positions: torch.Tensor | None) -> Iterator[None]:
    """Make the rotary tables of `model` those of `positions: [s]`; mcore itself counts 0, 1, 2, … from the length."""
    if positions is None:
        yield
        return
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    count = int(positions.max()) + 1

    def lengthen(module: nn.Module, args: tuple[object, ...]) -> tuple[object, ...]:
        del module
        return (count, *args[1:])

    def pick(module: nn.Module, args: object, output: object) -> object:
        del module, args
        if isinstance(output, tuple):  # YaRN: the table and its magnitude
            return (output[0][positions.to(output[0].device)], *output[1:])
        table = cast("torch.Tensor", output)
        return table[positions.to(table.device)]

    handles = []
    for module in model.modules():
        if isinstance(module, RotaryEmbedding):
            handles += [module.register_forward_pre_hook(lengthen), module.register_forward_hook(pick)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def hf_logits(hf_dir: Path, input_ids: torch.Tensor, *, trust_remote_code: bool = False) -> torch.Tensor:
    """Run a Hugging Face checkpoint in fp32 with eager attention: `input_ids: [b, s]` → fp32 logits `[b, s, vocab]`.

    Raises what `mbx.mcore.reference.load_transformers` raises.
    """
    from mbx.mcore.reference import load_transformers, transformers_logits

    return transformers_logits(load_transformers(hf_dir, trust_remote_code=trust_remote_code), input_ids)


def gather_vocab(logits: torch.Tensor) -> torch.Tensor:
    """Concatenate vocabulary shards over the tensor-parallel group: [b, s, vocab/tp] → [b, s, vocab]."""
    import torch
    from megatron.core import parallel_state

    tp = parallel_state.get_tensor_model_parallel_world_size()
    if tp == 1:
        return logits
    shards = [torch.empty_like(logits) for _ in range(tp)]
    torch.distributed.all_gather(shards, logits, group=parallel_state.get_tensor_model_parallel_group())
    return torch.cat(shards, dim=-1)


def check_ids(input_ids: torch.Tensor, vocab_size: int) -> None:
    """Refuse ids that are not a non-empty [b, s] or lie outside the vocabulary, with a UsageError."""
    if input_ids.dim() != 2 or input_ids.numel() == 0:
        raise UsageError(f"input_ids must be a non-empty [batch, sequence], got {list(input_ids.shape)}")
    low, high = int(input_ids.min()), int(input_ids.max())
    if low < 0 or high >= vocab_size:
        raise UsageError(f"input_ids span [{low}, {high}], outside a vocabulary of {vocab_size}")


def set_rope_frequencies(model: nn.Module, inv_freq: torch.Tensor) -> None:
    """Give a Megatron Core model rotary frequencies that its own arguments cannot express.

    `inv_freq: [rotary_dim / 2]`, radians per position, fp32. Megatron Core fixes Llama 3's constants (low 1, high 4,
    original length 8192; `RotaryEmbedding._apply_scaling`); a model with others is compared under its own, and the
    caller says so. Raises `UnsupportedError` where the model has no such table (learned positions, YaRN, MLA),
    `UsageError` for another number of frequencies.
    """
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    rope = getattr(model, "rotary_pos_emb", None)
    if rope is None or type(rope) is not RotaryEmbedding:
        raise UnsupportedError(
            f"rotary frequencies can be set on RotaryEmbedding only, the model has {type(rope).__name__}"
        )
    if inv_freq.shape != rope.inv_freq.shape:
        raise UsageError(f"inv_freq must be {list(rope.inv_freq.shape)}, got {list(inv_freq.shape)}")
    rope.inv_freq = inv_freq.detach().to(rope.inv_freq)
    RotaryEmbedding.forward.cache_clear()  # the cache is the class's, keyed by instance and length
