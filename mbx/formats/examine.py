"""What a folder is: its format, who wrote it, whether it is whole, and the tensors it holds; from headers alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from converters.errors import MbxError, StorageError, UnsupportedError
from converters.mcore.layout import Layout
from converters.rows.expr import Value
from converters.tensors import StoredTensor
from mbx.formats import hf, torch_dist
from mbx.formats.adapter_facts import Facts, describe_megatron, describe_peft
from mbx.formats.adapter_folder import is_peft
from mbx.formats.architecture import architecture_of
from mbx.formats.checkpoint import McoreCheckpoint, is_optimizer, model_tensors, open_any
from mbx.formats.facts import Checkpoint, Tensor, count_by, described
from mbx.formats.fsdp_dtensor import is_fsdp_dtensor, open_fsdp_dtensor
from mbx.formats.legacy import open_legacy
from mbx.formats.safetensors import read_folder
from mbx.tables import table_for
from mbx.torchfile.archive import load_archive
from mbx.torchfile.torch_values import Namespace


def examine(path: Path) -> Checkpoint:
    """Find out what `path` is; StorageError for a path that is no checkpoint at all."""
    if not path.is_dir():
        what = "is a file; a folder was expected" if path.exists() else "does not exist"
        raise StorageError(f"`{path}` {what}", hint="name a checkpoint folder")
    iteration = _iteration(path)
    if iteration is not None:
        if ranks := sorted(p for p in iteration.glob("mp_rank_*") if p.is_dir()):
            files = {
                f"{p.parent.name}/{p.name}": p.stat().st_size for rank in ranks for p in sorted(rank.glob("*.pt"))
            }
            return _megatron(path, iteration, "megatron legacy", open_legacy, files)
        if not (iteration / "metadata.json").is_file() and _fsdp(iteration):
            files = _sizes(iteration, (p.name for p in sorted(iteration.glob("*.distcp"))))
            return _megatron(path, iteration, "fsdp_dtensor", open_fsdp_dtensor, files)
        return _torch_dist(path, iteration)
    if is_peft(path):
        return _peft(path)
    if (path / hf.CONFIG).is_file() or any(path.glob("*.safetensors")):
        return _hugging_face(path)
    if unfinished := sorted(p.name for p in path.glob("iter_*") if p.is_dir()):
        fault = f"unfinished: no `{torch_dist.TRACKER}` names an iteration, {', '.join(unfinished[-3:])} lie there"
        return Checkpoint(path, "megatron", fault=fault)
    raise StorageError(
        f"`{path}` is no checkpoint that mbx knows",
        hint=f"a Hugging Face folder has `{hf.CONFIG}`, a Megatron checkpoint `{torch_dist.TRACKER}` or `.metadata`",
    )


def _iteration(path: Path) -> Path | None:
    """The iteration folder meant by `path`; None where it is no Megatron checkpoint."""
    inside = (".metadata", "metadata.json", "common.pt")
    if any((path / name).is_file() for name in inside) or any(path.glob("mp_rank_*")) or any(path.glob("__*.distcp")):
        return path
    return torch_dist.find_iteration(path) if (path / torch_dist.TRACKER).is_file() else None


def _hugging_face(path: Path) -> Checkpoint:
    fault, config, files = None, dict[str, Value](), tuple[str, ...]()
    tensors: Mapping[str, StoredTensor] = {}
    try:
        config = hf.read_config(path)
        weights = read_folder(path)
        tensors, files = weights.tensors, weights.files
    except StorageError as error:
        fault = error.fact
    fault = fault or _partial(path)
    architecture, table = None, None
    try:
        architecture, table = _model(config)
    except MbxError as error:
        fault = fault or error.fact
    return Checkpoint(
        path,
        "huggingface",
        writer="mbx" if (path / hf.MANIFEST).is_file() else None,
        fault=fault,
        architecture=architecture,
        table=table,
        tensors=described(tensors),
        files=_sizes(path, files),
        side_files=tuple(hf.side_files(path)),
    )


def _peft(path: Path) -> Checkpoint:
    """A PEFT folder: what it adapts, and how."""
    fault, tensors, adapter = _partial(path), dict[str, StoredTensor](), None
    try:
        weights = read_folder(path)
        tensors = weights.tensors
        adapter = describe_peft(path, {name: tensor.shape for name, tensor in tensors.items()})
    except StorageError as error:
        fault = fault or error.fact
    return Checkpoint(
        path,
        "peft adapter",
        writer="mbx" if (path / hf.MANIFEST).is_file() else None,
        fault=fault,
        tensors=described(tensors),
        files=_sizes(path, (p.name for p in sorted(path.glob("*.safetensors")))),
        side_files=tuple(hf.side_files(path)),
        adapter=adapter,
    )


def _torch_dist(path: Path, iteration: Path) -> Checkpoint:
    fault = _partial(path)
    tensors: Mapping[str, StoredTensor] = {}
    num_objects, files = 0, tuple(p.name for p in sorted(iteration.glob("*.distcp")))
    try:
        dcp = torch_dist.open_torch_dist(iteration).dcp
        tensors, num_objects, files = dcp.tensors, len(dcp.objects), dcp.files
    except StorageError as error:
        fault = fault or error.fact
    model = model_tensors(tensors)
    rest = [tensor for name, tensor in tensors.items() if name not in model]
    architecture, table = None, None
    common, writer = dict[object, object](), None
    try:
        architecture, table = _model_of(iteration)
        common, writer = _common(iteration)
    except MbxError as error:
        fault = fault or error.fact
    number = common.get("iteration")
    if isinstance(number, bool) or not isinstance(number, int):
        number = int(iteration.name[5:]) if re.fullmatch(r"iter_\d+", iteration.name) else None
    root = path if path != iteration else iteration.parent
    if (root / hf.MANIFEST).is_file():
        writer = "mbx"
    listed = described(model)
    return Checkpoint(
        path,
        "torch_dist",
        writer=writer,
        fault=fault,
        iteration=number,
        architecture=architecture,
        table=table,
        layout=_layout_of(listed),
        tensors=listed,
        other_state=count_by(("optimizer" if is_optimizer(t.name) else "other", t.nbytes) for t in rest),
        num_objects=num_objects,
        files=_sizes(iteration, files),
        side_files=tuple(hf.side_files(iteration / "hf")) if (iteration / "hf").is_dir() else (),
        adapter=_adapter(iteration, model),
    )


def _adapter(iteration: Path, tensors: Mapping[str, StoredTensor]) -> Facts | None:
    try:
        return describe_megatron(iteration, {name: tensor.shape for name, tensor in tensors.items()})
    except StorageError:  # nothing says its alpha; the tensors are listed all the same
        return None


def _fsdp(iteration: Path) -> bool:
    try:
        return is_fsdp_dtensor(iteration)
    except StorageError:  # a damaged index: whose it was cannot be told
        return False


def _megatron(
    path: Path, iteration: Path, format: str, opener: Callable[[Path], McoreCheckpoint], files: Mapping[str, int]
) -> Checkpoint:
    """A checkpoint that is understood by opening it: its layout and tensors, or what keeps it from being opened."""
    fault, opened = _partial(path), None
    try:
        opened = opener(iteration)
    except MbxError as error:
        fault = fault or error.fact
    number = int(iteration.name[5:]) if re.fullmatch(r"iter_\d+", iteration.name) else None
    writer = "mbx" if any((folder / hf.MANIFEST).is_file() for folder in (path, iteration.parent)) else "Megatron-LM"
    if opened is None:
        return Checkpoint(path, format, writer=writer, fault=fault, iteration=number, files=files)
    architecture, table = _stated_model(opened)
    return Checkpoint(
        path,
        format,
        writer=writer,
        fault=fault,
        iteration=number,
        architecture=architecture,
        table=table,
        layout=_sizes_of(opened.layout),
        tensors=described(opened.tensors),
        other_state={what.partition(":")[0]: _stated_size(what) for what in opened.left_out},
        files=files,
        side_files=tuple(hf.side_files(opened.hf)) if opened.hf is not None else (),
    )


def _stated_size(what: str) -> tuple[int, int]:
    """Tensors and bytes that the words of a left-out state give, 0 where they give none."""
    found = re.search(r": (\d+) tensors, (\d+) bytes", what)
    return (0, 0) if found is None else (int(found[1]), int(found[2]))


def _sizes_of(layout: Layout | None) -> dict[str, int]:
    if layout is None:
        return {}
    return {"tp": layout.tp, "pp": layout.pp, "vpp": layout.vpp, "ep": layout.ep, "etp": layout.expert_tp}


def _model_of(iteration: Path) -> tuple[str | None, str | None]:
    """Architecture and table of a torch_dist checkpoint, whole or damaged, as far as they can be told."""
    if (iteration / "hf" / hf.CONFIG).is_file():
        return _model(hf.read_config(iteration / "hf"))
    try:
        return _stated_model(open_any(iteration))
    except MbxError:
        return None, None


def _stated_model(opened: McoreCheckpoint) -> tuple[str | None, str | None]:
    """Architecture and table by hf/ or else by Megatron's own sidecars; None where they do not tell."""
    try:
        found = architecture_of(opened)
    except MbxError:
        return None, None
    return _model(found.config)[0], found.table.name


