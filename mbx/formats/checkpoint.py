"""An opened Megatron checkpoint, whatever its format: whole tensors under torch_dist keys, and what lies beside."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from converters.adapters.megatron import MARKS
from converters.errors import StorageError, UsageError
from converters.mcore.fsdp_dtensor import is_apart, parse_apart
from converters.mcore.keys import canonical_names
from converters.mcore.layout import Layout
from converters.mcore.megatron_args import config_of_args
from converters.tensors import StoredTensor

_OPTIMIZER = ("optimizer.", "chained_")
#: Tensors and objects of a torch_dist checkpoint that are no weights.
_STATE = (*_OPTIMIZER, "rng_state", "rerun_state", "opt_param_scheduler", "common_state")


@dataclass(frozen=True, slots=True)
class McoreCheckpoint:
    """Weights of a checkpoint by canonical key; chunks lie in files relative to `iteration`.

    `format` is torch_dist, torch (legacy) or fsdp_dtensor. `objects` are the `_extra_state` objects. `args` are the
    attributes of Megatron-LM's Namespace, `common` what else the common state holds, `run_config` is
    Megatron-Bridge's, `hf` the folder of Hugging Face side files; each None where there is none. `layout` is the one
    the files were written under, as far as they tell. `left_out` says in words what else is stored: optimizer and
    random-number state. `state` are the optimizer's tensors by stored name, of torch_dist checkpoints alone.
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
    state: Mapping[str, StoredTensor] = field(default_factory=dict)


def is_weight(name: str) -> bool:
    """Whether a name of a torch_dist checkpoint is the model's, not a training run's state."""
    return not name.startswith(_STATE)


def model_tensors(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The model's weights among a checkpoint's tensors: optimizer and random-number state are not weights."""
    return {name: tensor for name, tensor in tensors.items() if is_weight(name)}


def is_optimizer(name: str) -> bool:
    """Whether a name of a torch_dist checkpoint is an optimizer's."""
    return name.startswith(_OPTIMIZER)


def open_model(path: Path) -> McoreCheckpoint:
    """Open a Megatron checkpoint of a model as `open_any` does; UsageError for one that holds adapters.

    A model's conversion has no place for an adapter's alpha, without which its factors say nothing.
    """
    opened = open_any(path)
    if name := next((name for name in opened.tensors if any(mark in name for mark in MARKS)), None):
        raise UsageError(
            f"`{path}` holds an adapter, not a model: `{name}`",
            hint=f"`mbx convert adapter-to-hf {path} DST`, or `mbx convert merge BASE {path} DST` with the model that "
            "it adapts",
        )
    return opened


def open_any(path: Path) -> McoreCheckpoint:
    """Open the Megatron checkpoint at `path`, the root or an iteration; headers are read and no tensor.

    Raises StorageError for what is no checkpoint, or not a whole one, and UnsupportedError for a format that is
    not read.
    """
    from mbx.formats.fsdp_dtensor import is_fsdp_dtensor, open_fsdp_dtensor
    from mbx.formats.legacy import open_legacy
    from mbx.formats.torch_dist import find_iteration

    if not path.is_dir():
        what = "is a file; a folder was expected" if path.exists() else "is not a folder"
        raise StorageError(f"`{path}` {what}")
    here = any(path.glob("mp_rank_*"))
    iteration = path if here else find_iteration(path)
    if any(iteration.glob("mp_rank_*")):
        return open_legacy(iteration)
    if is_fsdp_dtensor(iteration):
        return open_fsdp_dtensor(iteration)
    return _open_torch_dist(path)


def _open_torch_dist(path: Path) -> McoreCheckpoint:
    from mbx.formats.gathering import gather
    from mbx.formats.sidecars import common_of, read_run_config
    from mbx.formats.torch_dist import open_torch_dist

    opened = open_torch_dist(path)
    weights = {name: tensor for name, tensor in opened.dcp.tensors.items() if is_weight(name)}
    common = common_of(opened.iteration, opened.dcp.objects)
    args = common.pop("args", None)
    rest = [tensor for name, tensor in opened.dcp.tensors.items() if name not in weights]
    left_out = []
    objects = [name for name in opened.dcp.objects if "_extra_state/shard_" in name and is_weight(name)]
    if any(map(is_apart, weights)):  # saved with singleton_local_shards; `_extra_state`s are apart as well
        weights = gather(weights, parse_apart, config_of_args(args) if isinstance(args, dict) else {})
        objects = []
    state = [tensor for tensor in rest if is_optimizer(tensor.name)]
    if state:
        left_out.append(f"optimizer state: {len(state)} tensors, {sum(t.nbytes for t in state)} bytes")
    if any(name.startswith(("rng_state", "rerun_state")) for name in opened.dcp.objects):
        left_out.append("random-number state")
    return McoreCheckpoint(
        opened.root,
        opened.iteration,
        "torch_dist",
        canonical_tensors(weights),
        tuple(objects),
        opened.hf,
        args if isinstance(args, dict) else None,
        common,
        run_config=read_run_config(opened.iteration),
        left_out=tuple(left_out),
        state={tensor.name: tensor for tensor in state},
    )


def canonical_tensors(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Tensors under the names that Transformer Engine's layers give them; StorageError when two meet in one name."""
    names = canonical_names(tensors)
    if len(set(names.values())) < len(names):
        (twice, _), *_ = Counter(names.values()).most_common(1)
        raise StorageError(f"`{twice}` is stored under two names")
    return {names[name]: replace(tensor, name=names[name]) for name, tensor in tensors.items()}
