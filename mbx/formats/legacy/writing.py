"""Lays out Megatron-LM's `torch` checkpoints: every rank's archive, its tensors placed before any is read."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from converters.checksums import combine
from converters.engine.plan import Draft
from converters.errors import LayoutError, UnsupportedError
from converters.mcore.cuts import cuts_of
from converters.mcore.keys import EMBEDDING, HEAD, parse_key
from converters.mcore.layout import Layout, count_of
from converters.mcore.local import Spec, extra_states, order, spell_local
from converters.mcore.pipeline import Stage
from converters.mcore.releases import CURRENT, Release
from converters.planning.reshard import with_counts
from converters.rows.expr import Value
from converters.rows.ops import ATOM_NAMES
from converters.tensors import Chunk, Shape, StoredTensor, nbytes_of
from mbx.formats.legacy.reading import WEIGHTS
from mbx.formats.placement import Framing, Order, Placement
from mbx.torchfile.archive_layout import ArchiveLayout, lay_out
from mbx.torchfile.torch_values import Namespace, TensorStub, row_major

_FINAL_NORMS = tuple(f"{norm}." for norm in CURRENT.final_norm.values())
#: What a rank's own state_dict has outside its layers.
_OUTSIDE = ("embedding.", "output_layer.", *_FINAL_NORMS)
_ATOMS = {name for names in ATOM_NAMES.values() for name in names}
_ATOM_ORDER = {(op, name): number for op, names in ATOM_NAMES.items() for number, name in enumerate(names)}
#: A part of a tensor: its key, and the box of it.
_Part = tuple[str, Shape, Shape]
#: The chunks, as (tensor, number), that follow one another in one storage.
Record = tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class RankPlacement(Placement):
    """Target tensors (a chunk in every file that repeats them), each file's archive and what fills its storages."""

    archives: Mapping[str, ArchiveLayout]
    records: Mapping[str, tuple[Record, ...]]

    def after(self, crcs: Mapping[str, Sequence[int]]) -> Iterator[Framing]:
        """Everything but the data."""
        for file, archive in self.archives.items():
            sums = []
            for record in self.records[file]:
                whole = 0
                for name, number in record:
                    tensor = self.tensors[name]
                    whole = combine(whole, crcs[name][number], nbytes_of(tensor.dtype, tensor.chunks[number].sizes))
                sums.append(whole)
            for at, data in archive.frames(sums):
                yield file, at, data


@dataclass(slots=True)
class _Local:
    """A tensor of one rank: parts that follow one another along the first dimension."""

    shape: Shape
    dtype: str
    parts: list[_Part] = field(default_factory=list)


def place(order: Order) -> RankPlacement:
    """Lay out `mp_rank_*/model_optim_rng.pt` of every rank under the plan's layout.

    Raises LayoutError for a layout whose shards the format has no names for, and UnsupportedError for a tensor that it
    has no place for, or where it is not known how one is cut.
    """
    sidecars, plan = order.sidecars, order.plan
    assert sidecars is not None
    drafts = {draft.name: draft for draft in plan.drafts}
    if odd := next((name for name in drafts if not parse_key(name).site and not name.startswith(_OUTSIDE)), None):
        raise UnsupportedError(
            f"`{odd}`: files of ranks hold language models alone, as Megatron-LM builds them",
            hint="‹format› torch_dist holds any model",
        )
    writer = _Writer(drafts, plan.layout, plan.config, sidecars.spec, order.release)
    return writer.place(sidecars.args, sidecars.iteration)


def rank_folder(layout: Layout, tp: int, pp: int, ep: int) -> str:
    """`mp_rank_TT[_PPP][_EEE]`."""
    name = f"mp_rank_{tp:02d}"
    if layout.pp > 1:
        name += f"_{pp:03d}"
    return name + f"_{ep:03d}" if layout.ep > 1 else name


