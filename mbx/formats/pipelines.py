"""Pipelines of diffusers: models in folders of their own, of which the transformers convert."""

from __future__ import annotations

from pathlib import Path

from converters.errors import StorageError

#: What makes a folder a pipeline: it names the models, and what joins them.
PIPELINE = "model_index.json"


def of_pipeline(path: Path) -> StorageError:
    """What to say of a pipeline of diffusers: which of its folders convert."""
    parts = [part for part in sorted(path.glob("transformer*")) if (part / "config.json").is_file()]
    names = ", ".join(f"`{part.name}`" for part in parts)
    if not parts:
        return StorageError(
            f"`{path}` is a pipeline of diffusers without a folder `transformer`",
            hint="diffusion transformers convert, and no other kind of model that pipelines have",
        )
    return StorageError(
        f"`{path}` is a pipeline of diffusers; its transformers convert, each to a checkpoint of its own: {names}",
        hint=f"name that: {parts[0]}" if len(parts) == 1 else f"name one, then the other: {parts[0]}",
    )
