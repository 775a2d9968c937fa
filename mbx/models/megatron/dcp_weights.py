"""Boxes of a torch_dist checkpoint, read by torch's own reader of distributed checkpoints.

Megatron Core's `dist_checkpointing.load` is made of the same reader, but takes no model of which a layer is there at a
time. The reader is another implementation than `mbx.formats.torch_dist`: it judges what mbx writes.
This file defines a torch class and imports torch when imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from converters.errors import StorageError
from converters.tensors import StoredTensor
from mbx.formats.files import FileSource
from mbx.models.inert_load import torch_index
from mbx.models.megatron.weights import StoredWeights


class _Boxes(DefaultLoadPlanner):
    """Says where the reader puts what it reads: `boxes` by (key, offsets)."""

    def __init__(self, boxes: Mapping[tuple[str, torch.Size | None], torch.Tensor]) -> None:
        super().__init__()
        self.boxes = boxes

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        """The box that an item lies in."""
        return self.boxes[index.fqn, index.offset]


class TorchDistWeights(StoredWeights):
    """The weights of a torch_dist iteration; what is asked for has to be there, objects (`_extra_state`) included.

    `tensors` and `source` are the same as mbx reads them, for rows of the vocabulary. `prefix` stands before all keys
    there.
    """

    def __init__(
        self, iteration: Path, tensors: Mapping[str, StoredTensor], source: FileSource, prefix: str = ""
    ) -> None:
        super().__init__(tensors, source)
        self.prefix = prefix
        self.iteration = iteration
        self.reader = FileSystemReader(str(iteration))
        self.metadata = torch_index(iteration)
        self.reader.set_up_storage_reader(self.metadata, is_coordinator=True)

    def check_objects(self, names: list[str]) -> None:
        """StorageError for objects that are not there."""
        stored = self.metadata.state_dict_metadata
        for name in names:
            if not isinstance(stored.get(self.prefix + name), BytesStorageMetadata):
                raise StorageError(f"the checkpoint lacks `{name}`")

    def read(self, wanted: list[Any]) -> list[torch.Tensor]:
        """The box of each sharded tensor."""
        plan: list[ReadItem] = []
        boxes: dict[tuple[str, torch.Size | None], torch.Tensor] = {}
        places = []
        for one in wanted:
            key = self.prefix + one.key
            found = self.metadata.state_dict_metadata.get(key)
            if not isinstance(found, TensorStorageMetadata):
                raise StorageError(f"the checkpoint lacks `{one.key}`")
            self.check_shape(one, tuple(found.size))
            sizes = torch.Size((1,) * one.prepend_axis_num + tuple(one.local_shape))
            box = ChunkStorageMetadata(torch.Size(one.global_offset), sizes)
            items = create_read_items_for_chunk_list(key, found, [box])
            if (filled := sum(item.lengths.numel() for item in items)) != sizes.numel():
                raise StorageError(f"`{one.key}`: {filled} of {sizes.numel()} values are stored")
            places.append((key, box.offsets))
            boxes[places[-1]] = torch.empty(sizes, dtype=found.properties.dtype)
            plan += items
        try:
            self.reader.read_data(LoadPlan(plan), _Boxes(boxes)).wait()
        except (OSError, ValueError, RuntimeError, EOFError) as error:
            raise StorageError(f"torch cannot read `{self.iteration}`: {error}") from error
        return [boxes[place].view(tuple(one.local_shape)) for place, one in zip(places, wanted, strict=True)]
