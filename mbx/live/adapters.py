"""Adapters of a live model: their factors under PEFT's names, and the model with them merged."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from converters.adapters.megatron import read_megatron
from converters.adapters.merge import updates_of
from converters.adapters.peft_keys import PREFIX, Spelling
from converters.adapters.respell import plan_to_peft
from converters.adapters.settings import parse_settings
from converters.adapters.sites import Adapted, spellings
from converters.engine.boxes import Box, boxes_of, check_cover
from converters.engine.lowrank import LowRank
from converters.engine.plan import Plan
from converters.errors import UnsupportedError, UsageError
from converters.mcore.keys import parse_key
from converters.planning.pairing import pair_by_name
from converters.rows.config_map import environment
from converters.rows.expr import Value
from converters.tensors import Shape
from converters.torch_casts import TORCH_DTYPES
from mbx.formats import hf
from mbx.formats.adapter_folder import Adapter, Base
from mbx.live.exchange import World, exchange, gather_objects
from mbx.live.held import Held
from mbx.live.routing import TensorSpec
from mbx.live.sending import BUCKET, Sender, To
from mbx.live.shards import Model
from mbx.live.source import Source
from mbx.run.adapters import plan_factors
from mbx.run.job import Job, Options

if TYPE_CHECKING:
    from mbx.live.planned import Stream

#: Whose spelling of an adapter: PEFT's, as its folders have it; vLLM's, where all experts of a layer are one adapter;
#: SGLang's, where each expert has its own.
AdapterLayout = Literal["peft", "vllm", "sglang"]
#: What tells SGLang that a factor is of one expert.
_EXPERT = re.compile(r"experts\.\d+\.")
#: How parameters of B are called at their ends, in either spelling.
_B = ("lora_b", "linear_out.weight")


class Adapters:
    """The adapters of `model`, matched with the rows of its table; made by one exchange of objects. Collective."""

    def __init__(self, model: Model, source: Source) -> None:
        self.source = source
        world = exchange(model.adapters, (source.table.digest, source.config, "adapters"))
        if not world.sources:
            raise UsageError("the model has no adapters")
        self.world, self.sender = world, Sender(model, world)
        env = environment(source.fields)
        self.adapted = read_megatron(source.table, source.fields, env, world.sources)
        self.scales: dict[tuple[str, Shape], float] = {}
        for part in gather_objects(_scales(model, world)):
            self.scales.update(part)
        self._plans: dict[str, Factors] = {}

    def factors(self, layout: AdapterLayout) -> Factors:
        """All factors in a spelling; UnsupportedError where it cannot say them."""
        if layout not in ("peft", "vllm", "sglang"):
            raise UsageError(f"‹layout› {layout!r} is not known", hint="choices: peft, vllm, sglang")
        if layout not in self._plans:
            experts = [found for found in self.adapted if found.row.expert is not None]
            recorded = None
            if experts and layout != "peft":
                recorded = self._together(experts) if layout == "vllm" else self._apart(experts)
            s = self.source
            plan = plan_to_peft(s.table, s.fields, self.adapted, self.world.sources, recorded)
            self._plans[layout] = Factors.of(plan)
        return self._plans[layout]

    def _together(self, experts: list[Adapted]) -> set[str] | None:
        """Names of PEFT's by which experts are spelt all in one, where the table has a parameter of all."""
        rows = (row for found in experts for row in spellings(self.source.table, found.row))
        names = {f"{PREFIX}{row.hf[0].rpartition('.')[0]}.lora_A.weight" for row in rows if row.spec.stacked}
        return names or None

    def _apart(self, experts: list[Adapted]) -> set[str]:
        """Names of PEFT's by which each expert is spelt for itself, as SGLang reads them (`lora/mem_pool.py`).

        It knows an expert's factor by `experts.N.` in its name. PEFT's factors of a parameter of all experts, whose
        rows are ranks times experts, it leaves out without a word (sgl-project/sglang#27381).
        """
        names = set[str]()
        for found in experts:
            rows = [row for row in spellings(self.source.table, found.row) if not row.spec.stacked]
            own = [name for row in rows for name in row.hf if _EXPERT.search(name)]
            if not own:
                raise UnsupportedError(
                    f"‹layout› sglang: `{found.row.mcore}` is adapted, and SGLang reads an adapter of experts under "
                    f"the name of each, of which table `{self.source.table.name}` has none",
                    hint="export ‹merged› weights to SGLang, or adapters to an engine that reads ‹layout› peft",
                )
            names.update(f"{PREFIX}{name.removesuffix('.weight')}.lora_A.weight" for name in own)
        return names

    def export(self, layout: AdapterLayout, to: To, bucket: int) -> Iterator[tuple[str, torch.Tensor | None]]:
        """Every factor by its name, whole; see `Live.export`. Collective."""
        found = self.factors(layout)
        receivers = self.sender.receivers(found.boxes, to)
        for one in self.sender.buckets(found.boxes, found.specs, receivers, bucket, key=(layout, to, bucket)):
            yield from one

    def job(self, target: Path, config: Mapping[str, Value], options: Options) -> Job:
        """The plan of a PEFT folder; `config` are adapter_config.json's keys, `r` and `lora_alpha` among them."""
        s, folder = self.source, self.source.folder or Path()
        rows = [(found, site) for found in self.adapted for site in found.sites]
        settings = replace(parse_settings(config), dora=any(site.m is not None for _, site in rows))
        base = Base(folder, s.config, s.table, s.fields, folder / hf.CONFIG if s.folder else None)
        held = (self.world.sources, settings, config, self.adapted, self.scales)
        return plan_factors(Adapter(folder, folder, *held, {}, {}, Spelling({}), None, None), target, options, base)

    def held(self, layout: AdapterLayout) -> Iterator[Held]:
        """What this rank holds of the factors."""
        found = self.factors(layout)
        return self.sender.held(found.specs, found.boxes)

    def gathered(self) -> dict[str, torch.Tensor]:
        """Every factor under Megatron's own name, whole, on all ranks. Collective."""
        sources = self.world.sources
        found = Factors.of(pair_by_name(sources, sources, lambda key: parse_key(key).depth).plan)
        receivers = self.sender.receivers(found.boxes, "all")
        pairs = (pair for one in self.sender.buckets(found.boxes, found.specs, receivers, BUCKET) for pair in one)
        return {name: tensor for name, tensor in pairs if tensor is not None}

    def updates(self, stream: Stream) -> Mapping[tuple[str, Shape], LowRank]:
        """What the adapters add to each tensor of a stream, by its name and entry."""
        shapes = {spec.name: spec.shape for spec in stream.specs}
        s = self.source
        return updates_of(s.table, s.fields, self.adapted, self.scales, shapes, megatron=False)