def _common(iteration: Path) -> tuple[dict[object, object], str | None]:
    """`common.pt`, and who wrote the checkpoint as far as the folder shows."""
    common: object = {}
    if (iteration / "common.pt").is_file():
        common, _ = load_archive(iteration / "common.pt", unknown="opaque")
    common = common if isinstance(common, dict) else {}
    if (iteration / "run_config.yaml").is_file():
        return common, "Megatron-Bridge"
    return common, "Megatron-LM" if isinstance(common.get("args"), Namespace) else "torch"


def _partial(path: Path) -> str | None:
    if path.name.endswith(".partial"):
        return "unfinished: this is the working folder of a run that did not end"
    return None


def _model(config: Mapping[str, Value]) -> tuple[str | None, str | None]:
    """Architecture that a config names, and the table that covers it."""
    names = config.get("architectures")
    architecture = ", ".join(map(str, names)) if isinstance(names, list) and names else config.get("model_type")
    if architecture is None:
        return None, None
    try:
        return str(architecture), table_for(config).name
    except UnsupportedError:
        return str(architecture), None


def _layout_of(tensors: Iterable[Tensor]) -> dict[str, int]:
    """The tensor-parallel size the chunks were cut for, which the embedding shows."""
    for tensor in tensors:
        if tensor.name.endswith("word_embeddings.weight"):
            return {"tp": tensor.grid[-2]}
    return {}


def _sizes(folder: Path, files: Iterable[str]) -> dict[str, int]:
    return {name: (folder / name).stat().st_size for name in files}
