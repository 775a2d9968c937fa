"""An optimizer's state by parameter: what a checkpoint holds of it does not depend on how many processes there were.

Each trained weight's moments, and in 16 bits its fp32 copy, are stored in the weight's own shape under
`optimizer.state.KIND.KEY`, as Megatron Core's `fully_reshardable` does. Its own writer of that form gathers the whole
state on every rank and knows Adam alone; here one rank holds a bucket at a time. Whatever optimizer reads the state,
cut over data-parallel ranks or not, takes from it what it has to hold.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from converters.errors import StorageError
from mbx.train.model.parallel import on_any_rank

if TYPE_CHECKING:
    from mbx.models.megatron.core.training import MegatronOptimizer

#: The fp32 copy of a 16-bit weight, Adam's moments, Muon's.
_MAIN, _MOMENTS, _MOMENTUM = "param", ("exp_avg", "exp_avg_sq"), "momentum_buffer"
#: In the common state, by which readers tell this form from Megatron Core's.
BY_PARAMETER = {"by": "parameter"}


def stored(optimizer: MegatronOptimizer, weights: Mapping[str, object], *, half: bool) -> dict[str, object]:
    """The state as a sharded state dict; `weights` are the model's, `half` says that they have fp32 copies.

    Collective: what is cut over data-parallel ranks is gathered, a bucket and a kind on one rank each.
    """
    shards = _by_parameter(weights)
    state = {
        f"{number}.{kind}.{index}": _sharded(shards, parameter, kind, whole, cut=hasattr(one, "gbuf_ranges"))
        for number, one in enumerate(_inner(optimizer))
        for kind in _kinds(one, half)
        for index, (parameter, whole) in enumerate(_whole(one, kind))
    }
    plain = {**BY_PARAMETER, "step": _step(optimizer), "grad_scaler": _scaler_state(optimizer)}
    return {"state": state, "optimizer": plain}


def wanted(optimizer: MegatronOptimizer, weights: Mapping[str, object], *, half: bool) -> dict[str, object]:
    """The same, empty, for what this rank has to hold: each weight whole of which it keeps a part."""
    shards = _by_parameter(weights)
    return {
        f"{number}.{kind}.{index}": _sharded(shards, parameter, kind, torch.empty(parameter.shape), cut=False)
        for number, one in enumerate(_inner(optimizer))
        for kind in _kinds(one, half)
        for index, (parameter, _, _) in enumerate(_held(one, kind))
    }


def restore(optimizer: MegatronOptimizer, state: Mapping[str, torch.Tensor], common: object, *, half: bool) -> None:
    """Fill the optimizer from what was loaded for `wanted`, and from the common state's part of it."""
    step, scaling = _common(common)
    with torch.no_grad():
        for number, one in enumerate(_inner(optimizer)):
            for kind in _kinds(one, half):
                for index, (_, held, part) in enumerate(_held(one, kind)):
                    held.copy_(state[f"{number}.{kind}.{index}"].flatten()[part].view(held.shape))
            _set_step(one, step)
            if scaling and (scaler := getattr(one, "grad_scaler", None)):
                scaler.load_state_dict({**scaling, "scale": torch.tensor([scaling["scale"]])})


def _common(common: object) -> tuple[float, dict[str, float]]:
    """The step, and the loss scale of fp16, from the common state; StorageError where they are not numbers."""
    try:
        step, scaling = common["step"], common["grad_scaler"]  # type: ignore[index]
        numbers = {str(name): value for name, value in scaling.items()}
        for value in (step, *numbers.values()):
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise ValueError(f"{value!r} is no number")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise StorageError(f"the optimizer's part of the common state is damaged: {error}") from error
    return float(step), numbers


def allocate(optimizer: MegatronOptimizer) -> None:
    """Give Adam and Muon the moments that a first step would."""
    for one in _inner(optimizer):
        inner = one.optimizer
        for group in inner.param_groups:
            for parameter in group["params"]:
                if _is_muon(one):
                    inner.state[parameter].setdefault(_MOMENTUM, torch.zeros_like(parameter, dtype=torch.float32))
                elif type(inner).__name__.lower().endswith(("adam", "adamw")) and not inner.state[parameter]:
                    moments = {name: torch.zeros_like(parameter, dtype=torch.float32) for name in _MOMENTS}
                    plain = {"step": torch.tensor(0.0)} if isinstance(inner, torch.optim.AdamW) else {}
                    inner.state[parameter] = {**plain, **moments}


def _kinds(one: Any, half: bool) -> tuple[str, ...]:
    own = (_MOMENTUM,) if _is_muon(one) else _MOMENTS
    return (_MAIN, *own) if half else own


def _is_muon(one: Any) -> bool:
    return type(one.optimizer).__name__.endswith("Muon")


def _inner(optimizer: MegatronOptimizer) -> list[Any]:
    """Megatron Core's optimizers in a chain of them, those with nothing to train left out."""
    chain = getattr(optimizer, "chained_optimizers", [optimizer])
    return [one for one in chain if not getattr(one, "is_stub_optimizer", False)]


def _by_parameter(weights: Mapping[str, object]) -> dict[int, Any]:
    """The sharded tensors (or factories of them) of a model by the parameter that each is of."""
    from mbx.models.megatron.core.sharding import extract_sharded_tensors_and_factories, nested_values

    sharded, _ = extract_sharded_tensors_and_factories(dict(weights))
    return {id(one.data): one for one in nested_values(sharded)}