@dataclass(frozen=True, slots=True)
class Factors:
    """Tensors of an adapter in their order, and the boxes that make each."""

    specs: tuple[TensorSpec, ...]
    boxes: Mapping[str, tuple[Box, ...]]

    @classmethod
    def of(cls, plan: Plan) -> Factors:
        boxes: dict[str, list[Box]] = {draft.name: [] for draft in plan.drafts}
        for box in boxes_of(plan):
            boxes[box.tensor].append(box)
        check_cover(plan, boxes)
        specs = tuple(TensorSpec(d.name, d.dtype, d.shape) for d in plan.drafts)
        return cls(specs, {name: tuple(own) for name, own in boxes.items()})


class Merger:
    """Adds adapters to whole tensors: in fp32, rounded once, as PEFT merges."""

    def __init__(self, adapters: Adapters, stream: Stream) -> None:
        self._factors = adapters.gathered()
        self._updates: dict[str, list[tuple[Shape, LowRank]]] = {}
        for (name, index), update in adapters.updates(stream).items():
            self._updates.setdefault(name, []).append((index, update))

    def matrix(self, name: str, index: Shape) -> torch.Tensor:
        """An adapter's matrix, fp32 [rows, cols]."""
        found = self._factors[name][index].float()
        return found.reshape(len(found), -1)

    def merged(self, name: str, tensor: torch.Tensor, dtype: str) -> torch.Tensor:
        """The tensor with what is added to it, as `dtype`."""
        if name not in self._updates:
            return tensor.to(TORCH_DTYPES[dtype]) if tensor.is_floating_point() else tensor
        total = tensor.to(torch.float32, copy=True)
        for index, update in self._updates[name]:
            entry = total[index]
            update.add(self, entry.view(entry.shape[0], prod(entry.shape[1:])))
        return total.to(TORCH_DTYPES[dtype])


def _scales(model: Model, world: World) -> dict[tuple[str, Shape], float]:
    """What this rank's products are multiplied by, by the key and entry of B."""
    chunks = model.chunks()
    out: dict[tuple[str, Shape], float] = {}
    for shards in world.mine.values():
        shard = shards[0]
        if shard.key.rpartition(".")[2].startswith(_B[0]) or shard.key.endswith(_B[1]):
            depth = parse_key(shard.key).depth
            scale = _scale(chunks[shard.chunk], shard.name)
            for entry in range(prod(shard.sizes[:depth])):
                out[shard.key, _entry(shard.offsets[:depth], shard.sizes[:depth], entry)] = scale
    return out


def _entry(offsets: Shape, sizes: Shape, number: int) -> Shape:
    out: list[int] = []
    for first, size in zip(reversed(offsets), reversed(sizes), strict=True):
        number, at = divmod(number, size)
        out.append(first + at)
    return tuple(reversed(out))


def _scale(chunk: nn.Module, parameter: str) -> float:
    """A factor's scale as the module around it has it: `mbx train`'s, PEFT's, or Megatron-Bridge's alpha and dim."""
    path, _, leaf = parameter.rpartition(".")
    while path:
        module = chunk.get_submodule(path)
        if callable(scale_of := getattr(module, "scale_of", None)):
            return float(scale_of(leaf))
        if isinstance(scaling := getattr(module, "scaling", None), Mapping) and len(scaling) == 1:
            return float(next(iter(scaling.values())))
        alpha, rank = getattr(module, "alpha", None), getattr(module, "dim", None)
        if isinstance(alpha, int | float) and isinstance(rank, int) and rank:
            return alpha / rank
        path = path.rpartition(".")[0]
    raise UnsupportedError(f"`{parameter}`: no module around it says what the adapter is scaled by")
