"""What a rank's model holds: shards of global tensors, as the model's own `sharded_state_dict` places them.

A shard remembers the parameter that it lies in, and where, not the memory: parameters of a live model move between the
GPU and the host, and are views into buffers that come and go.
"""

from __future__ import annotations

import math
import re
import weakref
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from converters.adapters.megatron import MARKS
from converters.errors import CoverageError, UnsupportedError, UsageError
from converters.tensors import Shape
from converters.torch_casts import TORCH_DTYPES
from mbx.live import fsdp

if TYPE_CHECKING:
    from mbx.models.megatron.core.sharding import ShardedTensor

#: Values by parameter name, for a model of one chunk, or one such mapping a chunk.
Values = Mapping[str, torch.Tensor] | Sequence[Mapping[str, torch.Tensor]]

#: A factor by PEFT's name in a module, behind whose `lora_A` stands how the adapter is called.
_PEFT = re.compile(r"(.+)\.lora_([AB])\.[^.]+\.weight")

#: What parameters and buffers are of, and how safetensors names it.
DTYPES = {TORCH_DTYPES[name]: name for name in ("BF16", "F16", "F32", "F64", "I64", "I32", "BOOL")}


@dataclass(frozen=True, slots=True)
class Shard:
    """A box of the global tensor `key`, `offsets` and `sizes` in elements of its `shape`, and where it lies here.

    The first `stacked` dimensions pick an entry. `name` is its parameter (or buffer) in chunk number `chunk` of the
    model; of that one's memory it takes `strides` from element `first` on, one for each dimension behind the stacked.
    `main` says that this rank's copy is the one that a checkpoint would store.
    """

    key: str
    dtype: str
    shape: Shape
    offsets: Shape
    sizes: Shape
    stacked: int
    main: bool
    chunk: int
    name: str
    strides: Shape
    first: int


class Model:
    """The chunks of a live model, unwrapped, and their shards: `base` ones, and those of `adapters`.

    It holds no reference that keeps the model alive: once it is gone, or rebuilt, every access is a UsageError.
    """

    def __init__(self, chunks: Sequence[nn.Module]) -> None:
        bare = [unwrap(chunk) for chunk in chunks]
        self._chunks = [weakref.ref(chunk) for chunk in bare]
        self._parameters: list[dict[str, weakref.ref[nn.Parameter]]] = []  # buffers are replaced when models move
        every: list[Shard] = []
        for number, chunk in enumerate(bare):
            self._parameters.append({name: weakref.ref(one) for name, one in chunk.named_parameters()})
            every += _shards(chunk, number)
        self.base = [shard for shard in every if not any(mark in shard.key for mark in MARKS)]
        self.adapters = [shard for shard in every if any(mark in shard.key for mark in MARKS)]
        held: Counter[tuple[int, str]] = Counter()
        for shard in every:
            held[shard.chunk, shard.name] += math.prod(shard.sizes)
        left = [
            name
            for number, chunk in enumerate(bare)
            for name, parameter in chunk.named_parameters()
            if held[number, name] < fsdp.local(parameter).numel()
        ]
        if left:
            raise CoverageError(
                f"{len(left)} parameter(s) are in no checkpoint of the model, or in part, first `{left[0]}`",
                details=left,
            )

    def chunks(self) -> list[nn.Module]:
        """The bare chunks; UsageError where the model is gone, or a parameter of it is no longer the same."""
        found = [ref() for ref in self._chunks]
        for chunk, parameters in zip(found, self._parameters, strict=True):
            if chunk is None:
                raise UsageError("the model is gone that this was attached to", hint="attach to the new one")
            named = dict(chunk.named_parameters())
            for name, ref in parameters.items():
                if (known := ref()) is None or named.get(name) is not known:
                    raise UsageError(
                        f"`{name}` is not the parameter that was there when this was attached: the model was rebuilt",
                        hint="attach to it again",
                    )
        return cast("list[nn.Module]", found)

    def device(self) -> torch.device:
        """Where collectives move this rank's values."""
        if torch.distributed.is_initialized() and "nccl" in torch.distributed.get_backend():
            return torch.device("cuda", torch.cuda.current_device())
        return next((p.device for chunk in self.chunks() for p in chunk.parameters()), torch.device("cpu"))

    def views(self, values: Values | None = None) -> Views:
        """Access to this rank's shards as they are now, or in `values`, copies of parameters by name."""
        return Views([_named(chunk) for chunk in self.chunks()], values)


