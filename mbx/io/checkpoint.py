"""An opened Megatron checkpoint, whatever its format: whole tensors under torch_dist keys, and what lies beside."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from converters.dialects.keys import canonical_names
from converters.errors import StorageError
from converters.layout import Layout
from converters.tensors import StoredTensor

#: Tensors and objects of a torch_dist checkpoint that are no weights.
_STATE = ("optimizer.", "chained_", "rng_state", "rerun_state", "opt_param_scheduler", "common_state")


@dataclass(frozen=True, slots=True)
class McoreCheckpoint:
    """Weights of a checkpoint by canonical key; chunks lie in files relative to `iteration`.

    `format` is torch_dist or torch (legacy). `objects` are the `_extra_state` objects. `args` are the attributes of
    Megatron-LM's Namespace, `common` what else the common state holds, `run_config` is Megatron-Bridge's, `hf` the
    folder of Hugging Face side files; each None where there is none. `layout` is the one the files were written
    under, as far as they tell. `left_out` says in words what else is stored: optimizer and random-number state.
    """

    root: Path
    iteration: Path
    format: str
    tensors: Mapping[str, StoredTensor]
    objects: tuple[str, ...] = ()
    hf: Path | None = None
    args: Mapping[str, object] | None = None
    common: Mapping[str, object] | None = None
    layout: Layout | None = None
    run_config: Mapping[str, object] | None = None
    left_out: tuple[str, ...] = ()


def open_any(path: Path) -> McoreCheckpoint:
    """Open the Megatron checkpoint at `path`, the root or an iteration; headers are read and no tensor.

    Raises StorageError for what is no checkpoint, or not a whole one, and UnsupportedError for a format that is
    not read.
    """
    from mbx.io.legacy import open_legacy
    from mbx.io.torch_dist import find_iteration

    if not path.is_dir():
        raise StorageError(f"`{path}` is not a folder")
    here = any(path.glob("mp_rank_*"))
    iteration = path if here else find_iteration(path)
    if any(iteration.glob("mp_rank_*")):
        return open_legacy(iteration)
    return _open_torch_dist(path)


def _open_torch_dist(path: Path) -> McoreCheckpoint:
    from mbx.io.sidecars import common_of, read_run_config
    from mbx.io.torch_dist import open_torch_dist

    opened = open_torch_dist(path)
    weights = {name: tensor for name, tensor in opened.dcp.tensors.items() if not name.startswith(_STATE)}
    common = common_of(opened.iteration, opened.dcp.objects)
    args = common.pop("args", None)
    rest = [tensor for name, tensor in opened.dcp.tensors.items() if name not in weights]
    left_out = []
    if state := [tensor for tensor in rest if tensor.name.startswith(("optimizer.", "chained_"))]:
        left_out.append(f"optimizer state: {len(state)} tensors, {sum(t.nbytes for t in state)} bytes")
    if any(name.startswith(("rng_state", "rerun_state")) for name in opened.dcp.objects):
        left_out.append("random-number state")
    return McoreCheckpoint(
        opened.root,
        opened.iteration,
        "torch_dist",
        canonical_tensors(weights),
        tuple(name for name in opened.dcp.objects if "_extra_state/shard_" in name and not name.startswith(_STATE)),
        opened.hf,
        args if isinstance(args, dict) else None,
        common,
        run_config=read_run_config(opened.iteration),
        left_out=tuple(left_out),
    )


def canonical_tensors(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Tensors under the names that Transformer Engine's layers give them; StorageError when two meet in one name."""
    names = canonical_names(tensors)
    if len(set(names.values())) < len(names):
        twice = [name for name in names.values() if list(names.values()).count(name) > 1]
        raise StorageError(f"`{twice[0]}` is stored under two names")
    return {names[name]: replace(tensor, name=names[name]) for name, tensor in tensors.items()}
