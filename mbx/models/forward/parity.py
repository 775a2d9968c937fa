"""The forward leg of parity: one set of prompts through two models, one layer in memory at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from converters.rows.expr import Value
from mbx.models.device import Spread, is_main
from mbx.models.forward.bf16_noise import with_bf16_noise
from mbx.models.forward.divergence import BorderDiff, border_diffs, compare_traces, first_divergence
from mbx.models.forward.felt import felt_settings
from mbx.models.forward.logits import LogitDiff
from mbx.models.forward.loss import Losses, compare_losses
from mbx.models.forward.models import MegatronModel, Model, TransformersModel, vocab_size
from mbx.models.forward.rotary_floor import with_far_limit
from mbx.models.megatron.processes import megatron_on, on_every_rank
from mbx.models.pictures import Seen
from mbx.models.prompts import Passes, Prompts, passes

#: Largest difference of two fp32 logits, as a share of their spread, that rounding explains on models of a few layers.
FORWARD_TOLERANCE = 1e-4


@dataclass(frozen=True, slots=True)
class Forward:
    """What a forward comparison found: the differences, where they were taken, and what Megatron Core was lent for it.

    `lent`: rotary constants that Megatron Core cannot express and that were set from Transformers, one line each.
    `diverged`: the first border behind which hidden states of near positions are further apart than rounding explains.
    """

    titles: tuple[str, str]
    diff: LogitDiff
    borders: tuple[BorderDiff, ...]
    where: str
    lent: tuple[str, ...] = ()
    diverged: BorderDiff | None = None

    @property
    def ok(self) -> bool:
        """True only where the logits are within their limits and no border diverges before them."""
        return self.diff.ok and self.diverged is None

    @property
    def summary(self) -> str:
        """The figures, each with its unit, limit and reduction."""
        diff = self.diff
        kl = "is not finite" if diff.has_nan else f"{max(diff.kl, 0.0):.1e} nats (mean over positions)"
        limit = f"limit {diff.tolerance:.3g}"
        if diff.far is not None:
            limit += f", {diff.far.tolerance:.2e} from position {diff.far.start}"
        return f"max |Δlogit| {diff.max_abs:.2e} ({limit}), KL {kl}, top-1 {self._top1}"

    @property
    def _top1(self) -> str:
        noise = self.diff.noise
        if noise is None:
            return f"{self.diff.top1_agreement:.2%}"
        of = f"of {noise.num_positions} positions outside bf16 noise {noise.largest:.2g}"
        if not noise.outside:
            return f"{self.diff.top1_agreement:.2%} (none {of})"
        return f"{noise.agreement:.2%} (of {noise.outside} {of})"

    @property
    def figures(self) -> tuple[tuple[str, float], ...]:
        """The figures of `summary` by name; those of the bf16 noise where it was measured."""
        diff, noise = self.diff, self.diff.noise
        found = {
            "max_abs": diff.max_abs,
            "tolerance": diff.tolerance,
            "logit_spread": diff.spread,
            "mean_kl_nats": diff.kl,
            "top1_agreement": diff.top1_agreement,
            "positions": diff.num_positions,
        }
        if noise is not None:
            found |= {"bf16_noise": noise.largest, "near_positions": noise.num_positions}
            found |= {"outside_noise": noise.outside, "top1_agreement_outside_noise": noise.agreement}
        return tuple(found.items())

    @property
    def details(self) -> tuple[str, ...]:
        """Where the figures were taken, where the two first part, and what was lent."""
        lines = [f"KL({self.titles[0]} ‖ {self.titles[1]}) over {self.diff.num_positions} positions: {self.where}"]
        if self.diff.far is not None:
            lines.append(
                f"from position {self.diff.far.start} the limit is not below the floor of fp32, measured here: one "
                f"unit in the last place of the frequencies changes Transformers' logits by {self.diff.far.floor:.2e}"
            )
        noise = self.diff.noise
        if noise is not None:
            lines.append(f"top-1 over all positions {self.diff.top1_agreement:.2%}")
            if noise.disagreements:
                lines.append(
                    f"outside bf16 noise, top-1 first differs at near position {noise.disagreements[0]}, from 0"
                )
        if self.borders:
            worst = max(self.borders, key=lambda border: border.relative)
            lines.append(f"hidden states at {len(self.borders)} borders, the furthest apart behind {worst.line}")
        if not self.ok:
            if self.diff.first_bad_position is not None:
                at = self.diff.first_bad_position[1]
                lines.append(f"the first position over the limit is number {at}, from 0")
            first = self.diverged or first_divergence(self.borders)
            if first is not None:
                lines.append(f"the first to diverge is {first.line}")
            elif self.borders:
                lines.append("no border diverges: the difference is made by the output layer, or grows slowly")
        return (*lines, *(f"{line}: Transformers' own frequencies were used" for line in self.lent))


def read_prompts(
    prompts: Prompts,
    config: Mapping[str, Value],
    hf_path: Path,
    hf_config: Mapping[str, Value],
    seeing: Path | None = None,
) -> Passes:
    """`prompts` as passes for the model of `config`, and one with pictures if the folder `seeing` is of such a model.

    Raises what `mbx.models.prompts.passes` raises.
    """
    longest = config.get("model.max_sequence_length")
    found = passes(
        prompts,
        hf_path,
        hf_config,
        vocab_size=vocab_size(config),
        max_length=longest if isinstance(longest, int) else None,
    )
    if seeing is None:
        return found
    from mbx.models.transformers.pictures import pictured_pass

    batch = pictured_pass(seeing, vocab_size(config), prompts.seed)
    if batch is None:
        return found
    origin = f"{found.origin}, and drawn pictures in {batch.ids.shape[1]} tokens"
    return Passes((*found.batches, batch), origin)


@dataclass(frozen=True, slots=True)
class Compared:
    """What two models' passes showed, of what was asked for; `felt` are settings that change Transformers' logits."""

    forward: Forward | None
    losses: Losses | None
    felt: frozenset[str] = frozenset()


def compare_models(
    first: Model,
    second: Model,
    read: Passes,
    vocab: int,
    *,
    spread: Spread | None = None,
    tolerance: float | None = FORWARD_TOLERANCE,
    relative: bool = False,
    loss_tolerance: float | None = None,
    otherwise: Mapping[str, Value] | None = None,
) -> Compared | None:
    """Run both models over `read` and compare, within `tolerance`, logits at every position and hidden states behind
    every layer, and, within `loss_tolerance`, losses of the first batch; None leaves out either. `relative` makes the
    first a share of the logits' spread. `otherwise` are settings of Transformers' model: whether its logits would be
    others with each is found too.

    `vocab` is the true vocabulary size. On `cuda` both models run on a GPU, Megatron Core with Transformer Engine.
    Under torchrun Megatron Core's side is spread over all processes; the result is rank 0's, None elsewhere. Raises
    UnsupportedError where one of the two cannot run the model on this device, DeviceError where the device is missing.
    """
    spread = spread or Spread()
    models = (first, second)
    megatron = any(isinstance(model, MegatronModel) for model in models)
    found, losses, felt = None, None, frozenset[str]()
    with contextlib.ExitStack() as opened:
        with contextlib.ExitStack() as stack:
            if megatron:
                stack.enter_context(megatron_on(spread))
            by_model, seen = {}, tuple[Seen | None, ...]()
            for model in models:
                if isinstance(model, MegatronModel):
                    model.check(spread)  # before Transformers' pass, which may take hours
            # Transformers' first: what its tower sees is what Megatron Core's decoder is given.
            for model in sorted(models, key=lambda model: isinstance(model, MegatronModel)):
                if isinstance(model, MegatronModel):
                    seen = on_every_rank(seen)
                by_model[id(model)] = trace = model.trace(read.batches, vocab, spread, seen)
                opened.callback(trace.close)
                seen = trace.seen or seen
            traces = [by_model[id(model)] for model in models]
            if tolerance is not None:
                found = compare_traces(traces[0], traces[1], vocab, tolerance, relative=relative)
            if loss_tolerance is not None:
                losses = compare_losses(models, traces, read.batches[0], vocab, loss_tolerance)
        if not is_main():
            return None
        both = zip(models, traces, strict=True)
        reference = next(((model, trace) for model, trace in both if isinstance(model, TransformersModel)), None)
        if reference is not None:
            felt = felt_settings(*reference, read, vocab, spread.device, otherwise or {})
        if found is None:
            return Compared(None, losses, felt)
        diff, borders = found
        explained: dict[str, float] = {}
        if reference is not None:
            model, trace = reference
            diff = with_far_limit(diff, model, trace, read, vocab, spread.device)
            diff, explained = with_bf16_noise(diff, model, trace, read, vocab, spread.device)
        diverged = first_divergence(border_diffs(traces[0], traces[1], ~read.far), explained)
    where = f"{read.origin}; {spread.dtype} on {spread.device}"
    if megatron:
        where += f", {'Transformer Engine' if spread.device == 'cuda' else 'local'} spec"
        sizes = [f"{name} {size}" for name, size in (("tp", spread.tp), ("pp", spread.pp), ("ep", spread.ep))]
        where += "".join(f", {text}" for text in sizes if not text.endswith(" 1"))
    where += "".join(dict.fromkeys(model.note for model in models if isinstance(model, TransformersModel)))
    lent = tuple(line for model in models if isinstance(model, MegatronModel) for line in model.lent)
    return Compared(
        Forward((first.title, second.title), diff, borders, where, tuple(dict.fromkeys(lent)), diverged),
        losses,
        felt,
    )