class Views:
    """This rank's shards as tensors: views of parameters, or of `values` that stand for them."""

    def __init__(self, named: Sequence[Mapping[str, torch.Tensor]], values: Values | None = None) -> None:
        self._named = named
        self._values: Sequence[Mapping[str, torch.Tensor]] | None = None
        if values is not None:
            self._values = [values] if isinstance(values, Mapping) else values
            if len(self._values) != len(named):
                raise UsageError(f"`values` are of {len(self._values)} model chunks; this rank has {len(named)}")

    def __getitem__(self, shard: Shard) -> torch.Tensor:
        """A shard in its `sizes`, stacked ones included."""
        return view_of_shard(self.plain(shard), shard)

    def plain(self, shard: Shard) -> torch.Tensor:
        """The parameter that a shard lies in, as plain values: the memory itself, unless it has them as codes."""
        return self.taken(shard)[0]

    def taken(self, shard: Shard) -> tuple[torch.Tensor, bool]:
        """The same, and whether it was computed: then it is of no use behind the copy that it was taken for."""
        owner = self.owner(shard)
        computed = is_quantised(owner)
        return (owner.dequantize() if computed else owner), computed

    def memory(self, shard: Shard) -> torch.Tensor:
        """The same, to write into: of a parameter that holds values, and not codes."""
        return view_of_shard(self.owner(shard), shard)

    def parameter(self, shard: Shard) -> torch.Tensor:
        """The parameter that a shard lies in, itself: what one of codes keeps beside them is of no other tensor."""
        return fsdp.local(self._named[shard.chunk][shard.name])

    def owner(self, shard: Shard) -> torch.Tensor:
        """The parameter that a shard lies in, or what stands for it; UsageError where it has no memory."""
        found = self._found(shard)
        if is_quantised(found):  # its memory is that of its codes
            return found
        if found.device.type == "meta" or found.untyped_storage().nbytes() == 0:
            raise UsageError(
                f"`{shard.name}` has no memory: the model is offloaded",
                hint="load it first, or give `values`, copies of its parameters by name",
            )
        return found

    def _found(self, shard: Shard) -> torch.Tensor:
        live = fsdp.local(self._named[shard.chunk][shard.name].detach())
        if self._values is None:
            return live
        held = self._values[shard.chunk]
        given = next((held[name] for name in (shard.name, f"module.{shard.name}") if name in held), None)
        if given is None:
            raise UsageError(f"`values` lack `{shard.name}`")
        if not given.is_contiguous() or given.numel() <= _last(shard):
            raise UsageError(f"`values` have `{shard.name}` in another shape than the model")
        return given.detach()


def is_quantised(owner: torch.Tensor) -> bool:
    """Whether a parameter is one of Transformer Engine's FP8 tensors: codes and scales."""
    return hasattr(owner, "_quantizer") or type(owner).__name__.startswith("Float8")


def view_of_shard(owner: torch.Tensor, shard: Shard) -> torch.Tensor:
    """A shard, in its `sizes`, of a tensor that is its parameter or stands for it."""
    own = shard.sizes[shard.stacked :]
    return owner.as_strided(own, shard.strides, owner.storage_offset() + shard.first).view(shard.sizes)


def _last(shard: Shard) -> int:
    """The last element of its parameter that a shard takes."""
    own = shard.sizes[shard.stacked :]
    return shard.first + sum((size - 1) * stride for size, stride in zip(own, shard.strides, strict=True))


def unwrap(model: nn.Module) -> nn.Module:
    """The GPTModel or HybridModel inside DistributedDataParallel and Float16Module, which call it `module`."""
    while isinstance(inner := getattr(model, "module", None), nn.Module):
        model = inner
    return model


def _named(chunk: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(chunk.named_parameters(remove_duplicate=False)), **dict(chunk.named_buffers())}


