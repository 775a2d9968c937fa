"""Megatron Core's rotary tables."""

from megatron.core.models.common.embeddings import RotaryEmbedding, YarnRotaryEmbedding


def forget_tables() -> None:
    """Empty the classes' caches of tables, which keep modules alive, and so process groups and their threads."""
    for table in (RotaryEmbedding, YarnRotaryEmbedding):
        table.forward.cache_clear()


__all__ = ["RotaryEmbedding", "forget_tables"]
