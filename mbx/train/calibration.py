"""What flows into a model's products, measured on a file of training data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from converters.codecs.calibration import Calibration
from converters.codecs.fresh import FRESH
from converters.errors import UsageError
from mbx.formats.architecture import table_of
from mbx.formats.registry import open_checkpoint
from mbx.run.calibration_file import calibration_bytes
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
    progress: Callable[[int], None] = lambda _: None,
) -> Calibration:
    """Measure the Hugging Face model in `source` on `samples` rows of `length` tokens of `data`, and write `target`.

    `data` is whatever a recipe's `data.path` takes: documents, chats, completions; examples follow each other in rows,
    as in pretraining. Fewer rows are measured where there is less data. For `codec` scales of channels are chosen too.
    Raises UsageError for a source of another kind, data of less than a row, or a codec that takes no such scales.
    """
    if codec is not None and not (codec in FRESH and FRESH[codec].scaled):
        able = ", ".join(name for name, fresh in FRESH.items() if fresh.scaled)
        raise UsageError(f"‹codec› {codec!r} takes no scales of channels", hint=f"these do: {able}")
    opened = open_checkpoint(source)
    if opened.spelling != "hf":
        raise UsageError(
            f"`{source}` is no Hugging Face folder: inputs are measured in Transformers",
            hint=f"mbx convert mcore-to-hf {source} DIR",
        )
    table = table_of(opened, opened.config, mapping)
    fields = table.config.to_mcore(opened.config)
    ids = token_rows(source, data, samples, length)
    from mbx.models.transformers.calibration import measure_inputs

    found = measure_inputs(source, table, fields, ids, codec=codec, device=device, dtype=dtype, progress=progress)
    measured = {
        **found.measured,
        "source": source.name,
        "data": Path(data).name,
        "rows": len(ids),
        "tokens": ids.numel(),
    }
    found = replace(found, measured=measured)
    if target is not None:
        target.write_bytes(calibration_bytes(found))
    return found
