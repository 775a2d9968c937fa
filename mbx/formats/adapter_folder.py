"""Opens adapters: a PEFT folder, or a Megatron checkpoint that holds nothing but adapters.

PEFT_DIR/{adapter_config.json, adapter_model.safetensors, …}
CKPT/iter_0000000/{__R_N.distcp, .metadata, …, peft/, hf/config.json}

`peft/` holds what a PEFT folder had beside its tensors, and their header, so that the way back gives the same files.
"""

from __future__ import annotations

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
from converters.tensors import Shape, StoredTensor
from mbx.formats import hf
from mbx.formats.architecture import architecture_of
from mbx.formats.checkpoint import Checkpoint
from mbx.formats.peft import CONFIG, WEIGHTS
from mbx.formats.registry import Sniffed, find, instead, sniff
from mbx.tables import table_for
from mbx.untrusted.small_files import read_json

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


def open_base(path: Path, mapping: str | None = None) -> Base:
    """The base model at `path`, a Hugging Face folder or a Megatron checkpoint; of its tensors nothing is read."""
    found = find(path)
    if found is None and path.is_dir() and not any(path.glob("iter_*")):
        raise StorageError(f"`{path}` is no model: neither a Hugging Face folder nor a Megatron checkpoint")
    found = found or sniff(path)
    if found.format.spelling == "peft":
        raise StorageError(f"`{path}` is an adapter; the model that it adapts was expected", hint=instead(found))
    if found.format.spelling == "hf":
        config = hf.read_config(found.home)
        table = table_for(config, mapping)
        return Base(path, config, table, table.config.to_mcore(config), found.home / hf.CONFIG)
    model = architecture_of(found.open(), mapping)
    fields = model.table.config.to_mcore(model.config)
    file = None if model.reference is None else model.reference / hf.CONFIG
    return Base(path, model.config, model.table, fields, file)


def stated_base(path: Path) -> str | None:
    """Where the adapter at `path` says that its base lies: a folder or a hub model; None where it says nothing."""
    found = _sniffed(path)
    if found.format.spelling == "peft":
        name = read_json(found.home / CONFIG).get("base_model_name_or_path")
        return name if isinstance(name, str) and name else None
    if (found.home / "hf" / hf.CONFIG).is_file():
        return str(found.home / "hf")
    return None


def open_adapter(path: Path, base: Base) -> Adapter:
    """Open an adapter of either kind and match it with the base's table.

    Raises StorageError for a folder that is none, UnsupportedError for settings that are not honoured, CoverageError
    for tensors that adapt nothing in the base.
    """
    found = _sniffed(path)
    if found.format.spelling == "peft":
        return _open_peft(found, base)
    return _open_megatron(found.open(), base)


def _sniffed(path: Path) -> Sniffed:
    """What the adapter at `path` is stored as; StorageError, in words of adapters, for a model."""
    found = sniff(path)
    if found.format.spelling == "hf":
        beside = (found.home / CONFIG).is_file()
        raise StorageError(
            f"`{path}` is a Hugging Face model, no adapter",
            hint="an adapter lies beside its weights: give it a folder of its own" if beside else _ADAPTERS,
        )
    return found


def _open_peft(found: Sniffed, base: Base) -> Adapter:
    config = read_json(found.home / CONFIG)
    settings = parse_settings(config)
    opened = found.open()
    adapter = read_peft(base.table, environment(base.fields), opened.tensors, settings)
    layout = hf.recorded_layout(opened.home)
    recorded = None if layout is None else tuple(file for file in layout if file.name == WEIGHTS)
    return Adapter(
        found.path,
        opened.home,
        opened.tensors,
        settings,
        config,
        adapter.adapted,
        adapter.scales,
        adapter.saved,
        recorded,
        opened.home,
    )


def _open_megatron(opened: Checkpoint, base: Base) -> Adapter:
    path = opened.path
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


def stated(opened: Checkpoint) -> dict[str, Value]:
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
