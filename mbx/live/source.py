"""The Hugging Face model that a live model is: a folder, whose headers are read, a hub name, or a config alone."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from converters.codecs import quantization_of
from converters.codecs.decode import decoded_view
from converters.errors import UsageError
from converters.planning.exporter import HfTensor
from converters.rows.expr import Value
from converters.rows.table import Table
from mbx.formats import hf
from mbx.formats.hub import resolve
from mbx.formats.registry import open_hf
from mbx.tables import of_language, table_for


@dataclass(frozen=True, slots=True)
class Source:
    """A Hugging Face model as attached to: its table and config, and the folder that these are of, if there is one.

    `recorded` are the folder's tensors, decoded; None where it has none.
    """

    folder: Path | None
    table: Table
    config: Mapping[str, Value]
    fields: Mapping[str, Value]
    recorded: Mapping[str, HfTensor] | None


def source_of(
    source: str | Path | Mapping[str, Value], mapping: str | None = None, allowed_keys: Collection[str] = ()
) -> Source:
    """Open what a model is attached to; no tensor is read."""
    if isinstance(source, Mapping):
        return _of(None, source, None, mapping, allowed_keys)
    if not isinstance(source, str | Path):
        raise UsageError(f"a folder, a hub name or a config was expected, got {type(source).__name__}")
    folder = resolve(str(source), weights=False).path
    if not hf.has_weights(folder):
        return _of(folder, hf.read_config(folder), None, mapping, allowed_keys)
    opened = open_hf(folder)
    plain, _ = decoded_view(opened.tensors, quantization_of(opened.config))
    recorded = {name: HfTensor(tensor.dtype, tensor.shape) for name, tensor in plain.items()}
    return _of(folder, opened.config, recorded, mapping, allowed_keys)


def _of(
    folder: Path | None,
    config: Mapping[str, Value],
    recorded: Mapping[str, HfTensor] | None,
    mapping: str | None,
    allowed_keys: Collection[str],
) -> Source:
    table = of_language(table_for(config, mapping))
    table = replace(table, config=table.config.waiving(allowed_keys))
    return Source(folder, table, config, table.config.to_mcore(config), recorded)
