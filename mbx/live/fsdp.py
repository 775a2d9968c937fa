"""Parameters that PyTorch's FSDP cuts by rows, as Megatron Core's `TorchFullyShardedDataParallel` has it do.

A model's `sharded_state_dict` takes the rows that a rank has for a tensor of their own, and cuts gate and up within
them; so it is asked of whole parameters without values, and what it says is cut to the rows here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from converters.errors import UnsupportedError
from converters.tensors import Shape

if TYPE_CHECKING:
    from mbx.live.shards import Shard


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of a parameter of `shape` that this rank has, of copies of the same rows the `main` one or not."""

    shape: Shape
    first: int
    last: int
    main: bool

    def of(self, shard: Shard, *, main: bool) -> Shard | None:
        """What a shard of the whole parameter is in these rows; None where it has none of them.

        UnsupportedError for a shard that takes parts of rows in an order that is not theirs.
        """
        length = prod(self.shape[1:])
        own = shard.sizes[shard.stacked :]
        within = [stride if stride < length else 0 for stride in shard.strides]
        across = [at for at, stride in enumerate(shard.strides) if stride >= length and own[at] > 1]
        reach = shard.first % length + sum((size - 1) * stride for size, stride in zip(own, within, strict=True))
        if len(across) > 1 or reach >= length or any(shard.strides[at] % length for at in across):
            raise UnsupportedError(f"`{shard.key}` lies in `{shard.name}` across its rows, which FSDP has cut")
        row, base = shard.first // length, self.first * length
        if not across:
            inside = self.first <= row < self.last
            return replace(shard, first=shard.first - base, main=main and self.main) if inside else None
        (at,) = across
        step = shard.strides[at] // length
        low, high = (min(max(0, -((row - edge) // step)), own[at]) for edge in (self.first, self.last))
        if low >= high:
            return None
        dim = shard.stacked + at
        return replace(
            shard,
            offsets=_with(shard.offsets, dim, shard.offsets[dim] + low),
            sizes=_with(shard.sizes, dim, high - low),
            first=shard.first + low * shard.strides[at] - base,
            main=main and self.main,
        )


def is_cut(tensor: torch.Tensor) -> bool:
    """Whether a parameter is one of which ranks have parts."""
    return type(tensor).__name__ == "DTensor" or type(tensor.data).__name__ == "DTensor"


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a parameter: the memory itself."""
    return cast("torch.Tensor", cast("Any", tensor)._local_tensor) if is_cut(tensor) else tensor


def rows_of(name: str, tensor: torch.Tensor) -> Rows:
    """The rows that this rank has of a parameter; UnsupportedError where it is cut in another way."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    cut = cast("Any", tensor)
    if not all(type(one) is Replicate or (type(one) is Shard and one.dim == 0) for one in cut.placements):
        raise UnsupportedError(f"`{name}` is a DTensor of {cut.placements}, and not cut by rows alone")
    shape, offset = compute_local_shape_and_global_offset(cut.shape, cut.device_mesh, cut.placements)
    part = local(tensor)
    if tuple(shape) != tuple(part.shape) or hasattr(part, "__create_chunk_list__") or not part.is_contiguous():
        raise UnsupportedError(
            f"`{name}` is a DTensor of parts that are not even: models that Megatron-FSDP shards are not attached to",
            hint="save an fsdp_dtensor checkpoint and convert it",
        )
    at = cut.device_mesh.get_coordinate() or [0] * len(cut.placements)
    main = all(where == 0 for where, one in zip(at, cut.placements, strict=True) if type(one) is Replicate)
    return Rows(tuple(cut.shape), offset[0], offset[0] + shape[0], main)


@contextmanager
def whole(chunk: nn.Module) -> Iterator[Mapping[str, Rows]]:
    """The rows of each parameter that is cut, by name; inside, whole ones without values stand in their place.

    They take addresses and no memory: nobody writes or reads them.
    """
    cut: dict[str, Rows] = {}
    stand_ins: dict[int, nn.Parameter] = {}
    before: list[tuple[nn.Module, str, nn.Parameter]] = []
    for prefix, module in chunk.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and is_cut(parameter):
                full = f"{prefix}.{name}" if prefix else name
                cut[full] = rows_of(full, parameter)
                before.append((module, name, parameter))
    try:
        for module, name, parameter in before:
            if id(parameter) not in stand_ins:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                stand_in = stand_ins[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
                stand_in.__dict__.update(vars(parameter))
            module._parameters[name] = stand_ins[id(parameter)]
        yield cut
    finally:
        for module, name, parameter in before:
            module._parameters[name] = parameter


def _with(values: Shape, dim: int, value: int) -> Shape:
    return (*values[:dim], value, *values[dim + 1 :])
