"""Which model a Megatron checkpoint is of: from its hf/ folder, else from run_config.yaml, else from its args."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from converters.errors import CoverageError, LayoutError, MbxError, StorageError, UnsupportedError, UsageError
from converters.mcore.bridge_config import config_of_run_config
from converters.mcore.field_equality import alike
from converters.mcore.megatron_args import NEUTRAL, TRAINING, config_of_args
from converters.planning.exporter import plan_export
from converters.rows.expr import Value
from converters.rows.table import Table
from mappings import table_names
from mbx.formats import hf
from mbx.tables import shipped, table_for

if TYPE_CHECKING:
    from mbx.formats.checkpoint import Checkpoint

_TORCH_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
#: The table that is taken where several describe the model alike: the one most tools know.
_PREFERRED = ("llama", "qwen2", "qwen3", "mistral", "mixtral", "qwen3_moe", "deepseek_v3")


@dataclass(frozen=True, slots=True)
class Stated:
    """What a checkpoint says of its architecture: the Hugging Face config, and the same as Megatron Core fields.

    `why_not` says why there is nothing, None where there is.
    """

    config: Mapping[str, Value] | None = None
    table: Table | None = None
    fields: Mapping[str, Value] | None = None
    why_not: str | None = None


@dataclass(frozen=True, slots=True)
class Architecture:
    """A Hugging Face config, the table that reads it, and the folder it lies in, None where it was put together."""

    config: Mapping[str, Value]
    table: Table
    reference: Path | None
    notes: tuple[str, ...] = ()


def architecture_of(
    opened: Checkpoint,
    mapping: str | None = None,
    reference: Path | None = None,
    *,
    allow_unused_keys: tuple[str, ...] = (),
) -> Architecture:
    """The architecture of a checkpoint: `reference` or its hf/ folder, else what Megatron's own sidecars say.

    Raises StorageError where nothing says it, UnsupportedError where no table fits. A disagreement between hf/
    and the args is a note.
    """
    folder = reference or opened.hf
    if folder is not None and (reference is not None or (folder / hf.CONFIG).is_file()):
        config = hf.read_config(folder)
        table = table_for(config, mapping)
        fields = table.config.to_mcore(config, allow_unused=allow_unused_keys)
        return Architecture(config, table, folder, tuple(conflicts(fields, opened)))
    known, origin = stated_config(opened)
    if not known:
        raise StorageError(
            f"`{opened.iteration}` says nothing of its architecture: it has neither hf/, run_config.yaml nor args",
            hint="name a folder with config.json and the tokenizer: ‹hf-config› DIR",
        )
    held, corrected = _as_held(known, opened, origin)
    table, config = _fitting(held, opened, mapping)
    note = f"config.json was made from {origin} with the table `{table.name}`; there is no tokenizer to copy"
    return Architecture(config, table, None, (note, *corrected))


def architecture_name(opened: Checkpoint) -> str | None:
    """What a checkpoint calls its architecture; None where nothing says it. StorageError for a damaged config.json."""
    if opened.spelling == "peft":
        return None
    if (config := hf.config_file(opened)) is not None:
        return _named(config)
    try:
        return _named(architecture_of(opened).config)
    except MbxError:
        return None


def _named(config: Mapping[str, Value]) -> str | None:
    names = config.get("architectures")
    named = ", ".join(map(str, names)) if isinstance(names, list) and names else config.get("model_type")
    return None if named is None else str(named)


def stated(opened: Checkpoint, mapping: str | None = None) -> Stated:
    """The architecture of a checkpoint of either kind; never raises for one that is not known."""
    try:
        found = architecture_of(opened, mapping)
        return Stated(found.config, found.table, found.table.config.to_mcore(found.config))
    except MbxError as error:
        return Stated(opened.config, why_not=error.fact)


def stated_config(opened: Checkpoint) -> tuple[dict[str, Value], str]:
    """What Megatron's own sidecars say of the model, as a flat config, and which of them; empty where none does."""
    if opened.run_config and (config := config_of_run_config(opened.run_config)):
        return config, "run_config.yaml"
    if opened.args:
        return config_of_args(opened.args), "the checkpoint's args"
    return {}, ""


def _as_held(
    known: Mapping[str, Value], opened: Checkpoint, origin: str
) -> tuple[Mapping[str, Value], tuple[str, ...]]:
    """`known` without a query rank that no weight has, and a note of it.

    Megatron-Bridge writes its provider's default rank for DeepSeek-V2-Lite and Moonlight, which have none.
    """
    rank = known.get("q_lora_rank")
    if not rank or any(".linear_q_down_proj." in name for name in opened.tensors):
        return known, ()
    note = f"`q_lora_rank` is {rank!r} by {origin}, and no tensor is of that rank; the weights count"
    return {**known, "q_lora_rank": None}, (note,)


