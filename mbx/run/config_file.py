"""The config.json of an exported folder: the source's, to the byte where nothing of it changes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from converters.engine.plan import Plan
from converters.rows.config_spelling import DIFFUSERS_CLASS, text_key
from converters.rows.expr import Value
from mbx.formats import hf
from mbx.formats.architecture import Architecture, config_text
from mbx.run.export_codec import SAME
from mbx.untrusted.small_files import SETTINGS, read_small


def put_config(
    found: Architecture,
    plan: Plan,
    dtype: str | None,
    codec: str,
    quantization: Mapping[str, Value] | None,
    sides: dict[str, Path],
    texts: dict[str, bytes],
) -> None:
    """Put the target's config.json among the copied files, or among the made ones where it changes."""
    if found.reference is None:
        made = config_text(found.config, [draft.dtype for draft in plan.drafts])
        texts[hf.CONFIG] = edited_config(made, None, codec, quantization=quantization)
        return
    original = read_small(found.reference / hf.CONFIG, SETTINGS)
    edited = edited_config(original, dtype, codec, quantization=quantization)
    if edited != original:
        texts[hf.CONFIG] = edited
        sides.pop(hf.CONFIG, None)


_DTYPE_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def edited_config(
    config: bytes,
    dtype: str | None,
    codec: str,
    settings: Mapping[str, Value] | None = None,
    quantization: Mapping[str, Value] | None = None,
) -> bytes:
    """`config.json` for tensors stored by `codec`, cast to `dtype` if one is asked for; nothing else changes.

    `settings` are keys of the model that get other values, in the config of a text model inside a larger one too.
    `quantization` is what it says of a codec that the source had not.
    """
    loaded = json.loads(config)
    before = json.loads(config)
    text = loaded.get(text_key(loaded))
    for key, value in (settings or {}).items():
        inside = isinstance(text, dict) and (key in text or key not in loaded)
        if inside:
            text[key] = value
        if not inside or key in loaded or key == "tie_word_embeddings":
            loaded[key] = value
    for said in (loaded, text) if codec != SAME else ():
        if isinstance(said, dict) and said.get("quantization_config") is not None:
            del said["quantization_config"]
    if quantization is not None:
        loaded["quantization_config"] = quantization
    if dtype is not None and DIFFUSERS_CLASS not in loaded:
        loaded["dtype" if "dtype" in loaded else "torch_dtype"] = _DTYPE_NAMES[dtype]
    if loaded == before:
        return config
    return (json.dumps(loaded, indent=2, ensure_ascii=False) + "\n").encode()
