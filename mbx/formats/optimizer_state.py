"""An optimizer's state that can go along when a checkpoint's layout changes, or why it cannot."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from converters.errors import UnsupportedError, UsageError
from converters.mcore.keys import canonical_names, parse_key
from converters.mcore.optimizer_state import is_state, renamed, weight_of
from converters.tensors import StoredTensor
from mbx.formats.checkpoint import Checkpoint
from mbx.formats.sidecars import is_plain

#: Entries of the common state that belong to the optimizer, beside its tensors.
_COMMON = ("optimizer", "opt_param_scheduler", "num_floating_point_operations_so_far", "content_metadata")
_RESAVE = "load it once in Megatron-LM at its own layout and save it with --dist-ckpt-optim-fully-reshardable"
_WHY = {
    "dp_reshardable": "flat buffers in the order of one layout's ranks",
    "fully_sharded_bucket_space": "flat buffers in the order of one layout's ranks",
    "dp_zero_gather_scatter": "one object a model-parallel rank",
}


def carried_states(opened: Checkpoint, ep: int) -> dict[str, StoredTensor]:
    """Every tensor of the optimizer's state by name, each in the shape of its weight, for a target of `ep` ranks.

    UsageError where there is none, UnsupportedError where it is stored in a way that no other layout can read.
    """
    if opened.format != "torch_dist":
        raise UnsupportedError(
            f"‹with-optimizer›: the optimizer state of `{opened.format}` checkpoints is cut by data-parallel rank",
            hint=_RESAVE.replace("save it", "save it with --ckpt-format torch_dist, and"),
        )
    if not opened.state:
        raise UsageError(f"‹with-optimizer›: `{opened.iteration}` holds no optimizer state")
    kind = _kind(opened)
    flat = [name for name in opened.state if not is_state(name)]
    if kind in _WHY or flat:
        kind = kind or "dp_reshardable"
        why = _WHY.get(kind, "not in the space of the model's parameters")
        raise UnsupportedError(f"‹with-optimizer›: state of the kind `{kind}` is {why}", hint=_RESAVE, details=flat)
    groups = (opened.common or {}).get("optimizer")
    if not isinstance(groups, Mapping):
        raise UnsupportedError(f"‹with-optimizer›: `{opened.iteration}` lacks the optimizer's parameter groups")
    apart = "optimizer" not in groups  # a chain of optimizers, by number
    ours = isinstance(plain := groups.get("optimizer"), Mapping) and plain.get("by") == "parameter"  # of `mbx train`
    if not ours and apart != (ep > 1) and any(parse_key(name).experts for name in opened.tensors):
        raise UnsupportedError(
            f"‹with-optimizer›: Megatron Core gives experts an optimizer of their own above ‹ep› 1 only, and loads no "
            f"state across; the source has {'two' if apart else 'one'}, ‹ep› {ep} wants {'two' if ep > 1 else 'one'}",
            hint=f"choose ‹ep› {'above 1' if apart else '1'}, or leave the optimizer's state behind",
        )
    names = canonical_names({weight_of(name) for name in opened.state})
    out = {}
    for name, tensor in opened.state.items():
        key = names[weight_of(name)]
        weight = opened.tensors.get(key)
        if weight is None:
            raise UnsupportedError(f"`{name}` belongs to no weight of the checkpoint")
        if tensor.shape != weight.shape:
            raise UnsupportedError(
                f"`{name}` has shape {list(tensor.shape)}, its weight {list(weight.shape)}: "
                "it is flattened, as `fully_sharded_model_space` is",
                hint=_RESAVE,
            )
        out[renamed(name, key)] = replace(tensor, name=renamed(name, key))
    return out


def _kind(opened: Checkpoint) -> str | None:
    metadata = (opened.common or {}).get("content_metadata")
    kind = metadata.get("distrib_optim_sharding_type") if isinstance(metadata, Mapping) else None
    return kind if isinstance(kind, str) else None


def carried_common(opened: Checkpoint) -> dict[str, object]:
    """The optimizer's part of the common state; UnsupportedError where it holds what cannot be written again."""
    out = {key: value for key, value in (opened.common or {}).items() if key in _COMMON}
    if odd := [key for key, value in out.items() if not is_plain(value)]:
        raise UnsupportedError(
            f"‹with-optimizer›: `{odd[0]}` of the common state holds more than plain values, such as a loss scale",
            hint="train in bf16 or fp32, or let the optimizer start anew",
        )
    return out
