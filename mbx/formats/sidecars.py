"""What lies beside the weights of a Megatron checkpoint and says what model it is."""

from __future__ import annotations

import os
import zlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from converters.engine.plan import Plan
from converters.errors import StorageError
from converters.mcore.bridge_config import run_config_of
from converters.mcore.flavours import USUAL
from converters.mcore.keys import EMBEDDING, bare, inner_prefix, parse_key
from converters.mcore.local import Spec
from converters.mcore.megatron_args import args_of, layout_args
from converters.mcore.releases import CURRENT
from converters.rows.expr import Value
from converters.rows.table import Table
from mbx.torchfile.archive import file_reader, load_archive, read_object
from mbx.torchfile.archive_layout import lay_out
from mbx.torchfile.dcp import StoredObject
from mbx.torchfile.torch_values import Namespace, TensorStub
from mbx.untrusted.small_files import open_regular
from mbx.untrusted.values import check_bounded

#: Megatron-LM's default of `--make-vocab-size-divisible-by`.
_MEGATRON_DIVISOR = 128
_COMMON_OBJECT = "common_state/shard_0_1"


def common_of(iteration: Path, objects: Mapping[str, StoredObject]) -> dict[str, object]:
    """The common state: `common.pt`, or the object that newer Megatron Core keeps among the tensors; may be empty.

    A Namespace becomes a dict of its attributes. Raises StorageError when it is damaged.
    """
    loaded: object = {}
    if (iteration / "common.pt").is_file():
        loaded, _ = load_archive(iteration / "common.pt", unknown="opaque")
    elif _COMMON_OBJECT in objects:
        loaded = read_stored(iteration, objects[_COMMON_OBJECT])
        if isinstance(loaded, list) and len(loaded) == 1:
            loaded = loaded[0]
    if not isinstance(loaded, dict):
        raise StorageError(f"`{iteration}`: the common state is a {type(loaded).__name__}; a dict was expected")
    common = {str(key): value.values if isinstance(value, Namespace) else value for key, value in loaded.items()}
    check_bounded(common, f"`{iteration}`: the common state")
    return common


def common_place(iteration: Path, objects: Mapping[str, StoredObject]) -> str | None:
    """The file that the common state lies in, empty where it lies among the tensors; None where there is none."""
    if (iteration / "common.pt").is_file():
        return "common.pt"
    return "" if _COMMON_OBJECT in objects else None


def read_stored(iteration: Path, stored: StoredObject) -> object:
    """An object that lies among the tensors; what has no plain form is opaque. StorageError when it is damaged."""
    file, start, length = stored
    fd = open_regular(iteration / file)
    try:
        return read_object(file_reader(fd, start), length, unknown="opaque", source=f"{iteration / file}")[0]
    finally:
        os.close(fd)


@dataclass(frozen=True, slots=True)
class Sidecars:
    """What a new Megatron checkpoint carries beside its weights.

    `iteration` numbers it, `args` are Megatron-LM's, `common` is the content of `common.pt`, `texts` are further
    files by path within the checkpoint. `spec` is the layer spec whose names a legacy file uses.
    """

    iteration: int
    args: Mapping[str, object]
    common: Mapping[str, object]
    texts: Mapping[str, bytes] = field(default_factory=dict)
    spec: Spec = "transformer_engine"

    @property
    def folder(self) -> str:
        """Name of the iteration's folder."""
        return f"iter_{self.iteration:07d}"


@dataclass(frozen=True, slots=True)
class Model:
    """What is known of the model beside a plan: the table, in the flavour that is written, and its config.json."""

    table: Table | None = None
    config: Mapping[str, Value] | None = None

    def is_bridges(self, *, towers: bool) -> bool:
        """Whether Megatron-Bridge has its parameters so; with `towers` by a config.json, of which it builds them."""
        flavour = "" if self.table is None else self.table.flavour
        return flavour == USUAL and self.config is not None if towers else flavour in ("", USUAL)


NO_MODEL = Model()


