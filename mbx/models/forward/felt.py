"""Whether the reference computes something else under another setting, of a mechanism that large values come to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from converters.rows.expr import Value
from mbx.models.forward.divergence import vocab_parts
from mbx.models.prompts import Passes
from mbx.models.trace import Trace

if TYPE_CHECKING:
    from mbx.models.forward.models import TransformersModel


def felt_settings(
    reference: TransformersModel, trace: Trace, read: Passes, vocab: int, device: str, settings: Mapping[str, Value]
) -> frozenset[str]:
    """The keys of `settings` with which the logits of the first batch are others than those of `trace`.

    `trace` is `reference`'s run of all passes; with each setting in turn it runs the first once more. Rank 0 alone
    calls this.
    """
    import torch

    from mbx.models.transformers.tracing import trace_transformers

    batch = read.batches[0]
    felt = set()
    for key, value in settings.items():
        reading = replace(reference.reading, settings={**reference.reading.settings, key: value})
        other = trace_transformers(reference.path, (batch,), device=device, reading=reading)
        try:
            for first, last in vocab_parts(trace.hidden, 0, vocab):
                plain = trace.head(first, last)[: batch.ids.numel()]
                if not torch.equal(plain, other.head(first, last)):
                    felt.add(key)
                    break
        finally:
            other.close()
    return frozenset(felt)
