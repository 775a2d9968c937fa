"""Opens adapters: a PEFT folder, or a Megatron checkpoint that holds nothing but adapters.

PEFT_DIR/{adapter_config.json, adapter_model.safetensors, …}
CKPT/iter_0000000/{__R_N.distcp, .metadata, …, peft/, hf/config.json}

`peft/` holds what a PEFT folder had beside its tensors, and their header, so that the way back gives the same files.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from converters.adapters.megatron import MARKS, read_megatron
from converters.adapters.peft_names import read_peft
from converters.adapters.respell import spelt
from converters.adapters.settings import LoraSettings, parse_settings
from converters.adapters.sites import Adapted
from converters.errors import StorageError, UnsupportedError
from converters.rows.config_map import environment
from converters.rows.expr import Value
from converters.rows.table import Table
from converters.tensors import Chunk, Shape, StoredTensor
from mbx.formats import hf
from mbx.formats.architecture import architecture_of
from mbx.formats.checkpoint import McoreCheckpoint, open_any
from mbx.formats.kinds import PEFT_CONFIG, found_instead, kind_of
from mbx.formats.safetensors import read_header
from mbx.tables import table_for

CONFIG = PEFT_CONFIG
WEIGHTS = "adapter_model.safetensors"
#: Folder of an adapter checkpoint for what lay beside PEFT's tensors.
BESIDE = "peft"
_ADAPTERS = f"an adapter is a folder with {CONFIG}, or a checkpoint with `….adapter.linear_in.weight`"
_RECIPE, _STATE = "recipe.json", "mbx_train.json"


@dataclass(frozen=True, slots=True)
class Base:
    """The model that an adapter belongs to: its config.json and what follows from it."""

    path: Path
    config: Mapping[str, Value]
    table: Table
    fields: Mapping[str, Value]
    config_file: Path | None


@dataclass(frozen=True, slots=True)
class Adapter:
    """An opened adapter; chunks of `tensors` lie in files below `root`.

    `config` is what its adapter_config.json says, made up where there is none. `scales` are by the name and the entry
    of B. `saved` are tensors that replace the base's. `recorded` is the layout of the PEFT file, where one is known,
    `beside` the folder of what lay beside it.
    """

    path: Path
    root: Path
    tensors: Mapping[str, StoredTensor]
    settings: LoraSettings
    config: Mapping[str, Value]
    adapted: tuple[Adapted, ...]
    scales: Mapping[tuple[str, Shape], float]
    saved: Mapping[str, StoredTensor]
    recorded: tuple[hf.WeightFile, ...] | None
    beside: Path | None


def is_peft(path: Path) -> bool:
    """Whether a folder is PEFT's."""
    return (path / CONFIG).is_file()


def open_base(path: Path, mapping: str | None = None) -> Base:
    """The base model at `path`, a Hugging Face folder or a Megatron checkpoint; of its tensors nothing is read."""
    if (path / hf.CONFIG).is_file():
        config = hf.read_config(path)
        table = table_for(config, mapping)
        return Base(path, config, table, table.config.to_mcore(config), path / hf.CONFIG)
    if (kind := kind_of(path)) == "peft":
        raise StorageError(f"`{path}` is an adapter; the model that it adapts was expected", hint=found_instead(path))
    if kind is None and path.is_dir() and not any(path.glob("iter_*")):
        raise StorageError(f"`{path}` is no model: neither a Hugging Face folder nor a Megatron checkpoint")
    found = architecture_of(open_any(path), mapping)
    fields = found.table.config.to_mcore(found.config)
    file = None if found.reference is None else found.reference / hf.CONFIG
    return Base(path, found.config, found.table, fields, file)


def stated_base(path: Path) -> str | None:
    """Where the adapter at `path` says that its base lies: a folder or a hub model; None where it says nothing."""
    if is_peft(path):
        name = read_json(path / CONFIG).get("base_model_name_or_path")
        return name if isinstance(name, str) and name else None
    _require_megatron(path)
    iteration = open_any(path).iteration
    if (iteration / "hf" / hf.CONFIG).is_file():
        return str(iteration / "hf")
    return None


def open_adapter(path: Path, base: Base) -> Adapter:
    """Open an adapter of either kind and match it with the base's table.

    Raises StorageError for a folder that is none, UnsupportedError for settings that are not honoured, CoverageError
    for tensors that adapt nothing in the base.
    """
    return _open_peft(path, base) if is_peft(path) else _open_megatron(path, base)


