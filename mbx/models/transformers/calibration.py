"""What is measured of a model for a codec: Transformers' own layers, one in memory at a time.

This file imports torch when it is imported.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from converters.codecs.calibration import Calibration
from converters.codecs.fresh import FRESH
from converters.errors import UnsupportedError
from converters.planning.fresh import is_product
from converters.rows.config_map import environment
from converters.rows.expr import Env
from converters.rows.table import Table
from mbx.formats.checkpoint import Checkpoint
from mbx.models.prompts import check_ids
from mbx.models.transformers.channel_scales import ChannelScales
from mbx.models.transformers.inputs import Inputs
from mbx.models.transformers.shallow import PartialTransformers
from mbx.models.transformers.streamed import Flow, rows_by_layer

#: Tokens of a product's inputs on which scales are chosen.
_SAMPLES = 256


def measure_inputs(
    folder: Path,
    table: Table,
    fields: Env,
    ids: torch.Tensor,
    *,
    codec: str | None = None,
    megatron: Checkpoint | None = None,
    mapping: str | None = None,
    rows_at_once: int = 8,
    device: str = "cpu",
    dtype: str = "float32",
    progress: Callable[[int], None] = lambda _: None,
) -> Calibration:
    """What flows into the products of the Hugging Face model in `folder`, of a `table` and Megatron Core `fields`.

    `megatron` is a Megatron checkpoint with the weights, where `folder` has config.json alone; `mapping` is a table
    for that. ids: [rows, tokens], of which `rows_at_once` go through a layer together. An expert that no token was
    sent to has the largest of what the layer's others have. For `codec` scales of channels are chosen too. `progress`
    is called with the number of layers that are done. Raises what `PartialTransformers` raises, UsageError for ids
    outside the vocabulary, and UnsupportedError where a module that a row names is not where the class has it, or
    where no channel of the model can be scaled.
    """
    parts = PartialTransformers(folder, getattr(torch, dtype), megatron=megatron, mapping=mapping)
    parts.config._experts_implementation = "eager"  # the one whose products are called expert by expert
    try:
        check_ids(ids, parts.vocab_size)
        rows = rows_by_layer(table, environment(fields), parts.weights.tensors)
        inputs = Inputs(samples=0 if codec is None else -(-_SAMPLES * rows_at_once // len(ids)))
        scales = None if codec is None else ChannelScales(FRESH[codec], environment(fields), parts.weights.tensors)
        with torch.no_grad():
            flow = Flow.of(parts, torch.split(ids, rows_at_once), device)
            for number, layer in flow.layers():
                own = rows.get(number, ())
                products = [row for row in own if is_product(row.mcore)]
                first = flow.states[0].to(device)
                with inputs.watching(layer, products):
                    for _ in flow.through(layer, number):
                        pass
                if scales is not None:
                    scales.choose(layer, number, own, inputs, partial(flow.output, layer, number, 0, first))
                    inputs.kept.clear()
                inputs.fill(products)
                progress(1)
    finally:
        parts.close()
    found = inputs.found()
    if codec is None or scales is None:
        return found
    if not scales.held and not scales.refused:
        raise UnsupportedError(
            f"no channel of `{table.name}` can be scaled for {codec}: no matrix behind a norm or product has a shape "
            "that the codec holds"
        )
    if not scales.held:
        raise UnsupportedError(
            f"no channel of `{table.name}` can be scaled for {codec}: in no layer does one norm or product make what "
            "matrices that take the codec have for inputs",
            details=scales.explained(),
        )
    return replace(found, scales=scales.found, codec=codec, measured={"unscaled": scales.explained()})
