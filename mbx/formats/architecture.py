"""Which model a Megatron checkpoint is of: from its hf/ folder, else from run_config.yaml, else from its args."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from converters.errors import MbxError, StorageError, UsageError
from converters.mcore.bridge_config import config_of_run_config
from converters.mcore.flavours import flavoured
from converters.mcore.megatron_args import config_of_args
from converters.mcore.named import NAME_A_FOLDER
from converters.rows.config_spelling import DIFFUSERS_CLASS, model_type_of, text_key
from converters.rows.expr import Value
from converters.rows.table import Table
from mbx.formats import hf
from mbx.formats.beside import config_beside, reference_files, token_ids, tokenizer_beside, tokenizer_files
from mbx.formats.fitting import fitting, unequal_fields
from mbx.tables import table_for

if TYPE_CHECKING:
    from mbx.formats.checkpoint import Checkpoint

_TORCH_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


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
    """A Hugging Face config, the table that reads it, and the folder it lies in, None where it was put together.

    `side_files` are what belongs beside the weights, by name: those of `reference`, or the checkpoint's own tokenizer.
    """

    config: Mapping[str, Value]
    table: Table
    reference: Path | None
    notes: tuple[str, ...] = ()
    side_files: Mapping[str, Path] = field(default_factory=dict)


def table_of(opened: Checkpoint, config: Mapping[str, Value], mapping: str | None = None) -> Table:
    """The table for the config of a checkpoint, its waived keys being known; UnsupportedError where there is none.

    Keys that no conversion waived are left to whoever reads the config.
    """
    table = table_for(config, mapping)
    if table.config.unknown_keys(config):
        return replace(table, config=table.config.waiving(opened.waived_keys))
    return table


def architecture_of(opened: Checkpoint, mapping: str | None = None, reference: Path | None = None) -> Architecture:
    """The architecture of a checkpoint: `reference` or its hf/ folder, else what Megatron's own sidecars say.

    Where these say nothing, a config.json in a place where its trainer keeps one. Raises StorageError where nothing
    says it, UnsupportedError where no table fits. A disagreement between config.json and the sidecars is a note.
    """
    folder = reference or opened.hf
    if folder is not None and (reference is not None or (folder / hf.CONFIG).is_file()):
        return _by_config(opened, folder, mapping)
    known, origin = stated_config(opened)
    if not known:
        if (found := config_beside(opened)) is not None:
            note = f"config.json is that of `{found}`"
            return _by_config(opened, found, mapping, note, whole=False)
        raise StorageError(
            f"`{opened.iteration}` says nothing of its architecture: it has neither hf/, run_config.yaml nor args"
            + _model_dir(opened),
            hint="name a folder with config.json and the tokenizer: ‹hf-config› DIR",
        )
    _check_agreement(opened)
    held, corrected = _as_held(known, opened, origin)
    fit = fitting(held, opened, mapping)
    tokenizer = tokenizer_beside(opened)
    files = {} if tokenizer is None else tokenizer_files(tokenizer)
    config = fit.config if tokenizer is None else _with_ids(fit.config, token_ids(tokenizer))
    there = "there is no tokenizer to copy" if tokenizer is None else f"the tokenizer is that of `{tokenizer}`"
    note = f"config.json was made from {origin} with the table `{fit.table.name}`; {there}"
    return Architecture(config, fit.table, None, (note, *corrected, *fit.notes), files)


def _with_ids(config: Mapping[str, Value], ids: Mapping[str, Value]) -> dict[str, Value]:
    """A config with what a tokenizer says of special tokens, of the text model too where that has one of its own."""
    out = {**ids, **config}
    if isinstance(inner := out.get(text_key(out)), Mapping):
        out[text_key(out)] = {**ids, **inner}
    return out


def _by_config(
    opened: Checkpoint,
    folder: Path,
    mapping: str | None,
    *notes: str,
    whole: bool = True,
) -> Architecture:
    """The architecture by a folder's config.json; its tokenizer, or the checkpoint's own where it has none."""
    config = hf.read_config(folder)
    files = reference_files(folder, whole=whole)
    if not any(map(hf.is_tokenizer_file, files)) and (tokenizer := tokenizer_beside(opened)) is not None:
        files = {**files, **tokenizer_files(tokenizer)}
    table = flavoured(table_of(opened, config, mapping), opened.tensors)
    fields = table.config.to_mcore(config)
    return Architecture(config, table, folder, (*notes, *_arrangement(table), *conflicts(fields, opened)), files)


def _arrangement(table: Table) -> tuple[str, ...]:
    """In words, whose arrangement of a model with towers a checkpoint has."""
    if not table.flavours:
        return ()
    held = f"arranged as {table.flavour} does" if table.flavour else "the text model alone; the rest is kept in hf/"
    return (f"flavour: {held}",)


def _model_dir(opened: Checkpoint) -> str:
    """Where the args say that the model's folder was, which is not here."""
    named = (opened.args or {}).get("model_dir")
    return f" that describe a model (they name `{named}`, which is not here)" if isinstance(named, str) else ""


def _check_agreement(opened: Checkpoint) -> None:
    """UsageError where run_config.yaml and args say different things of the model."""
    if not opened.run_config or not opened.args:
        return
    config, args = config_of_run_config(opened.run_config), config_of_args(opened.args)
    if wrong := unequal_fields(config, args):
        key = wrong[0]
        raise UsageError(
            f"`{key}` is {config[key]!r} by run_config.yaml and {args[key]!r} by the checkpoint's args",
            hint=NAME_A_FOLDER,
        )


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
    named = ", ".join(map(str, names)) if isinstance(names, list) and names else model_type_of(config)
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
    if opened.args and (config := config_of_args(opened.args)):
        return config, "the checkpoint's args"
    return {}, ""


def _as_held(
    known: Mapping[str, Value], opened: Checkpoint, origin: str
) -> tuple[Mapping[str, Value], tuple[str, ...]]:
    """`known` without a query rank that no weight has, and a note of it.

    Megatron-Bridge writes its provider's default rank for DeepSeek-V2-Lite and Moonlight, which have none.
    """
    rank = known.get("q_lora_rank")
    if not rank or any(part in name for name in opened.tensors for part in (".linear_q_down_proj.", ".q_a_proj.")):
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
        for k in unequal_fields(stated, other)
        if not (k == "mtp_num_layers" and not stated[k])  # what the checkpoint holds counts
    ]


def config_text(config: Mapping[str, Value], dtypes: Sequence[str]) -> bytes:
    """`config.json` of a config that no file holds; its dtype is that of most tensors, which diffusers never says."""
    common = Counter(dtypes).most_common(1)
    head = {key: config[key] for key in ("architectures", "model_type", DIFFUSERS_CLASS) if key in config}
    body = {key: value for key, value in sorted(config.items()) if key not in head}
    if common and common[0][0] in _TORCH_DTYPES and DIFFUSERS_CLASS not in config:
        body["torch_dtype"] = _TORCH_DTYPES[common[0][0]]
    return (json.dumps({**head, **body}, indent=2, ensure_ascii=False) + "\n").encode()
