"""The importance of a model's parts, measured on a file of training data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from converters.errors import UsageError
from converters.pruning.choosing import Importance
from mbx.formats.architecture import table_of
from mbx.formats.registry import open_checkpoint
from mbx.run.importance_file import importance_text
from mbx.tables import of_language
from mbx.train.data.token_rows import token_rows


def importance_of(
    source: Path,
    data: str,
    target: Path | None = None,
    *,
    samples: int = 64,
    length: int = 512,
    device: str = "cpu",
    dtype: str = "float32",
    mapping: str | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> Importance:
    """Measure the Hugging Face model in `source` on `samples` rows of `length` tokens of `data`, and write `target`.

    `data` is whatever a recipe's `data.path` takes: documents, chats, completions; examples follow each other in rows,
    as in pretraining. Fewer rows are measured where there is less data. Raises UsageError for a source of another
    kind, or data of less than a row.
    """
    opened = open_checkpoint(source)
    if opened.spelling != "hf":
        raise UsageError(
            f"`{source}` is no Hugging Face folder: importance is measured in Transformers",
            hint=f"mbx convert mcore-to-hf {source} DIR",
        )
    table = of_language(table_of(opened, opened.config, mapping))
    fields = table.config.to_mcore(opened.config)
    ids = token_rows(source, data, samples, length)
    from mbx.models.transformers.importance import measure_importance

    found = measure_importance(source, table, fields, ids, device=device, dtype=dtype, progress=progress)
    if target is not None:
        measured = {"source": source.name, "data": Path(data).name, "rows": len(ids), "tokens": ids.numel()}
        target.write_bytes(importance_text(found, measured))
    return found