class _Writer:
    def __init__(
        self, drafts: Mapping[str, Draft], layout: Layout, config: Mapping[str, Value], spec: Spec, release: Release
    ) -> None:
        if layout.tp % layout.expert_tp:
            raise LayoutError(
                f"‹etp› {layout.expert_tp} with ‹tp› {layout.tp}: legacy files are named by tensor rank, "
                "and one name would stand for several expert shards",
                hint="choose ‹etp› that divides ‹tp›, or ‹format› torch_dist",
            )
        self.drafts, self.layout, self.spec, self.release = drafts, layout, spec, release
        shapes = {name: draft.shape for name, draft in drafts.items()}
        self.cuts = cuts_of(shapes, cut=layout.tp > 1 or layout.expert_tp > 1)
        counted = with_counts(config, shapes)
        self.num_experts = count_of(counted, "num_moe_experts")
        self.num_layers, self.mtp_layers = count_of(counted, "num_layers"), count_of(counted, "mtp_num_layers")
        self.stages = layout.stages(self.num_layers, self.mtp_layers)
        self.tied = HEAD not in drafts
        self.by_layer: dict[int, list[str]] = {}
        for name, draft in drafts.items():
            parsed = parse_key(name)
            if parsed.site == "decoder":
                for layer in range(draft.shape[0]) if parsed.stacked else (parsed.layer or 0,):
                    self.by_layer.setdefault(layer, []).append(name)

    def place(self, args: Mapping[str, object], iteration: int) -> RankPlacement:
        layout = self.layout
        chunks: dict[str, list[Chunk]] = {name: [] for name in self.drafts}
        archives, records = {}, {}
        pairs = {(r % layout.tp, r // layout.expert_tp % layout.ep) for r in range(layout.stage_ranks)}
        for pp in range(layout.pp):
            for tp, ep in sorted(pairs):
                file = f"{rank_folder(layout, tp, pp, ep)}/{WEIGHTS}"
                models = [self._model(stage, tp, ep) for stage in self.stages if stage.pp == pp]
                archives[file], records[file] = self._archive(file, models, args, iteration, chunks)
        tensors = {n: StoredTensor(n, d.dtype, d.shape, tuple(chunks[n])) for n, d in self.drafts.items()}
        return RankPlacement(tensors, {file: a.total_bytes for file, a in archives.items()}, archives, records)

    def _archive(
        self,
        file: str,
        models: list[dict[str, _Local | None]],
        args: Mapping[str, object],
        iteration: int,
        chunks: dict[str, list[Chunk]],
    ) -> tuple[ArchiveLayout, tuple[Record, ...]]:
        sizes: list[int] = []
        held: list[_Local] = []

        def stub(local: _Local | None) -> TensorStub | None:
            if local is None:
                return None
            nbytes = nbytes_of(local.dtype, local.shape)
            sizes.append(nbytes)
            held.append(local)
            return TensorStub(local.dtype, local.shape, str(len(sizes) - 1), 0, row_major(local.shape), nbytes)

        states = [{name: stub(local) for name, local in model.items()} for model in models]
        top: dict[str, object] = {
            "args": Namespace(dict(args)),
            "checkpoint_version": self.release.checkpoint_version,
            "iteration": iteration,
        }
        if len(states) == 1:
            top["model"] = states[0]
        else:
            top |= {f"model{number}": state for number, state in enumerate(states)}
        archive = lay_out(top, sizes, WEIGHTS.removesuffix(".pt"))
        records = []
        for local, start in zip(held, archive.starts, strict=True):
            record, at = [], start
            for key, offsets, extent in local.parts:
                record.append((key, len(chunks[key])))
                chunks[key].append(Chunk(offsets, extent, file, at))
                at += nbytes_of(local.dtype, extent)
            records.append(tuple(record))
        return archive, tuple(records)

    def _model(self, stage: Stage, tp: int, ep: int) -> dict[str, _Local | None]:
        """The state_dict of one model chunk on one rank: a tensor, or None, by local name."""
        out: dict[str, _Local | None] = {}
        has_mtp = stage.mtp > 0
        if stage.embedding or has_mtp:
            self._add(out, "embedding.", tp)
        for layer in range(stage.first, stage.first + stage.layers):
            self._add_layer(out, self.by_layer.get(layer, []), layer, f"decoder.layers.{layer - stage.first}.", tp, ep)
        ends = stage.loss if not self.mtp_layers else stage.layers and stage.first + stage.layers == self.num_layers
        if ends:
            self._add(out, _FINAL_NORMS, tp)
        if has_mtp:
            for layer in range(self.mtp_layers):
                names = [n for n in self.drafts if (k := parse_key(n)).site == "mtp" and k.layer == layer]
                self._add_layer(out, names, layer, f"mtp.layers.{layer}.", tp, ep)
        if stage.loss:
            self._add(out, "output_layer.", tp)
            if self.tied and not (stage.embedding or has_mtp):
                embedding: dict[str, _Local | None] = {}
                self._add(embedding, EMBEDDING, tp)
                out[HEAD] = embedding[EMBEDDING]
            out.setdefault("output_layer._extra_state", None)
        return out

    def _add_layer(
        self, out: dict[str, _Local | None], names: list[str], layer: int, prefix: str, tp: int, ep: int
    ) -> None:
        """A layer's parameters in the order of its modules."""
        here: dict[str, _Local] = {}
        local, etp = self.num_experts // self.layout.ep, self.layout.expert_tp
        for name in sorted(names, key=lambda name: (order(_packed(parse_key(name).param)), _atom_number(name))):
            parsed = parse_key(name)
            param, at = _packed(parsed.param), (layer,) if parsed.stacked else ()
            if not parsed.experts:
                spelt = prefix + spell_local(param, None, self.spec, self.release)
                self._extend(here, spelt, name, at, tp, self.layout.tp)
                continue
            for expert in range(local):
                spelt = prefix + spell_local(param, expert, self.spec, self.release)
                self._extend(here, spelt, name, (*at, ep * local + expert), tp % etp, etp)
        self._finish(out, here)

    def _add(self, out: dict[str, _Local | None], prefix: str | tuple[str, ...], tp: int) -> None:
        """Parameters outside the layers whose names begin so."""
        here: dict[str, _Local] = {}
        for name in sorted(n for n in self.drafts if n.startswith(prefix)):
            self._extend(here, name, name, (), tp, self.layout.tp)
        self._finish(out, here)

    def _finish(self, out: dict[str, _Local | None], here: Mapping[str, _Local]) -> None:
        """Add parameters and, behind the last of each module, its `_extra_state`."""
        states = extra_states(list(here), self.spec, self.release)
        waiting = dict(states)
        last = {name.rpartition(".")[0]: name for name in here}
        for name in here:
            for state in [s for s in waiting if s.endswith("core_attention._extra_state") and _before(s, name)]:
                out[state] = _state(waiting.pop(state))
            out[name] = here[name]
            module = name.rpartition(".")[0]
            state = f"{module}._extra_state"
            if last[module] == name and state in waiting:
                out[state] = _state(waiting.pop(state))
        for state, is_tensor in waiting.items():
            out[state] = _state(is_tensor)

    def _extend(self, here: dict[str, _Local], spelt: str, name: str, index: Shape, rank: int, size: int) -> None:
        """Add to the local tensor `spelt` this rank's share of one entry of a tensor."""
        draft, cut = self.drafts[name], self.cuts[name]
        whole = draft.shape[len(index) :]
        lead = tuple(1 for _ in index)
        dim = cut.dim
        if dim is None or size == 1 or not whole:
            boxes = [(tuple(0 for _ in whole), whole)]
        else:
            halves = 2 if cut.gated else 1
            if whole[dim] % (size * halves):
                raise LayoutError(f"‹tp› {size} does not divide dimension {dim} of `{name}`, {list(whole)}")
            part = whole[dim] // (size * halves)
            boxes = []
            for half in range(halves):
                offsets, extent = [0] * len(whole), list(whole)
                offsets[dim], extent[dim] = (half * size + rank) * part, part
                boxes.append((tuple(offsets), tuple(extent)))
        rows = sum(extent[0] for _, extent in boxes) if whole else 0
        local = here.setdefault(spelt, _Local((0, *boxes[0][1][1:]) if whole else (), draft.dtype))
        if whole:
            local.shape = (local.shape[0] + rows, *local.shape[1:])
        local.parts += [(name, (*index, *offsets), (*lead, *extent)) for offsets, extent in boxes]


def _state(is_tensor: bool) -> _Local | None:
    return _Local((0,), "U8") if is_tensor else None


def _before(state: str, name: str) -> bool:
    """Whether `name` is in the attention module whose core_attention comes first."""
    return name.startswith(state.removesuffix("core_attention._extra_state"))


def _packed(param: str) -> str:
    """A parameter without the name of the atom that torch_dist stores apart."""
    stem, _, leaf = param.rpartition(".")
    return stem if leaf in _ATOMS and re.search(r"(in_proj|conv1d)\.(weight|bias)$", stem) else param


def _atom_number(name: str) -> int:
    leaf = name.rpartition(".")[2]
    op = ("mamba_" if ".mixer." in name else "gdn_") + ("conv" if "conv1d" in name else "in")
    return _ATOM_ORDER.get((op, leaf), 0)
