"""Opens adapters: a PEFT folder, or a Megatron checkpoint that holds nothing but adapters.

PEFT_DIR/{adapter_config.json, adapter_model.safetensors, …}
CKPT/iter_0000000/{__R_N.distcp, .metadata, …, peft/, hf/config.json}

`peft/` holds what a PEFT folder had beside its tensors, and their header, so that the way back gives the same files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from converters.adapters.megatron import MARKS, TOWER, read_megatron
from converters.adapters.peft_keys import Spelling, recorded_keys
from converters.adapters.peft_names import read_peft
from converters.adapters.respell import spelt
from converters.adapters.settings import LoraSettings, parse_settings
from converters.adapters.sites import Adapted
from converters.engine.lowrank import LowRank
from converters.errors import MbxError, StorageError, UnsupportedError
from converters.planning.exporter import HfTensor
from converters.rows.config_map import environment
from converters.rows.expr import Value
from converters.rows.table import Table
from converters.tensors import Shape, StoredTensor
from mbx.formats import hf
from mbx.formats.architecture import architecture_of, table_of
from mbx.formats.checkpoint import Checkpoint
from mbx.formats.peft import CONFIG, PICKLE, WEIGHTS
from mbx.formats.pipelines import PIPELINE
from mbx.formats.registry import Sniffed, find, instead, sniff
from mbx.tables import of_language
from mbx.untrusted.small_files import read_json

#: Folder of an adapter checkpoint for what lay beside PEFT's tensors.
BESIDE = "peft"
_ADAPTERS = f"an adapter is a folder with {CONFIG}, or a checkpoint with `….adapter.linear_in.weight`"
_ALWAYS: Mapping[str, Value] = {"peft_type": "LORA", "task_type": "CAUSAL_LM"}
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
    of B. `saved` are tensors that replace the base's, `rows` those that replace some rows of one, by their names in
    the table, `as_stored` the updates of weights that no linear's row carries (`PeftAdapter`); `spelling` is how the
    adapter itself begins names. `recorded` is the layout of the PEFT file, where one
    is known, `beside` the folder of what lay beside it.
    """

    path: Path
    root: Path
    tensors: Mapping[str, StoredTensor]
    settings: LoraSettings
    config: Mapping[str, Value]
    adapted: tuple[Adapted, ...]
    scales: Mapping[tuple[str, Shape], float]
    saved: Mapping[str, StoredTensor]
    rows: Mapping[str, tuple[StoredTensor, tuple[int, ...]]]
    spelling: Spelling
    recorded: tuple[hf.WeightFile, ...] | None
    beside: Path | None
    as_stored: Mapping[str, LowRank] = field(default_factory=dict)

    @property
    def notes(self) -> tuple[str, ...]:
        """How the adapter spells the base's names, where that is not the table's own way."""
        if not self.spelling.way:
            return ()
        return (f"the adapter's names of the decoder begin with `{self.spelling.name}`",)


def open_base(path: Path, mapping: str | None = None, allowed_keys: tuple[str, ...] = ()) -> Base:
    """The base model at `path`, a Hugging Face folder or a Megatron checkpoint; of its tensors nothing is read.

    `allowed_keys` are unknown ones of its config.json that the user waives.
    """
    found = find(path)
    if found is None and path.is_dir() and not any(path.glob("iter_*")) and not (path / PIPELINE).is_file():
        raise StorageError(f"`{path}` is no model: neither a Hugging Face folder nor a Megatron checkpoint")
    found = found or sniff(path)
    if found.format.spelling == "peft":
        raise StorageError(f"`{path}` is an adapter; the model that it adapts was expected", hint=instead(found))
    if found.format.spelling == "hf":
        config = hf.read_config(found.home)
        folder = Checkpoint(path, found.format.name, "hf", found.home, {}, config, allowed_keys=allowed_keys)
        table = of_language(table_of(folder, config, mapping))
        return Base(path, config, table, table.config.to_mcore(config), found.home / hf.CONFIG)
    model = architecture_of(found.open().allowing(allowed_keys), mapping)
    fields = of_language(model.table).config.to_mcore(model.config)
    file = None if model.reference is None else model.reference / hf.CONFIG
    return Base(path, model.config, model.table, fields, file)


def is_adapter(path: str | Path) -> bool:
    """Whether a folder holds adapters and nothing else, PEFT's or a checkpoint's; False where it cannot be told."""
    try:
        found = sniff(Path(path))
        opened = found.open()
    except MbxError:
        return False
    if opened.spelling == "peft":
        return True
    if opened.spelling != "mcore":
        return False
    owned = [name for name in opened.tensors if not name.startswith("optimizer")]
    base = [name for name in owned if not any(mark in name for mark in MARKS)]
    # layers of the vocabulary may be trained whole beside adapters
    vocabulary = ("embedding.word_embeddings.", "output_layer.") if _saves_whole(opened) else ()
    return len(base) < len(owned) and not any(
        name.startswith(("embedding.", "output_layer.")) and not name.startswith(vocabulary) for name in base
    )


def _saves_whole(opened: Checkpoint) -> bool:
    """Whether a checkpoint is of a run that trained layers whole beside its adapters."""
    path = opened.iteration / _RECIPE
    lora = read_json(path).get("lora") if path.is_file() else None
    return isinstance(lora, Mapping) and bool(lora.get("modules_to_save"))


