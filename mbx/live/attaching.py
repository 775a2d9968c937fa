"""Attaching to a running model: what every rank holds of it is told to all, once."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from torch import nn

from converters.errors import MbxError
from converters.rows.expr import Value
from mbx.live.exchange import exchange
from mbx.live.model import Live
from mbx.live.shards import Model
from mbx.live.source import Source, source_of


def attach(
    chunks: nn.Module | Sequence[nn.Module],
    source: str | Path | Mapping[str, Value],
    *,
    mapping: str | None = None,
    allowed_keys: Collection[str] = (),
) -> Live:
    """Attach to a running model: `chunks` as Megatron Core trains them, `source` the Hugging Face model that it is.

    `source` is a folder or hub name, whose tensors tell dtypes and spelling, or a config alone. `mapping` is a table
    of your own, `allowed_keys` are unknown keys of config.json that are waived. Collective: one exchange of objects,
    in which no tensor moves. Raises CoverageError for parameters that no row has or that are not there, and where
    ranks hold an element twice; UsageError for an offloaded model.
    """
    found: Source | None = None
    model: Model | None = None
    try:
        found = source_of(source, mapping, allowed_keys)
        model = Model([chunks] if isinstance(chunks, nn.Module) else list(chunks))
        told: Sequence | MbxError = model.base  # type: ignore[type-arg]
    except MbxError as error:
        told = error
    said = None if found is None else (found.table.digest, found.config, found.recorded)
    world = exchange(told, said, adapted=model is not None and bool(model.adapters))
    assert found is not None and model is not None
    return Live(model, found, world)
