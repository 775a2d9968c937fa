"""What lies beside the weights of a Megatron checkpoint and says what model it is."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from converters.dialects.local import Spec
from converters.dialects.megatron_args import args_of, layout_args
from converters.errors import StorageError
from converters.expr import Value
from converters.layout import Layout
from mbx.io.archive import file_reader, load_archive, read_object
from mbx.io.dcp import StoredObject
from mbx.io.torch_values import Namespace

_COMMON_OBJECT = "common_state/shard_0_1"


def common_of(iteration: Path, objects: Mapping[str, StoredObject]) -> dict[str, object]:
    """The common state: `common.pt`, or the object that newer Megatron Core keeps among the tensors; may be empty.

    A Namespace becomes a dict of its attributes. Raises StorageError when it is damaged.
    """
    loaded: object = {}
    if (iteration / "common.pt").is_file():
        loaded, _ = load_archive(iteration / "common.pt", unknown="opaque")
    elif _COMMON_OBJECT in objects:
        file, start, length = objects[_COMMON_OBJECT]
        fd = os.open(iteration / file, os.O_RDONLY)
        try:
            loaded, _ = read_object(file_reader(fd, start), length, unknown="opaque", source=f"{iteration / file}")
        finally:
            os.close(fd)
        if isinstance(loaded, list) and len(loaded) == 1:
            loaded = loaded[0]
    if not isinstance(loaded, dict):
        raise StorageError(f"`{iteration}`: the common state is a {type(loaded).__name__}; a dict was expected")
    return {str(key): value.values if isinstance(value, Namespace) else value for key, value in loaded.items()}


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


def megatron_sidecars(
    config: Mapping[str, Value],
    layout: Layout,
    format: str,
    iteration: int,
    padded_vocab: int | None,
    origin: Mapping[str, object] | None = None,
    spec: Spec = "transformer_engine",
) -> Sidecars:
    """Sidecars of a checkpoint of `config` under `layout`; `origin` are the args of the checkpoint it came from."""
    known = {} if origin is None else {key: value for key, value in origin.items() if is_plain(value)}
    written: dict[str, object] = {**known, **layout_args(layout), "padded_vocab_size": padded_vocab}
    if origin is None:
        written = args_of(config, layout, padded_vocab)
    written |= {"ckpt_format": format, "transformer_impl": spec, "iteration": iteration}
    common: dict[str, object] = {
        "args": Namespace(written),
        "checkpoint_version": 3.0,
        "iteration": iteration,
        "content_metadata": {"singleton_local_shards": False, "chained_optim_avoid_prefix": True},
    }
    return Sidecars(iteration, written, common, {}, spec)


def is_plain(value: object) -> bool:
    """Whether a value of a Namespace can be written again: no enum or other class is built from a checkpoint."""
    if isinstance(value, list | tuple):
        return all(map(is_plain, value))
    if isinstance(value, dict):
        return all(map(is_plain, value)) and all(map(is_plain, value.values()))
    return value is None or isinstance(value, bool | int | float | str | bytes)