def _shards(chunk: nn.Module, number: int) -> list[Shard]:
    from mbx.models.megatron.weights import sharded_weights

    for name, tensor in _named(chunk).items():
        own = fsdp.local(tensor)
        if own.numel() and own.untyped_storage().nbytes() == 0:
            raise UsageError(f"`{name}` has no memory: the model is offloaded", hint="attach while it is loaded")
    with fsdp.whole(chunk) as cut:
        places, found = _Places(_named(chunk)), []
        for leaf in _leaves(sharded_weights(chunk), places):
            if leaf[0].data is None:
                continue
            shard = _shard(leaf, places, number)
            rows = cut.get(shard.name)
            if rows is None:
                found.append(shard)
            elif (part := rows.of(shard, main=_is_main(leaf[0].replica_id))) is not None:
                found.append(part)
    return found


def _is_main(replica_id: int | tuple[int, ...]) -> bool:
    """Whether a copy counts, of those that are not for data parallelism: its ranks have parts, and no copies."""
    return not any(replica_id[:-1]) if isinstance(replica_id, tuple) else True


class _Places:
    """Finds the parameter that a tensor lies in: by itself, or by its address, which FP8 parameters have none of."""

    def __init__(self, named: Mapping[str, torch.Tensor]) -> None:
        self._known = {id(tensor): (name, tensor) for name, tensor in named.items()}
        spans = []
        for name, tensor in named.items():
            if tensor.numel() and not is_quantised(tensor):
                spans.append((tensor.data_ptr(), tensor.numel() * tensor.element_size(), name, tensor))
        spans.sort(key=lambda span: span[0])
        self._spans, self._starts = spans, [span[0] for span in spans]

    def owner(self, tensor: torch.Tensor, key: str) -> tuple[str, torch.Tensor, int]:
        """Name and tensor of the parameter, and the element of it at which `tensor` begins.

        UnsupportedError for a tensor that lies in none: it was computed, and nothing that it says reaches the model.
        """
        if id(tensor) in self._known:
            return *self._known[id(tensor)], 0
        at = bisect_right(self._starts, tensor.data_ptr()) - 1
        if at < 0 or tensor.data_ptr() >= self._starts[at] + self._spans[at][1]:
            raise UnsupportedError(f"`{key}` is no part of a parameter: the model computes it for its checkpoints")
        start, _, name, owner = self._spans[at]
        return name, owner, (tensor.data_ptr() - start) // owner.element_size()


#: A sharded tensor, the tensor that its parameter is found by, and the element of that one at which it begins.
_Leaf = tuple["ShardedTensor", torch.Tensor, int]


def _leaves(value: object, places: _Places) -> Iterator[_Leaf]:
    from mbx.models.megatron.core.sharding import ShardedTensor, ShardedTensorFactory

    if isinstance(value, ShardedTensorFactory):
        # Of a stand-in without memory, whose views tell their offsets: parts of an FP8 parameter would be copies.
        whole: torch.Tensor = value.data
        stand_in = torch.empty_strided(whole.shape, whole.stride(), dtype=whole.dtype, device="meta")
        built = value.build_fn(value.key, stand_in, value.replica_id, value.flattened_range)
        for sharded, part, first in _leaves(built, places):
            yield sharded, whole, int(part.storage_offset()) + first
    elif isinstance(value, ShardedTensor):
        tensor = value.data
        yield value, tensor, 0
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _leaves(inner, places)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _leaves(inner, places)


def _peft_key(key: str) -> str:
    """The key of a factor that PEFT put on a linear, as Megatron-Bridge has it: they mean the same."""
    found = _PEFT.fullmatch(key)
    return key if found is None else f"{found[1]}.adapter.linear_{'in' if found[2] == 'A' else 'out'}.weight"


def _shard(leaf: _Leaf, places: _Places, number: int) -> Shard:
    from mbx.models.megatron.core.sharding import is_main_replica

    sharded, found, first = leaf
    value = cast("Any", sharded)
    name, owner, at = places.owner(found, value.key)
    data: torch.Tensor = value.data
    if data.dtype not in DTYPES:
        raise UnsupportedError(f"`{name}` is of {data.dtype}, which no checkpoint of weights holds")
    return Shard(
        _peft_key(value.key.replace(".base_layer.", ".")),
        DTYPES[owner.dtype],
        tuple(value.global_shape),
        tuple(value.global_offset),
        (1,) * value.prepend_axis_num + tuple(data.shape),
        value.prepend_axis_num,
        is_main_replica(value.replica_id),
        number,
        name,
        tuple(data.stride()),
        at + first,
    )
