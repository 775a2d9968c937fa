"""Load and save torch_dist checkpoints with Megatron Core itself: the judge of what mbx writes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from converters.errors import StorageError, UsageError
from mbx.models.megatron.weights import sharded_weights, sharding_metadata

if TYPE_CHECKING:
    import torch
    from torch import nn


# mcore's own default (dist_checkpointing.load): a key the model asks for and the checkpoint lacks is an error,
# `_extra_state` included; a key the checkpoint has on top is not.
DEFAULT_STRICTNESS = "assume_ok_unexpected"
# Megatron-LM writes these beside the state dict; a loader without `args` reads only the version.
_COMMON = {"checkpoint_version": 3.0, "iteration": 0}


def load_torch_dist(model: nn.Module, iter_dir: Path, *, strict: str = DEFAULT_STRICTNESS) -> None:
    """Fill `model` from a torch_dist iteration folder with `dist_checkpointing.load`.

    `iter_dir` holds `metadata.json` and `.metadata` (`.../iter_0000000`). `strict` is one of mcore's StrictHandling
    values; `raise_all` also refuses keys that the model does not have. Collective over the process group.
    Raises `StorageError` with mcore's own words where mcore does not accept the checkpoint.
    """
    loaded = load_sharded(sharded_weights(model), iter_dir, strict=strict)
    try:
        model.load_state_dict(loaded, strict=True)
    except RuntimeError as error:
        raise refused(iter_dir, error) from error


def load_sharded(
    sharded: dict[str, object], iter_dir: Path, *, strict: str = DEFAULT_STRICTNESS
) -> dict[str, torch.Tensor]:
    """A state dict for what `sharded_weights` asked for; errors are those of `load_torch_dist`."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.core import CheckpointingException
    from torch.distributed.checkpoint.api import CheckpointException

    _need_group()
    if not (iter_dir / "metadata.json").is_file():
        raise StorageError(
            f"`{iter_dir}` is not a torch_dist iteration: it has no metadata.json",
            hint="name the iter_* folder, not its parent",
        )
    # torch's CheckpointException derives from BaseException, so it is named.
    try:
        loaded = dist_checkpointing.load({"model": sharded}, str(iter_dir), strict=strict)
    except (CheckpointException, CheckpointingException, RuntimeError, KeyError, OSError) as error:
        raise refused(iter_dir, error) from error
    return cast("dict[str, torch.Tensor]", loaded["model"])


def refused(iter_dir: Path, error: BaseException) -> StorageError:
    """Megatron Core's own words for why it does not take a checkpoint."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    fact = f"Megatron Core does not accept `{iter_dir}`: {lines[0] if lines else type(error).__name__}"
    return StorageError(fact, details=lines[1:])


def save_torch_dist(model: nn.Module, iter_dir: Path) -> None:
    """Save `model` as a torch_dist iteration folder with `dist_checkpointing.save`; collective.

    `iter_dir` is created and must be empty. mcore starts a multiprocessing manager here: a script that calls this
    needs an `if __name__ == "__main__"` guard. Raises `UsageError` for a folder that is not empty.
    """
    import torch
    from megatron.core import dist_checkpointing

    _need_group()
    if torch.distributed.get_rank() == 0:
        iter_dir.mkdir(parents=True, exist_ok=True)
        if any(iter_dir.iterdir()):
            raise UsageError(f"`{iter_dir}` is not empty", hint="name a new folder")
    torch.distributed.barrier()
    metadata = sharding_metadata()
    state = {
        **_COMMON,
        "content_metadata": {k: v for k, v in metadata.items() if k != "dp_cp_group"},
        "model": cast("Any", model).sharded_state_dict(metadata=metadata),
    }
    dist_checkpointing.save(state, str(iter_dir), ("torch_dist", 1))


def _need_group() -> None:
    import torch

    if not torch.distributed.is_initialized():
        raise UsageError(
            "Megatron Core reads and writes torch_dist inside a process group; none is initialised",
            hint="enter `mbx.models.megatron.processes.process_group()` first",
        )


def asked_keys(model: nn.Module) -> tuple[frozenset[str], frozenset[str]]:
    """Names that `model` asks a torch_dist checkpoint for: of tensors, and of objects (`…_extra_state/shard_…`)."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, apply_factories

    _need_group()
    state = {"model": sharded_weights(model)}
    apply_factories(state)
    values = list(nested_values(state))
    tensors = frozenset(value.key for value in values if isinstance(value, ShardedTensor))
    return tensors, frozenset(value.unique_key for value in values if isinstance(value, ShardedObject))
