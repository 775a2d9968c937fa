"""What flows into a model's products, measured on a file of training data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from converters.codecs.calibration import Calibration
from converters.codecs.fresh import FRESH
from converters.errors import UsageError
from mbx.formats.architecture import Architecture, architecture_of, table_of
from mbx.formats.checkpoint import Checkpoint
from mbx.formats.registry import open_checkpoint
from mbx.run.calibration_file import calibration_bytes
from mbx.tables import of_language
from mbx.train.data.token_rows import token_rows


def calibrate(
    source: Path,
    data: str,
    target: Path | None = None,
    *,
    codec: str | None = None,
    samples: int = 64,
    length: int = 512,
    device: str = "cpu",
    dtype: str = "float32",
    mapping: str | None = None,
    hf_config: Path | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> Calibration:
    """Measure the model in `source`, of either kind, on `samples` rows of `length` tokens of `data`; write `target`.

    `data` is whatever a recipe's `data.path` takes: documents, chats, completions; examples follow each other in rows,
    as in pretraining. Fewer rows are measured where there is less data. For `codec` scales of channels are chosen too.
    Raises UsageError for a checkpoint that no config.json lies beside (`hf_config` names a folder with one), data of
    less than a row, or a codec that takes no such scales.
    """
    if codec is not None and not (codec in FRESH and FRESH[codec].scaled):
        able = ", ".join(name for name, fresh in FRESH.items() if fresh.scaled)
        raise UsageError(f"‹codec› {codec!r} takes no scales of channels", hint=f"these do: {able}")
    opened = open_checkpoint(source)
    found = _described(opened, mapping, hf_config)
    folder = found.reference or source
    ids = token_rows(folder, data, samples, length)
    from mbx.models.transformers.calibration import measure_inputs

    measures = measure_inputs(
        folder,
        found.table,
        found.table.config.to_mcore(found.config),
        ids,
        codec=codec,
        megatron=None if opened.spelling == "hf" else replace(opened, config=found.config, hf=folder),
        mapping=mapping,
        device=device,
        dtype=dtype,
        progress=progress,
    )
    where = {"source": source.name, "data": Path(data).name, "rows": len(ids), "tokens": ids.numel()}
    measures = replace(measures, measured={**measures.measured, **where})
    if target is not None:
        target.write_bytes(calibration_bytes(measures))
    return measures


def _described(opened: Checkpoint, mapping: str | None, hf_config: Path | None) -> Architecture:
    """The architecture of a checkpoint, with the folder of its config.json and tokenizer."""
    if opened.spelling == "hf":
        return Architecture(opened.config, of_language(table_of(opened, opened.config, mapping)), opened.home)
    found = architecture_of(opened, mapping, hf_config)
    if found.reference is None:
        raise UsageError(
            f"`{opened.path}` carries no config.json and no tokenizer, by which Transformers would run it",
            hint="name a folder with both: ‹hf-config› DIR",
        )
    return found