def stated_base(path: Path) -> str | None:
    """Where the adapter at `path` says that its base lies: a folder or a hub model; None where it says nothing."""
    found = _sniffed(path)
    if found.format.spelling == "peft":
        name = read_json(found.home / CONFIG).get("base_model_name_or_path")
        return name if isinstance(name, str) and name else None
    if (found.home / "hf" / hf.CONFIG).is_file():
        return str(found.home / "hf")
    return None


def open_adapter(path: Path, base: Base, present: Collection[str] = ()) -> Adapter:
    """Open an adapter of either kind and match it with the base's table.

    `present` are the base's tensors where it is a Hugging Face folder that may be changed: modules beside the text
    model are told by them. Raises StorageError for a folder that is none, UnsupportedError for settings that are not
    honoured, CoverageError for tensors that adapt nothing in the base.
    """
    found = _sniffed(path)
    if found.format.spelling == "peft":
        return _open_peft(found, base, present)
    return _open_megatron(found.open(), base)


def _sniffed(path: Path) -> Sniffed:
    """What the adapter at `path` is stored as; StorageError, in words of adapters, for a model."""
    found = sniff(path)
    if found.format.spelling == "hf":
        factors = [name for name in (WEIGHTS, PICKLE) if (found.home / name).is_file()]
        if factors and not (found.home / CONFIG).is_file():
            raise StorageError(
                f"`{path}` has `{factors[0]}` and no `{CONFIG}`, in which rank, alpha and targets stand",
                hint=f"copy `{CONFIG}` from where the adapter was saved: without it the factors have no scale",
            )
        beside = (found.home / CONFIG).is_file()
        raise StorageError(
            f"`{path}` is a Hugging Face model, no adapter",
            hint="an adapter lies beside its weights: give it a folder of its own" if beside else _ADAPTERS,
        )
    return found


def _open_peft(found: Sniffed, base: Base, present: Collection[str]) -> Adapter:
    config = read_json(found.home / CONFIG)
    settings = parse_settings(config)
    opened = found.open()
    adapter = read_peft(base.table, environment(base.fields), opened.tensors, settings, present)
    layout = hf.recorded_layout(opened.home)
    recorded = None if layout is None else tuple(file for file in layout if file.name == WEIGHTS) or None
    if recorded is None:  # of a pickle: as it would be in safetensors, in the order of its tensors
        made = {name: HfTensor(tensor.dtype, tensor.shape) for name, tensor in opened.tensors.items()}
        recorded = (hf.WeightFile(WEIGHTS, None, made),)
    return Adapter(
        found.path,
        opened.home,
        opened.tensors,
        settings,
        config,
        adapter.adapted,
        adapter.scales,
        adapter.saved,
        adapter.rows,
        adapter.spelling,
        recorded,
        opened.home,
        adapter.as_stored,
    )


def _open_megatron(opened: Checkpoint, base: Base) -> Adapter:
    path = opened.path
    tensors = {
        name: tensor
        for name, tensor in opened.tensors.items()
        if any(mark in name for mark in MARKS) and not name.startswith(TOWER)
    }
    if not tensors:
        raise StorageError(f"`{path}` holds no adapter", hint=_ADAPTERS)
    adapted = read_megatron(base.table, base.fields, environment(base.fields), tensors)
    beside = opened.iteration / BESIDE
    known = (beside / CONFIG).is_file()
    config, recorded = (read_json(beside / CONFIG), hf.recorded_layout(beside)) if known else (stated(opened), None)
    settings = parse_settings(config)
    names = None if recorded is None else {name for file in recorded for name in file.tensors}
    spelling, keys = Spelling({}), None
    if names is not None:
        spelling, keys = recorded_keys(base.table, environment(base.fields), names)
    scales: dict[tuple[str, Shape], float] = {}
    for found in adapted:
        row = spelt(base.table, found, keys)
        for site in found.sites:
            modules = tuple(map(spelling.said, found.modules_of(row, site)))
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
        {},
        spelling,
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
        if (opened.iteration / _STATE).is_file():
            base = read_json(opened.iteration / _STATE).get("base")
        return trained(lora, base)
    else:
        raise StorageError(
            f"`{opened.iteration}` does not say the adapter's alpha",
            hint=f"put PEFT's {CONFIG} into {opened.iteration / BESIDE}/, with r and lora_alpha",
        )
    return {**_ALWAYS, "base_model_name_or_path": base, "bias": "none", **said}


def trained(lora: Mapping[str, Value], base: Value) -> dict[str, Value]:
    """adapter_config.json's keys by the `lora` section of a recipe; `base` is where the run's base lies."""
    said: dict[str, Value] = {"r": lora.get("rank"), "lora_alpha": lora.get("alpha")}
    said |= {"lora_dropout": lora.get("dropout", 0.0), "use_rslora": lora.get("rslora", False)}
    if isinstance(whole := lora.get("modules_to_save"), list | tuple) and whole:
        said |= {"modules_to_save": list(whole)}
    said |= {key: lora.get(key) or {} for key in ("rank_pattern", "alpha_pattern")}
    return {**_ALWAYS, "base_model_name_or_path": base, "bias": "none", **said}


def common_rank(adapted: tuple[Adapted, ...]) -> int:
    """The rank that most adapters have."""
    return Counter(site.rank for found in adapted for site in found.sites).most_common(1)[0][0]