def megatron_sidecars(
    plan: Plan,
    format: str,
    iteration: int,
    *,
    origin: Mapping[str, object] | None = None,
    spec: Spec = "transformer_engine",
    tokenizer: str | None = None,
    optimizer: Mapping[str, object] | None = None,
    model: Model = NO_MODEL,
) -> Sidecars:
    """Sidecars of the checkpoint that `plan` makes of `model`.

    `origin` are the args of the checkpoint it came from, `tokenizer` a hub name or a folder; `optimizer` is the part
    of the common state that belongs to an optimizer whose state goes along. What Megatron-Bridge reads goes beside
    torch_dist and fsdp_dtensor weights only, the formats it takes.
    """
    rows = next((d.shape[0] for d in plan.drafts if bare(d.name) == EMBEDDING), None)
    config, layout = _with_heads(plan), plan.layout
    classes = () if model.table is None else model.table.architectures
    known = {} if origin is None else {key: value for key, value in origin.items() if is_plain(value)}
    written: dict[str, object] = {**known, **layout_args(layout), "padded_vocab_size": _stated_rows(rows, format)}
    if origin is None:
        written = args_of(config, layout, _stated_rows(rows, format), classes)
    written |= {"ckpt_format": format, "transformer_impl": spec, "iteration": iteration}
    # Megatron-LM asks a checkpoint for no state that its args say was not saved.
    written |= {"no_save_optim": optimizer is None, "no_save_rng": True}
    common = {"args": Namespace(written), **CURRENT.common_state(iteration), **(optimizer or {})}
    texts: dict[str, bytes] = {}
    folder = f"iter_{iteration:07d}"
    towers = any(inner_prefix(draft.name) for draft in plan.drafts)
    # Of another tool's arrangement its providers know nothing, and that of a text model alone no key beside towers.
    if format in ("torch_dist", "fsdp_dtensor") and model.is_bridges(towers=towers):
        dtype = Counter(draft.dtype for draft in plan.drafts).most_common(1)[0][0] if plan.drafts else ""
        whole = model.config if towers else None
        run_config = run_config_of(config, layout, rows, dtype, tokenizer, format, classes, whole)
        if run_config is not None and config.get("num_layers"):
            texts[f"{folder}/run_config.yaml"] = dump_yaml(run_config)
            texts[f"{folder}/train_state.pt"] = texts["latest_train_state.pt"] = train_state_archive(iteration)
    return Sidecars(iteration, written, common, texts, spec)


def _with_heads(plan: Plan) -> Mapping[str, Value]:
    """The config with the prediction layers that the checkpoint holds, whether or not config.json has as many."""
    heads = {key.layer for key in map(parse_key, (draft.name for draft in plan.drafts)) if key.site == "mtp"}
    stated = plan.config.get("mtp_num_layers", 0)
    if bool(heads) == bool(stated) or stated == 0:
        return plan.config
    return {**plan.config, "mtp_num_layers": len(heads) or None}


def _stated_rows(rows: int | None, format: str) -> int | None:
    """The vocabulary's rows as the args are to say them, None where Megatron-LM is to pad for the layout it runs in.

    torch_dist and fsdp_dtensor load a vocabulary of any padding, but Megatron-LM takes a number in the args as it is,
    and stops where its ranks do not divide it. A multiple of its own default divisor serves all; it stays, since a
    tokenizer may be shorter than the vocabulary. Files of ranks load at their own rows alone.
    """
    shared = format == "torch" or rows is None or rows % _MEGATRON_DIVISOR == 0
    return rows if shared else None


def dump_yaml(value: object) -> bytes:
    """YAML text of plain data."""
    import yaml

    return str(yaml.safe_dump(value, default_flow_style=False)).encode()


def read_run_config(iteration: Path) -> dict[str, object] | None:
    """`run_config.yaml` as plain data, None where there is none; StorageError when it is not a YAML mapping."""
    path = iteration / "run_config.yaml"
    if not path.is_file():
        return None
    from mbx.untrusted.yaml_files import read_yaml

    return read_yaml(path)


def hf_folder(iteration: Path) -> Path | None:
    """The folder of Hugging Face side files within an iteration; None where there is none."""
    return found if (found := iteration / "hf").is_dir() else None


def train_state_archive(iteration: int) -> bytes:
    """`train_state.pt` as Megatron-Bridge 0.3 writes it: a dict of eight scalar tensors; only `step` is not zero."""
    values: dict[str, tuple[str, bytes]] = {"step": ("I32", iteration.to_bytes(4, "little"))}
    for name in ("consumed_train_samples", "skipped_train_samples", "consumed_valid_samples"):
        values[name] = ("I32", bytes(4))
    values["floating_point_operations_so_far"] = ("F32", bytes(4))
    values |= {name: ("BOOL", bytes(1)) for name in ("do_train", "do_valid", "do_test")}
    stubs = {
        name: TensorStub(dtype, (), str(number), 0, (), len(data))
        for number, (name, (dtype, data)) in enumerate(values.items())
    }
    contents = [data for _, data in values.values()]
    archive = lay_out(stubs, [len(data) for data in contents], "train_state")
    whole = bytearray(archive.total_bytes)
    for at, part in archive.frames([zlib.crc32(data) for data in contents]):
        whole[at : at + len(part)] = part
    for at, data in zip(archive.starts, contents, strict=True):
        whole[at : at + len(data)] = data
    return bytes(whole)


def is_plain(value: object) -> bool:
    """Whether a value of a Namespace can be written again: no enum or other class is built from a checkpoint."""
    if isinstance(value, list | tuple):
        return all(map(is_plain, value))
    if isinstance(value, dict):
        return all(map(is_plain, value)) and all(map(is_plain, value.values()))
    return value is None or isinstance(value, bool | int | float | str | bytes)