def known_config(opened: Checkpoint, mapping: str | None = None) -> tuple[dict[str, Value], tuple[str, ...]]:
    """The flat config of a checkpoint as far as anything says it, for a change of layout; and notes."""
    if (config := hf.config_file(opened)) is not None:
        try:
            stated = table_for(config, mapping).config.to_mcore(config, allow_unused=tuple(config))
        except MbxError as error:
            return stated_config(opened)[0], (f"hf/config.json is not used: {error.fact}",)
        return stated, tuple(conflicts(stated, opened))
    return stated_config(opened)[0], ()


def conflicts(stated: Mapping[str, Value], opened: Checkpoint) -> list[str]:
    """Fields in which the config of hf/ and Megatron's own sidecars differ; hf/ wins."""
    other, origin = stated_config(opened)
    return [
        f"`{k}` is {stated[k]!r} by config.json and {other[k]!r} by {origin}; config.json counts"
        for k in _unequal(stated, other)
    ]


def _unequal(left: Mapping[str, Value], right: Mapping[str, Value]) -> list[str]:
    shared = (set(left) & set(right)) - TRAINING
    return sorted(key for key in shared if not alike(key, left, right))


def _fitting(known: Mapping[str, Value], opened: Checkpoint, mapping: str | None) -> tuple[Table, dict[str, Value]]:
    """The table (and the config.json it makes) that says the same as `known` and covers every tensor."""
    names = [mapping] if mapping is not None else table_names()
    fits: list[tuple[Table, dict[str, Value]]] = []
    reasons = []
    for name in names:
        table = table_for({}, mapping) if mapping is not None else shipped(name)
        try:
            fits.append((table, _try(table, known, opened)))
        except (CoverageError, UsageError, UnsupportedError, LayoutError) as error:
            reasons.append((table.name, error))
    if not fits:
        if mapping is not None:
            raise UnsupportedError(
                f"the table `{mapping}` does not describe this checkpoint: {reasons[0][1].fact}",
                hint="the sidecar may leave it out: name a folder with the model's config.json: ‹hf-config› DIR",
                details=reasons[0][1].details,
            )
        raise UnsupportedError(
            "no shipped table describes this checkpoint",
            hint="name a folder with the model's config.json: ‹hf-config› DIR (the sidecar may leave out what a table "
            "needs, as Megatron-Bridge's does YaRN); or a table, to see why it does not: ‹mapping› TABLE",
            details=[f"{name}: {error.fact}" for name, error in reasons],
        )
    if _norms_span_heads(opened, known):  # the preferred tables' models normalise each head for itself
        fits = [fit for fit in fits if fit[0].name not in _PREFERRED] or fits
    chosen = next((fit for wish in _PREFERRED for fit in fits if fit[0].name == wish), None)
    if chosen is None and len(fits) > 1:
        raise UsageError(
            f"{len(fits)} tables describe this checkpoint alike: {', '.join(table.name for table, _ in fits)}",
            hint=f"choose one: ‹mapping› {fits[0][0].name}",
        )
    return chosen or fits[0]


def _norms_span_heads(opened: Checkpoint, known: Mapping[str, Value]) -> bool:
    """Whether query norms are as wide as all heads together."""
    widths = {t.shape[-1] for name, t in opened.tensors.items() if name.endswith("self_attention.q_layernorm.weight")}
    return bool(widths - {known.get("kv_channels")})


def _try(table: Table, known: Mapping[str, Value], opened: Checkpoint) -> dict[str, Value]:
    """The config.json that `table` makes of `known`; raises where it loses something, or tensors are left."""
    stated = {key: value for key, value in known.items() if key not in TRAINING}
    made = table.config.to_hf(stated)
    for row in table.config.rows:
        if row.mcore in TRAINING and (value := known.get(row.mcore)) is not None:
            made[row.hf] = value
    config: dict[str, Value] = {key: _without_none(value) for key, value in made.items() if value is not None}
    config["model_type"] = table.model_types[0]
    if table.architectures:
        config["architectures"] = [table.architectures[0]]
    back = table.config.to_mcore(config)
    if wrong := _unequal(back, known):
        key = wrong[0]
        raise UsageError(f"`{key}` is {known[key]!r}; the table `{table.name}` makes it {back[key]!r}")
    for key, value in known.items():
        if key in back or key in TRAINING or not value or value in NEUTRAL.get(key, ()):
            continue
        raise UsageError(f"`{key}` is {value!r}, of which the table `{table.name}` knows nothing")
    plan_export(table, back, opened.tensors)
    return config


def _without_none(value: Value) -> Value:
    """A nested object without the keys that nothing says."""
    return {k: v for k, v in value.items() if v is not None} if isinstance(value, Mapping) else value


def config_text(config: Mapping[str, Value], dtypes: Sequence[str]) -> bytes:
    """`config.json` of a config that no file holds; its dtype is that of most tensors."""
    common = Counter(dtypes).most_common(1)
    head = {key: config[key] for key in ("architectures", "model_type") if key in config}
    body = {key: value for key, value in sorted(config.items()) if key not in head}
    if common and common[0][0] in _TORCH_DTYPES:
        body["torch_dtype"] = _TORCH_DTYPES[common[0][0]]
    return (json.dumps({**head, **body}, indent=2, ensure_ascii=False) + "\n").encode()
