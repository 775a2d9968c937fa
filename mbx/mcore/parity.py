"""The forward leg of parity: one set of prompts through two models, one layer in memory at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from converters.errors import UsageError
from converters.expr import Value
from converters.isos import inexpressible_rope
from converters.tensors import StoredTensor
from mbx.io.files import FileSource
from mbx.io.hf import read_config
from mbx.mcore.bf16_noise import with_bf16_noise
from mbx.mcore.device import Spread, megatron_on, world_of
from mbx.mcore.divergence import BorderDiff, compare_traces, first_divergence
from mbx.mcore.forward import LogitDiff
from mbx.mcore.prompts import Batch, Passes, Prompts, passes
from mbx.mcore.rotary_floor import with_far_limit
from mbx.mcore.trace import Trace

if TYPE_CHECKING:
    import torch

    from mbx.mcore.mcore_weights import StoredWeights

#: Largest difference of two fp32 logits that rounding explains on models of a few layers.
FORWARD_TOLERANCE = 1e-4


@dataclass(frozen=True, slots=True)
class TransformersModel:
    """Transformers' model of a Hugging Face folder."""

    path: Path
    title: str = field(default="Transformers", init=False)

    @property
    def note(self) -> str:
        """Under which class Transformers runs a model that it has none for; empty where it has."""
        from mbx.mcore.twins import twin_of

        twin = twin_of(read_config(self.path))
        return "" if twin is None else f"; {twin.note}"

    def trace(self, batches: Sequence[Batch], vocab: int, spread: Spread) -> Trace:
        """The pass, on rank 0; an empty trace elsewhere."""
        del vocab
        if world_of()[0]:
            return Trace({}, _nothing)
        from mbx.mcore.transformers_side import trace_transformers

        return trace_transformers(self.path, batches, device=spread.device)


@dataclass(frozen=True, slots=True)
class MegatronModel:
    """Megatron Core's model of a flat `config`, with the weights of a Megatron checkpoint of any format.

    `tensors` by torch_dist key have their chunks below `root`; with `torch_dist`, torch's reader reads that folder.
    `reference` and `hf_config` (v4 spelling) say which rotary frequencies the config cannot express.
    """

    config: Mapping[str, Value]
    root: Path
    tensors: Mapping[str, StoredTensor]
    torch_dist: bool = True
    reference: Path | None = None
    hf_config: Mapping[str, Value] = field(default_factory=dict)
    title: str = field(default="Megatron Core", init=False)

    @property
    def embedded_rows(self) -> int:
        """Rows of the embedding, padding included."""
        embedding = self.tensors.get("embedding.word_embeddings.weight")
        return vocab_size(self.config) if embedding is None else embedding.shape[0]

    @property
    def lent(self) -> tuple[str, ...]:
        """Rotary constants that Megatron Core cannot express, one line each."""
        return tuple(inexpressible_rope(self.hf_config)) if self.reference is not None else ()

    @property
    def frequencies(self) -> torch.Tensor | None:
        """Transformers' rotary frequencies, where Megatron Core's constants differ."""
        from mbx.mcore.reference import transformers_frequencies

        return transformers_frequencies(self.reference) if self.lent and self.reference is not None else None

    def weights(self, source: FileSource) -> StoredWeights:
        """The checkpoint's weights."""
        from mbx.mcore.mcore_weights import StoredWeights

        if not self.torch_dist:
            return StoredWeights(self.tensors, source)
        from mbx.mcore.dcp_weights import TorchDistWeights

        return TorchDistWeights(self.root, self.tensors, source)

    def trace(self, batches: Sequence[Batch], vocab: int, spread: Spread) -> Trace:
        """The pass; collective, inside `megatron_on`."""
        from mbx.mcore.mcore_side import trace_megatron

        source = FileSource(self.root)
        weights = self.weights(source)
        found = trace_megatron(self.config, weights, batches, vocab=vocab, spread=spread, frequencies=self.frequencies)
        return Trace(found.hidden, found.head, source.close)


Model: TypeAlias = TransformersModel | MegatronModel