def _open_peft(path: Path, base: Base) -> Adapter:
    config = read_json(path / CONFIG)
    settings = parse_settings(config)
    if not (path / WEIGHTS).is_file():
        old = (path / "adapter_model.bin").is_file()
        raise StorageError(
            f"`{path}` has no `{WEIGHTS}`",
            hint="load adapter_model.bin with PEFT and save it again: newer versions write safetensors"
            if old
            else None,
        )
    header = read_header(path / WEIGHTS)
    tensors = {
        name: StoredTensor(name, dtype, shape, (Chunk((0,) * len(shape), shape, WEIGHTS, header.data_start + start),))
        for name, (dtype, shape, start, _) in header.tensors.items()
    }
    found = read_peft(base.table, environment(base.fields), tensors, settings)
    layout = hf.recorded_layout(path)
    recorded = None if layout is None else tuple(file for file in layout if file.name == WEIGHTS)
    return Adapter(path, path, tensors, settings, config, found.adapted, found.scales, found.saved, recorded, path)


def _require_megatron(path: Path) -> None:
    """Refuse a folder that is neither PEFT's nor Megatron's, in words of adapters."""
    if kind_of(path) == "hf":
        raise StorageError(f"`{path}` is a Hugging Face model, no adapter", hint=_ADAPTERS)


def _open_megatron(path: Path, base: Base) -> Adapter:
    _require_megatron(path)
    opened = open_any(path)
    tensors = {name: tensor for name, tensor in opened.tensors.items() if any(mark in name for mark in MARKS)}
    if not tensors:
        raise StorageError(f"`{path}` holds no adapter", hint=_ADAPTERS)
    adapted = read_megatron(base.table, base.fields, environment(base.fields), tensors)
    beside = opened.iteration / BESIDE
    known = (beside / CONFIG).is_file()
    config, recorded = (read_json(beside / CONFIG), hf.recorded_layout(beside)) if known else (stated(opened), None)
    settings = parse_settings(config)
    names = None if recorded is None else {name for file in recorded for name in file.tensors}
    scales: dict[tuple[str, Shape], float] = {}
    for found in adapted:
        row = spelt(base.table, found, names)
        for site in found.sites:
            modules = found.modules_of(row, site)
            own = {settings.scale_of(name, site.rank) for name in modules}
            if len(own) != 1:
                raise UnsupportedError(f"`{site.b}`: {', '.join(modules)} are scaled differently and share a factor")
            scales[site.b, site.index] = own.pop()
    dora = any(site.m is not None for found in adapted for site in found.sites)
    return Adapter(
        path,
        opened.iteration,
        tensors,
        replace(settings, dora=dora),
        config,
        adapted,
        scales,
        {},
        recorded,
        beside if beside.is_dir() else None,
    )


def stated(opened: McoreCheckpoint) -> dict[str, Value]:
    """adapter_config.json's keys as Megatron-Bridge's run_config.yaml or a run of `mbx train` says them."""
    node = (opened.run_config or {}).get("peft")
    base: Value = None
    if isinstance(node, Mapping):
        said = {"r": node.get("dim"), "lora_alpha": node.get("alpha"), "lora_dropout": node.get("dropout", 0.0)}
    elif (opened.iteration / _RECIPE).is_file():
        lora = read_json(opened.iteration / _RECIPE).get("lora")
        assert isinstance(lora, Mapping)
        said = {"r": lora.get("rank"), "lora_alpha": lora.get("alpha"), "lora_dropout": lora.get("dropout", 0.0)}
        if (opened.iteration / _STATE).is_file():
            base = read_json(opened.iteration / _STATE).get("base")
    else:
        raise StorageError(
            f"`{opened.iteration}` does not say the adapter's alpha",
            hint=f"put PEFT's {CONFIG} into {opened.iteration / BESIDE}/, with r and lora_alpha",
        )
    return {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "bias": "none", **said}


def common_rank(adapted: tuple[Adapted, ...]) -> int:
    """The rank that most adapters have."""
    return Counter(site.rank for found in adapted for site in found.sites).most_common(1)[0][0]


def read_json(path: Path) -> dict[str, Value]:
    """A JSON object; StorageError where the file is none."""
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise StorageError(f"`{path}` cannot be read: {error}") from error
    if not isinstance(loaded, dict):
        raise StorageError(f"`{path}` is not a JSON object")
    return loaded
