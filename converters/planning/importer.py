"""Plans Hugging Face → Megatron Core (torch_dist keys)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from converters.codecs import quantization_of
from converters.codecs.decode import Encoded, decoded_view, discarded
from converters.engine.plan import STORABLE, Draft, Entry, Plan, Unit, row_form, target_dtype, with_heads_present
from converters.engine.regions import Move, Region, matrix
from converters.errors import CoverageError
from converters.mcore import torch_dist
from converters.mcore.layout import Layout, RankMap
from converters.mcore.layout import check as check_layout
from converters.planning.placing import place_boxes
from converters.rows.config_map import environment
from converters.rows.config_spelling import canonical
from converters.rows.coverage import NO_WAIVERS, Ledger, Waivers, reject_twice, settle
from converters.rows.expr import Value
from converters.rows.isos import inexpressible_groups, inexpressible_rope
from converters.rows.ops import Dims, Form
from converters.rows.pack import Slot
from converters.rows.shapes import check_shape
from converters.rows.table import Row, Table
from converters.tensors import Shape, StoredTensor


@dataclass(slots=True)
class _Target:
    """A Megatron Core tensor as its rows announce it, entry by entry."""

    dtype: str
    stack: Shape
    shape: Shape
    form: Form
    atoms: tuple[int, ...] | None
    entries: set[tuple[int, ...]] = field(default_factory=set)


def plan_import(
    table: Table,
    hf_config: Mapping[str, Value],
    stored: Mapping[str, StoredTensor],
    layout: Layout,
    *,
    dtype: str | None = None,
    waivers: Waivers = NO_WAIVERS,
    allow_unused_keys: tuple[str, ...] = (),
) -> Plan:
    """Plan that turns `stored` (Hugging Face names, quantised or not) into a torch_dist checkpoint under `layout`.

    `dtype` is a storage dtype to cast floats to, None keeps each tensor's own. Raises CoverageError unless
    every tensor and config key is accounted for, LayoutError where the layout does not fit.
    """
    sources, encoded = decoded_view(stored, quantization_of(hf_config))
    config = table.config.to_mcore(hf_config, allow_unused=allow_unused_keys)
    check_layout(layout, config)
    env = environment(config)
    dims = table.dims_at(env)
    rows = list(table.expand(env, sources))
    beside = tuple(n for n in sources if n.startswith(table.beside) and n not in encoded and not waivers.unused_by(n))
    own = sources.keys() - beside
    missing, unused = settle(table.name, "source", own, (name for row in rows for name in row.hf), waivers)
    reject_twice(table.name, "Hugging Face", [(_claim(row, name), row.mcore) for row in rows for name in row.hf])
    planner = _Importer(table, config, env, dims, sources, layout, dtype, frozenset(missing))
    for row in rows:
        planner.add(row)
    planner.check_stacks()
    return Plan(
        direction="hf-to-mcore",
        table=table,
        config=with_heads_present(config, rows),
        layout=layout,
        sources={name: tensor for name, tensor in sources.items() if name not in unused},
        drafts=planner.drafts(),
        units=tuple(planner.units),
        ledger=Ledger(
            consumed=len(sources) - len(unused),
            produced=len(planner.targets),
            waived_missing=missing,
            waived_unused=unused,
            dropped=tuple(planner.dropped),
            repeated=tuple(name for name, _ in planner.equal),
            beside=beside,
        ),
        equal=tuple(planner.equal),
        objects=tuple(dict.fromkeys(planner.objects)),
        kept=(*planner.dropped, *planner.shifted, *beside),
        notes=(
            *inexpressible_rope(canonical(hf_config)),
            *inexpressible_groups(config),
            *_idle_quantization(hf_config, encoded),
        ),
        dtype_changes=planner.dtype_changes + Counter((e.codec.name, e.tensor.dtype) for e in encoded.values()),
        encoded=encoded,
        carried=(
            *(whole.parts["scale"] for whole in encoded.values() if whole.codec.keeps_scales),
            *discarded(stored, sources, encoded),
        ),
    )


def _idle_quantization(config: Mapping[str, Value], encoded: Mapping[str, Encoded]) -> tuple[str, ...]:
    if (quantization := quantization_of(config)) is None or encoded:
        return ()
    method = quantization.get("quant_method")
    return (f"config.json says quantised by {method}, and no tensor is: all are read as they stand",)


def _claim(row: Row, name: str) -> str:
    return f"{name}[{row.expert}]" if row.spec.stacked else name


class _Importer:
    """Collects the units and targets of one import."""

    def __init__(
        self,
        table: Table,
        config: Mapping[str, Value],
        env: Mapping[str, Value],
        dims: Dims,
        sources: Mapping[str, StoredTensor],
        layout: Layout,
        dtype: str | None,
        missing: frozenset[str],
    ) -> None:
        self.sources, self.layout, self.dims, self.dtype, self.missing = sources, layout, dims, dtype, missing
        self.table, self.config, self.env = table, config, env
        self.stacked = torch_dist.stacks_layers(table.family, config)
        self.num_layers = table.num_layers(env)
        self.num_experts = table.num_experts(env)
        self.targets: dict[str, _Target] = {}
        self.units: list[Unit] = []
        self.objects: list[str] = []
        self.equal: list[tuple[str, str]] = []
        self.dropped: list[str] = []
        self.shifted: list[str] = []
        self.dtype_changes: Counter[tuple[str, str]] = Counter()

    def add(self, row: Row) -> None:
        if row.spec.drop:
            self.dropped += row.hf
            return
        if row.same_as is not None:
            self.equal.append((row.hf[0], row.same_as))
            return
        tensors = [self.sources[name] for name in row.hf if name not in self.missing]
        if len(tensors) < len(row.hf):
            raise CoverageError(
                f"`{row.mcore}` lacks `{next(n for n in row.hf if n in self.missing)}`; its values cannot be invented",
                hint="‹allow-missing› covers whole optional rows only; complete the source",
            )
        shapes = [self._logical(row, tensor) for tensor in tensors]
        inner = shapes[0][1:]
        if any(shape[1:] != inner for shape in shapes):
            raise CoverageError(f"`{row.mcore}`: {', '.join(row.hf)} differ behind the first dimension: {shapes}")
        rows = sum(shape[0] if shape else 1 for shape in shapes)
        fm = row_form(row, self.dims, rows)
        fold = 2 if fm.columns else 1
        packs = fm.hf_packs()
        for name, shape, pack in zip(row.hf, shapes, packs, strict=True):
            if (shape[0] if shape else 1) * fold != pack.rows:
                raise CoverageError(
                    f"`{name}` has shape {list(self.sources[name].shape)}; {pack.rows // fold} rows were expected "
                    f"for `{row.mcore}` (op {row.spec.op})"
                )
        check_shape(row, (fm.mcore_pack().rows // fold, *inner) if shapes[0] else (), self.env)
        regions = [
            (atom, Region(name, self._entry(row), slot, row.spec.transpose, fold))
            for name, pack, (_, members) in zip(row.hf, packs, fm.hf, strict=True)
            for atom, slot in zip(members, pack.slots(), strict=True)
        ]
        self._place(row, fm, tensors, inner if shapes[0] else (), shapes[0] == (), dict(regions), fold)

    def _logical(self, row: Row, tensor: StoredTensor) -> Shape:
        shape = tensor.shape
        if row.spec.stacked:
            if not shape or shape[0] != self.num_experts:
                raise CoverageError(
                    f"`{tensor.name}` has shape {list(shape)}; its first dimension should be {self.num_experts}, "
                    "one entry an expert"
                )
            shape = shape[1:]
        if row.spec.transpose:
            if len(shape) != 2:
                raise CoverageError(f"`{tensor.name}` has shape {list(tensor.shape)}; a matrix was expected")
            shape = shape[::-1]
        return shape

    @staticmethod
    def _entry(row: Row) -> tuple[int, ...]:
        return (row.expert,) if row.spec.stacked and row.expert is not None else ()

    def _place(
        self,
        row: Row,
        fm: Form,
        tensors: list[StoredTensor],
        inner: Shape,
        scalar: bool,
        source: Mapping[int, Region],
        fold: int,
    ) -> None:
        dtypes = {tensor.dtype for tensor in tensors}
        if len(dtypes) > 1:
            raise CoverageError(
                f"`{row.mcore}`: {', '.join(row.hf)} have different dtypes: {', '.join(sorted(dtypes))}"
            )
        origin = dtypes.pop()
        if origin not in STORABLE:
            raise CoverageError(
                f"`{row.hf[0]}` is stored as {origin}, and its scales are not beside it",
                hint="quantised tensors need `quantization_config` in config.json and all their parts",
            )
        dtype = target_dtype(row, origin, self.dtype)
        if dtype != origin:
            self.dtype_changes[origin, dtype] += 1
        pack = fm.mcore_pack()
        slots = dict(zip(fm.order(), pack.slots(), strict=True))
        moves, entries = [], []
        for home in torch_dist.homes(row, self.stacked, self.num_layers, self.num_experts):
            members = fm.order() if home.atoms is None else home.atoms
            total = pack.rows // fold if home.atoms is None else sum(fm.atoms[i] for i in members)
            if row.spec.op == "vocab":
                total = self.layout.padded_vocab(total)
            self._announce(row, home, dtype, () if scalar else (total, *inner), fm)
            for atom in members:
                slot = slots[atom] if home.atoms is None else Slot.whole(fm.atoms[atom])
                moves.append(Move(source[atom], Region(home.key, home.index, slot, fold=fold)))
            entries.append(Entry(home.key, home.index, fold))
            self.objects += torch_dist.extra_states(row, home, self.table.family)
        self.units.append(Unit(row.mcore, tuple(moves), tuple(entries), row.spec.shift))
        if row.spec.shift:
            self.shifted += row.hf

    def _announce(self, row: Row, home: torch_dist.Home, dtype: str, shape: Shape, fm: Form) -> None:
        known = self.targets.setdefault(home.key, _Target(dtype, home.stack, shape, fm, home.atoms))
        if (known.shape, known.dtype) != (shape, dtype):
            raise CoverageError(
                f"`{row.mcore}` has shape {list(shape)} and dtype {dtype}; other entries of `{home.key}` have "
                f"{list(known.shape)} and {known.dtype}"
            )
        if home.index in known.entries:
            raise CoverageError(f"table `{self.table.name}`: two rows produce `{home.key}` {list(home.index)}")
        known.entries.add(home.index)

    def check_stacks(self) -> None:
        for key, target in self.targets.items():
            size = 1
            for extent in target.stack:
                size *= extent
            if len(target.entries) != size:
                raise CoverageError(
                    f"`{key}` is stacked over {list(target.stack)} but has {len(target.entries)} entries"
                )

    def drafts(self) -> tuple[Draft, ...]:
        out = []
        ranks = RankMap(self.layout, self.config)
        for key, target in self.targets.items():
            rows, _ = matrix(target.shape, 0)
            fm = target.form if target.atoms is None else Form((rows,), ((1, (0,)),), cut=target.form.cut)
            indices = sorted(target.entries)
            placed = place_boxes(key, target.shape, target.stack, fm, self.layout, ranks, indices)
            out.append(Draft(key, target.dtype, (*target.stack, *target.shape), placed))
        return tuple(out)