def _sharded(shards: Mapping[int, Any], parameter: torch.Tensor, kind: str, data: torch.Tensor, *, cut: bool) -> Any:
    """`data` under the key and in the place of the parameter's own shard; where it was `cut`, one replica has it."""
    from mbx.models.megatron.core.sharding import ShardedTensor

    own = shards[id(parameter)]
    named: dict[str, Any] = {"key": f"optimizer.state.{kind}.{own.key}", "data": data}
    if isinstance(own, ShardedTensor):
        named["dtype"] = data.dtype
    if cut:
        named["replica_id"] = (*own.replica_id[:-1], 0)
    return replace(own, **named)


def _pairs(one: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(model parameter, what the optimizer steps) of an optimizer that is not cut."""
    if hasattr(one, "float16_groups"):
        for models, mains in (
            (one.float16_groups, one.fp32_from_float16_groups),
            (one.fp32_from_fp32_groups, one.fp32_from_fp32_groups),
        ):
            for group, main in zip(models, mains, strict=True):
                yield from zip(group, main, strict=True)
    else:
        for group in one.optimizer.param_groups:
            yield from ((parameter, parameter) for parameter in group["params"])


def _held(one: Any, kind: str) -> Iterator[tuple[torch.Tensor, torch.Tensor, slice]]:
    """(model parameter, what this rank holds of its state, where that lies in the flattened parameter)."""
    if not hasattr(one, "gbuf_ranges"):
        pairs = ((model, main, slice(0, model.numel())) for model, main in _pairs(one))
    else:
        pairs = (
            (model, _main(one, model), slice(ranges["param"].start, ranges["param"].end))
            for _, range_map, _ in _buckets(one)
            for model, ranges in range_map["param_map"].items()
        )
    for model, main, part in pairs:
        if kind == _MAIN:
            if (
                main.untyped_storage().data_ptr() != model.untyped_storage().data_ptr()
            ):  # an fp32 weight among 16-bit ones has no copy
                yield model, main, part
        elif kind in (state := one.optimizer.state[main]):
            yield model, state[kind], part


def _whole(one: Any, kind: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(model parameter, its whole state) of what this rank is to store."""
    if not hasattr(one, "gbuf_ranges"):
        yield from ((model, held) for model, held, _ in _held(one, kind))
        return
    group = one.data_parallel_group
    ranks = torch.distributed.get_process_group_ranks(group)
    for number, (bucket, range_map, places) in enumerate(_buckets(one)):
        target = ranks[(number + _kinds(one, True).index(kind)) % len(ranks)]
        local = torch.zeros(bucket.grad_data.numel() // len(ranks), device=bucket.grad_data.device)
        has = False
        for model, ranges in range_map["param_map"].items():
            main = _main(one, model)
            held = main if kind == _MAIN else one.optimizer.state[main].get(kind)
            if held is not None:
                has = True
                local[ranges["gbuf_local"].start : ranges["gbuf_local"].end] = held.flatten()
        if not on_any_rank(has, local.device, group):  # plain SGD has no moments
            continue
        mine = torch.distributed.get_rank() == target
        parts = [torch.empty_like(local) for _ in ranks] if mine else None
        torch.distributed.gather(local, parts, dst=target, group=group)
        if parts is None:
            continue
        world = torch.cat(parts).cpu()
        for model in bucket.params_list:  # by the buffer's own map, which knows of the gaps between them
            start, end, _ = places[model]
            yield model, world[start - bucket.offset : end - bucket.offset].view(model.shape).clone()


def _buckets(one: Any) -> Iterator[tuple[Any, Any, Any]]:
    """(bucket of gradients, this rank's ranges in it, each weight's place in the buffer) of a distributed optimizer.

    In the same order on every rank.
    """
    for buffer, maps in zip(one.buffers, one.gbuf_ranges, strict=True):
        for range_maps in maps.values():
            for bucket, range_map in zip(buffer.buckets, range_maps, strict=True):
                yield bucket, range_map, buffer.param_index_map


def _main(one: Any, model: torch.Tensor) -> torch.Tensor:
    """What a distributed optimizer steps of a model parameter on this rank."""
    group, order = one.model_param_group_index_map[model]
    main: torch.Tensor = one.optimizer.param_groups[group]["params"][order]
    return main


def _step(optimizer: MegatronOptimizer) -> float:
    """Steps taken, which PyTorch counts with a parameter and Transformer Engine with a group."""
    for one in _inner(optimizer):
        for group in one.optimizer.param_groups:
            counts = (one.optimizer.state[p].get("step") for p in group["params"])
            if (count := next((c for c in counts if c is not None), group.get("step"))) is not None:
                return float(count)
    return 0.0


def _set_step(one: Any, step: float) -> None:
    for group in one.optimizer.param_groups:
        own = [state for p in group["params"] if "step" in (state := one.optimizer.state[p])]
        for state in own:  # a counter each: one shared by all would be advanced by every one
            state["step"] = torch.tensor(step)
        if not own:
            group["step"] = int(step)


def _scaler_state(optimizer: MegatronOptimizer) -> dict[str, float]:
    """The loss scale of fp16 in plain numbers; empty without."""
    scalers = (getattr(one, "grad_scaler", None) for one in _inner(optimizer))
    scaler = next((s for s in scalers if s), None)
    return {k: float(v) if k == "scale" else int(v) for k, v in (scaler.state_dict() if scaler else {}).items()}
