"""The fsdp_dtensor dialect: what Megatron-FSDP's checkpoints call a parameter, against torch_dist keys.

Such a checkpoint is a plain torch DCP folder of the model's own `state_dict` names behind `model.module.`: a key per
layer and per expert under global numbers, no `_extra_state`, and the gate and up halves of a SwiGLU linear_fc1 under
names that end in `_w` and `_v`. Sources: `preprocess_fsdp_dtensor_state_dict` of megatron/training/checkpointing.py,
core/transformer/fsdp_dtensor_checkpoint.py, and Megatron-LM's torch_dist converter, which name them alike.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import product

from converters.errors import UnsupportedError
from converters.mcore.keys import EXPERTS, ONE_EXPERT, parse_key
from converters.mcore.local import parse_local, spell_local
from converters.mcore.releases import CURRENT, Release
from converters.tensors import Shape

PREFIX = "model.module."
#: `model.` alone is torch's own FSDP2, which Megatron-LM calls torch_dcp.
_PREFIXES = (PREFIX, "model.")
_HALF = re.compile(r"(\.linear_fc1\.(?:weight|bias)\d*)_([wv])$")
_GLU = re.compile(r"\.linear_fc1\.(?:weight|bias)\d*$")


@dataclass(frozen=True, slots=True)
class Part:
    """Rows `[row, row + rows)` of the entry `index` of a torch_dist tensor, which the format keeps under `name`."""

    name: str
    index: tuple[int, ...]
    row: int
    rows: int


@dataclass(frozen=True, slots=True)
class Stored:
    """A stored name taken apart: the key of its own layer, its expert, and which half it is (0, 1, None: whole)."""

    key: str
    expert: int | None
    half: int | None


def is_weight(name: str) -> bool:
    """Whether a stored name is a model's tensor."""
    return name.startswith("model.")


def is_fused_glu(key: str) -> bool:
    """Whether a torch_dist key is a weight or bias that holds gate and up where the MLP is gated."""
    return _GLU.search(key) is not None


def parts_of(key: str, shape: Shape, *, halves: bool, release: Release = CURRENT) -> tuple[Part, ...]:
    """The stored names that make up the torch_dist tensor `key` of `shape`, stack included, as `release` has them.

    `halves` says that it is a SwiGLU's linear_fc1, which is stored in two.
    UnsupportedError for Mamba mixers, which the format packs in a way of their own.
    """
    if ".mixer." in key:
        raise UnsupportedError(
            f"`{key}`: fsdp_dtensor checkpoints of Mamba layers are not known",
            hint="‹format› torch_dist holds them",
        )
    parsed = parse_key(key)
    inner = shape[parsed.depth :]
    rows = inner[0] if inner else 1
    out = []
    for index in product(*map(range, shape[: parsed.depth])):
        layer, expert = parsed.at(index)
        number = parsed.layer if layer is None else layer
        name = spell_local(parsed.param, expert, "transformer_engine", release)
        if parsed.site:
            name = f"{parsed.site}.layers.{number}.{name}"
        if halves:
            half = rows // 2
            out += [Part(f"{PREFIX}{name}_{'wv'[i]}", index, i * half, half) for i in (0, 1)]
        else:
            out.append(Part(PREFIX + name, index, 0, rows))
    return tuple(out)


def parse_stored(name: str) -> Stored:
    """Parts of a stored name; law: for every part of `parts_of(key, …)` they say its key, expert and half.

    UnsupportedError for experts that are flattened into one tensor.
    """
    bare = next(name.removeprefix(prefix) for prefix in _PREFIXES if name.startswith(prefix))
    half = None
    if found := _HALF.search(bare):
        bare, half = bare[: found.start()] + found[1], "wv".index(found[2])
    local = parse_local(bare)
    key = local.param if local.layer is None else f"{local.site}.layers.{local.layer}.{local.param}"
    return Stored(key, local.expert, half)


def is_apart(name: str) -> bool:
    """Whether a torch_dist key is one of those that `singleton_local_shards` writes: an expert's, or a half's."""
    return _HALF.search(name) is not None or ONE_EXPERT.search(name) is not None


def parse_apart(name: str) -> Stored:
    """Parts of a torch_dist key under `singleton_local_shards`, which keeps layers, experts and halves apart.

    Source: `apply_swiglu_sharded_factory` in core/transformer/mlp.py and `sharded_state_dict` in moe/experts.py.
    """
    half = expert = None
    if found := _HALF.search(name):
        name, half = name[: found.start()] + found[1], "wv".index(found[2])
    if found := ONE_EXPERT.search(name):
        name, expert = name[: found.start()] + EXPERTS + name[found.end() :], int(found[1])
    return Stored(name, expert, half)
