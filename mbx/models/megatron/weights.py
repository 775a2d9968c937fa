"""Where a Megatron Core model of a comparison gets its weights, a box of a global tensor at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from converters.errors import StorageError
from converters.mcore.releases import CURRENT
from converters.protocols import Source
from converters.tensors import Shape, StoredTensor
from mbx.models.stored import read_box, read_rows

if TYPE_CHECKING:
    import torch
    from torch import nn

_STACKED = "decoder.layers."


class StoredWeights:
    """The weights of a checkpoint of any format, by torch_dist key. No process waits for another."""

    def __init__(self, tensors: Mapping[str, StoredTensor], source: Source) -> None:
        self.tensors, self.source = tensors, source

    def rows(self, name: str, runs: Sequence[tuple[int, int]]) -> torch.Tensor:
        """Rows of a tensor that is not stacked, in runs of (first, count); StorageError where it is absent."""
        if name not in self.tensors:
            raise StorageError(f"the checkpoint lacks `{name}`")
        return read_rows(self.tensors[name], self.source, runs)

    def fill(self, sharded: dict[str, object]) -> dict[str, torch.Tensor]:
        """A state dict for what `sharded_weights` asks for, without its objects (`_extra_state`).

        Raises StorageError where something is absent or has another shape.
        """
        from mbx.models.megatron.core.sharding import (
            ShardedObject,
            ShardedTensor,
            apply_factory_merges,
            dict_list_map_inplace,
            extract_matching_values,
            load_preprocess,
            nested_values,
        )

        asked, _, factories = load_preprocess({"model": sharded})
        tensors, others = extract_matching_values(asked, lambda value: isinstance(value, ShardedTensor))
        self.check_objects([one.unique_key for one in nested_values(others) if isinstance(one, ShardedObject)])
        wanted: list[Any] = list(nested_values(tensors))
        found = dict(zip(map(id, wanted), self.read(wanted), strict=True))
        dict_list_map_inplace(lambda value: found[id(value)], tensors)
        merged = apply_factory_merges(tensors, factories)
        return cast("dict[str, torch.Tensor]", merged.get("model", {}))

    def check_objects(self, names: list[str]) -> None:
        """Formats without objects lack none."""

    def read(self, wanted: list[Any]) -> list[torch.Tensor]:
        """The box of each sharded tensor, in the stored dtype, which the model's own copying widens."""
        return [self._box(one) for one in wanted]

    def _box(self, wanted: Any) -> torch.Tensor:
        depth: int = wanted.prepend_axis_num
        index, inner = tuple(wanted.global_offset[:depth]), tuple(wanted.global_offset[depth:])
        stack: Shape = ()
        tensor = self.tensors.get(wanted.key)
        if tensor is None and wanted.key.startswith(_STACKED) and index:
            # The format keeps a key for each layer where the model asks for all layers in one.
            tensor = self.tensors.get(f"{_STACKED}{index[0]}.{wanted.key.removeprefix(_STACKED)}")
            stack, index = tuple(wanted.global_shape[:1]), index[1:]
        if tensor is None:
            raise StorageError(f"the checkpoint lacks `{wanted.key}`")
        self.check_shape(wanted, stack + tensor.shape)
        return read_box(tensor, self.source, index, inner, tuple(wanted.local_shape))

    @staticmethod
    def check_shape(wanted: Any, stored: Shape) -> None:
        """StorageError where a tensor has another shape than the model's."""
        if stored != tuple(wanted.global_shape):
            raise StorageError(
                f"`{wanted.key}` has shape {list(stored)}; Megatron Core expects {list(wanted.global_shape)}"
            )


def sharded_weights(model: nn.Module) -> dict[str, object]:
    """What `model` asks a torch_dist checkpoint for: state-dict name → sharded tensor, object or factory of them."""
    return cast("dict[str, object]", cast("Any", model).sharded_state_dict(metadata=sharding_metadata()))


def sharding_metadata() -> dict[str, object]:
    """What `sharded_state_dict` must be told to give the keys that the common state stands for."""
    from mbx.models.megatron.core.groups import parallel_state

    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return {**CURRENT.content_metadata, "dp_cp_group": group}