@dataclass(frozen=True, slots=True)
class Forward:
    """What a forward comparison found: the differences, where they were taken, and what Megatron Core was lent for it.

    `lent`: rotary constants that Megatron Core cannot express and that were set from Transformers, one line each.
    """

    titles: tuple[str, str]
    diff: LogitDiff
    borders: tuple[BorderDiff, ...]
    where: str
    lent: tuple[str, ...] = ()

    @property
    def summary(self) -> str:
        """The figures, each with its unit, limit and reduction."""
        diff = self.diff
        kl = "is not finite" if diff.has_nan else f"{max(diff.kl, 0.0):.1e} nats (mean over positions)"
        limit = f"limit {diff.tolerance:g}"
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
        found: tuple[tuple[str, float], ...] = (
            ("max_abs", diff.max_abs),
            ("tolerance", diff.tolerance),
            ("mean_kl_nats", diff.kl),
            ("top1_agreement", diff.top1_agreement),
            ("positions", diff.num_positions),
        )
        if noise is None:
            return found
        return (
            *found,
            ("bf16_noise", noise.largest),
            ("near_positions", noise.num_positions),
            ("outside_noise", noise.outside),
            ("top1_agreement_outside_noise", noise.agreement),
        )

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
        if not self.diff.ok:
            if self.diff.first_bad_position is not None:
                at = self.diff.first_bad_position[1]
                lines.append(f"the first position over the limit is number {at}, from 0")
            first = first_divergence(self.borders)
            if first is not None:
                lines.append(f"the first to diverge is {first.line}")
            elif self.borders:
                lines.append("no border diverges: the difference is made by the output layer, or grows slowly")
        return (*lines, *(f"{line}: Transformers' own frequencies were used" for line in self.lent))


def read_prompts(
    prompts: Prompts, config: Mapping[str, Value], hf_path: Path, hf_config: Mapping[str, Value]
) -> Passes:
    """`prompts` as passes for the model of `config`; raises what `mbx.mcore.prompts.passes` raises."""
    longest = config.get("model.max_sequence_length")
    return passes(
        prompts,
        hf_path,
        hf_config,
        vocab_size=vocab_size(config),
        max_length=longest if isinstance(longest, int) else None,
    )


def compare_forward(
    first: Model,
    second: Model,
    read: Passes,
    vocab: int,
    *,
    spread: Spread | None = None,
    tolerance: float = FORWARD_TOLERANCE,
) -> Forward | None:
    """Difference of logits at every position of `read`, and of hidden states behind every layer.

    `vocab` is the true vocabulary size. On `cuda` both models run on a GPU, Megatron Core with Transformer Engine.
    Under torchrun Megatron Core's side is spread over all processes; the result is rank 0's, None elsewhere. Raises
    UnsupportedError where one of the two cannot run the model on this device, DeviceError where the device is missing.
    """
    spread = spread or Spread()
    models = (first, second)
    megatron = any(isinstance(model, MegatronModel) for model in models)
    with contextlib.ExitStack() as opened:
        with contextlib.ExitStack() as stack:
            if megatron:
                stack.enter_context(megatron_on(spread.device, tp=spread.tp, pp=spread.pp, ep=spread.ep))
            traces = []
            for model in models:
                traces.append(model.trace(read.batches, vocab, spread))
                opened.callback(traces[-1].close)
            found = compare_traces(traces[0], traces[1], vocab, tolerance)
        if found is None:
            return None
        diff, borders = found
        for model, trace in zip(models, traces, strict=True):
            if isinstance(model, TransformersModel):
                diff = with_far_limit(diff, model, trace, read, vocab, spread.device)
                diff = with_bf16_noise(diff, model, trace, read, vocab, spread.device)
                break
    where = f"{read.origin}; {spread.dtype} on {spread.device}"
    if megatron:
        where += f", {'Transformer Engine' if spread.device == 'cuda' else 'local'} spec"
        sizes = [f"{name} {size}" for name, size in (("tp", spread.tp), ("pp", spread.pp), ("ep", spread.ep))]
        where += "".join(f", {text}" for text in sizes if not text.endswith(" 1"))
    where += "".join(dict.fromkeys(model.note for model in models if isinstance(model, TransformersModel)))
    lent = tuple(line for model in models if isinstance(model, MegatronModel) for line in model.lent)
    return Forward((first.title, second.title), diff, borders, where, tuple(dict.fromkeys(lent)))


def vocab_size(config: Mapping[str, Value]) -> int:
    """The true vocabulary size of a Megatron Core config; UsageError where it has none."""
    vocab = config.get("model.vocab_size")
    if not isinstance(vocab, int):
        raise UsageError(f"model.vocab_size is {vocab!r}; forward parity needs a number")
    return vocab


def _nothing(first: int, last: int) -> torch.Tensor:
    """Logits where rank 0 has them."""
    import torch

    return torch.empty(0, last - first)
