"""Plans Megatron Core (torch_dist keys) → Hugging Face."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from converters.codecs.decode import Encoded
from converters.engine.plan import Draft, Entry, Plan, Unit, row_form, with_heads_present
from converters.engine.regions import Move, Region, matrix
from converters.errors import CoverageError
from converters.mcore import torch_dist
from converters.mcore.layout import Layout
from converters.rows.config_map import environment
from converters.rows.coverage import NO_WAIVERS, Ledger, Waivers, reject_twice, settle
from converters.rows.expr import Value
from converters.rows.isos import inexpressible_groups
from converters.rows.ops import Dims, Form
from converters.rows.pack import Pack, Slot
from converters.rows.shapes import check_shape
from converters.rows.table import Row, Table
from converters.tensors import Shape, StoredTensor

_ENCODABLE = ("BF16", "F16", "F32", "F64")


@dataclass(frozen=True, slots=True)
class HfTensor:
    """A Hugging Face tensor as the source folder stored it: dtype and shape."""

    dtype: str
    shape: Shape


def plan_export(
    table: Table,
    config: Mapping[str, Value],
    sources: Mapping[str, StoredTensor],
    *,
    recorded: Mapping[str, HfTensor] | None = None,
    kept: Mapping[str, StoredTensor] | None = None,
    encode: Mapping[str, Encoded] | None = None,
    scales: Mapping[str, StoredTensor] | None = None,
    dtype: str | None = None,
    exact_norms: bool = False,
    waivers: Waivers = NO_WAIVERS,
) -> Plan:
    """Plan that turns `sources` (torch_dist keys) into Hugging Face tensors.

    `config` is the Megatron Core config. `recorded` is what the Hugging Face folder the checkpoint came from
    held: it decides between alternative spellings and gives promoted tensors their dtype back; without it the
    table's first alternatives are written. `kept` are Hugging Face tensors that travelled beside the checkpoint's
    own and are written as they are. `encode` are tensors to store in the parts of a codec, as the source did, and
    `scales` the source's scales of some of them, by the tensor's name. `exact_norms` writes in fp32 what 16 bits would
    round: norms stored in 16 bits as gamma, which the folder has as 1 + gamma. A requested `dtype` wins.
    Raises CoverageError unless every tensor is accounted for.
    """
    env = environment(config)
    dims = table.dims_at(env)
    rows = [row for row in table.expand(env, recorded, sources) if not row.spec.drop]
    known = (recorded or {}, kept or {}, encode or {})
    planner = _Exporter(table, config, env, dims, sources, *known, dtype, exact_norms)
    located = {id(row): planner.locate(row) for row in rows if row.same_as is None}
    wanted = [home.key for homes in located.values() for home in homes]
    missing, unused = settle(table.name, "checkpoint", sources, wanted, waivers)
    claims = [(f"{home.key}{list(home.index)}", row.mcore) for row in rows for home in located.get(id(row), ())]
    reject_twice(table.name, "Megatron Core", claims)
    for row in rows:
        if row.same_as is None:
            planner.add(row, located[id(row)])
    for row in rows:
        if row.same_as is not None:
            planner.repeat(row)
    for tensor in (kept or {}).values():
        if tensor.name not in planner.targets:
            planner.keep(tensor)
    drafts = planner.drafts()
    dropped = tuple(name for name in recorded or {} if name not in planner.targets)
    return Plan(
        direction="mcore-to-hf",
        table=table,
        config=with_heads_present(config, rows),
        layout=Layout(),
        sources={**{name: t for name, t in sources.items() if name not in unused}, **(kept or {})},
        drafts=drafts,
        units=tuple(planner.units),
        ledger=Ledger(
            consumed=len(sources) - len(unused),
            produced=len(drafts),
            waived_missing=missing,
            waived_unused=unused,
            dropped=dropped,
            repeated=tuple(planner.repeated),
        ),
        dtype_changes=planner.dtype_changes,
        reencoded=planner.reencoded,
        scales={name: tensor for name, tensor in (scales or {}).items() if name in planner.reencoded},
        notes=tuple(inexpressible_groups(config)),
    )


class _Exporter:
    """Collects the units and targets of one export."""

    def __init__(
        self,
        table: Table,
        config: Mapping[str, Value],
        env: Mapping[str, Value],
        dims: Dims,
        sources: Mapping[str, StoredTensor],
        recorded: Mapping[str, HfTensor],
        kept: Mapping[str, StoredTensor],
        encode: Mapping[str, Encoded],
        dtype: str | None,
        exact_norms: bool,
    ) -> None:
        self.env, self.kept, self.encode = env, kept, encode
        self.table, self.dims, self.sources, self.recorded, self.dtype = table, dims, sources, recorded, dtype
        self.exact_norms = exact_norms
        self.stacked = torch_dist.stacks_layers(table.family, config)
        self.num_layers = table.num_layers(env)
        self.num_experts = table.num_experts(env)
        self.units: list[Unit] = []
        self.targets: dict[str, tuple[str, Shape]] = {}
        self.filled: Counter[str] = Counter()
        self.origin: dict[str, Unit] = {}
        self.repeated: list[str] = []
        self.reencoded: dict[str, Encoded] = {}
        self.dtype_changes: Counter[tuple[str, str]] = Counter()

    def locate(self, row: Row) -> tuple[torch_dist.Home, ...]:
        """Keys of a row: stacked or per layer, whichever the checkpoint uses."""
        expected = torch_dist.homes(row, self.stacked, self.num_layers, self.num_experts)
        if all(home.key in self.sources for home in expected):
            return expected
        other = torch_dist.homes(row, not self.stacked, self.num_layers, self.num_experts)
        return other if all(home.key in self.sources for home in other) else expected

    def add(self, row: Row, homes: tuple[torch_dist.Home, ...]) -> None:
        if any(home.key not in self.sources for home in homes):
            return  # waived as missing: the ledger names it
        tensors = [self.sources[home.key] for home in homes]
        for home, tensor in zip(homes, tensors, strict=True):
            if tensor.shape[: len(home.stack)] != home.stack:
                raise CoverageError(
                    f"`{home.key}` has shape {list(tensor.shape)}; the config asks for a stack of {list(home.stack)}"
                )
        inner = tensors[0].shape[len(homes[0].stack) :][1:]
        scalar = len(tensors[0].shape) == len(homes[0].stack)
        rows = sum(matrix(t.shape, len(h.stack))[0] for h, t in zip(homes, tensors, strict=True))
        fm = row_form(row, self.dims, rows)
        fold = 2 if fm.columns else 1
        pack = fm.mcore_pack()
        padded = rows * fold - pack.rows
        if padded < 0 or (padded and row.spec.op != "vocab"):
            raise CoverageError(
                f"`{homes[0].key}` has shape {list(tensors[0].shape)}; {pack.rows // fold} rows were expected "
                f"for `{row.mcore}` (op {row.spec.op})"
            )
        check_shape(row, () if scalar else (pack.rows // fold, *inner), self.env)
        source = {
            atom: Region(home.key, home.index, slot, fold=fold)
            for home in homes
            for atom, slot in self._slots(fm, pack, home)
        }
        self._place(row, fm, tensors[0].dtype, () if scalar else inner, scalar, source, fold)

    @staticmethod
    def _slots(fm: Form, pack: Pack, home: torch_dist.Home) -> list[tuple[int, Slot]]:
        if home.atoms is None:
            return list(zip(fm.order(), pack.slots(), strict=True))
        return [(atom, Slot.whole(fm.atoms[atom])) for atom in home.atoms]

    def _place(
        self, row: Row, fm: Form, origin: str, inner: Shape, scalar: bool, source: Mapping[int, Region], fold: int
    ) -> None:
        moves, entries = [], []
        for name, pack, (_, members) in zip(row.hf, fm.hf_packs(), fm.hf, strict=True):
            shape = () if scalar else (pack.rows // fold, *inner)
            if row.spec.transpose:
                shape = shape[::-1]
            index: tuple[int, ...] = ()
            if row.spec.stacked and row.expert is not None:
                shape, index = (self.num_experts, *shape), (row.expert,)
            dtype = self._dtype(row, name, origin)
            known = self.targets.setdefault(name, (dtype, shape))
            if known != (dtype, shape):
                raise CoverageError(f"`{name}` would be {shape} {dtype} and {known[1]} {known[0]} at once")
            self.filled[name] += 1
            for atom, slot in zip(members, pack.slots(), strict=True):
                moves.append(Move(source[atom], Region(name, index, slot, row.spec.transpose, fold)))
            entries.append(Entry(name, index, fold))
            if dtype != origin:
                self.dtype_changes[origin, dtype] += 1
            if name in self.encode and row.spec.shift:
                raise CoverageError(f"`{name}` is stored by a codec, and its values are shifted: nothing encodes that")
        original = row.hf[0] if row.spec.shift and self._is_original(row.hf[0]) else None
        unit = Unit(row.mcore, tuple(moves), tuple(entries), -row.spec.shift, original)
        self.units.append(unit)
        for name in row.hf:
            self.origin[name] = unit

    def _dtype(self, row: Row, name: str, origin: str) -> str:
        if origin not in ("BF16", "F16", "F32", "F64") or name in self.encode:
            return origin  # codes are made from the values as they are
        if self.dtype is not None and not row.spec.keep_dtype and row.spec.dtype is None:
            return self.dtype
        if self.exact_norms and row.spec.shift and self.dtype is None:
            return "F32" if origin in ("BF16", "F16") else origin
        if row.spec.dtype is not None and name in self.recorded:
            return self.recorded[name].dtype
        return origin

    def repeat(self, row: Row) -> None:
        """A tensor that is written again under a second name."""
        assert row.same_as is not None
        unit = self.origin.get(row.same_as)
        if unit is None:
            raise CoverageError(
                f"table `{self.table.name}`: `{row.hf[0]}` repeats `{row.same_as}`, which no row makes"
            )
        name = row.hf[0]
        self.targets[name] = self.targets[row.same_as]
        self.filled[name] += 1
        moves = tuple(
            Move(m.source, Region(name, m.target.index, m.target.slot, m.target.transposed, m.target.fold))
            for m in unit.moves
            if m.target.tensor == row.same_as
        )
        self.units.append(Unit(row.mcore, moves, (Entry(name, ()),), unit.shift))
        self.repeated.append(name)

    def _is_original(self, name: str) -> bool:
        """Whether the tensor `name` travelled along with the dtype and shape it gets now."""
        tensor = self.kept.get(name)
        return tensor is not None and self.targets[name] == (tensor.dtype, tensor.shape)

    def keep(self, tensor: StoredTensor) -> None:
        """A tensor that is written as it was read."""
        rows, _ = matrix(tensor.shape, 0)
        region = Region(tensor.name, (), Slot.whole(rows))
        self.targets[tensor.name] = (tensor.dtype, tensor.shape)
        self.units.append(Unit(tensor.name, (Move(region, region),), (Entry(tensor.name, ()),)))

    def drafts(self) -> tuple[Draft, ...]:
        out = []
        for name, (dtype, shape) in self.targets.items():
            if (whole := self.encode.get(name)) is None:
                out.append(_draft(name, dtype, shape))
                continue
            if shape != whole.tensor.shape or dtype not in _ENCODABLE:
                raise CoverageError(
                    f"`{name}` is {dtype} {list(shape)} now; the source's codes stand for {list(whole.tensor.shape)}",
                    hint="leave out ‹codec› same to write it plainly",
                )
            self.reencoded[name] = Encoded(StoredTensor(name, dtype, shape, ()), whole.codec, whole.parts)
            self.dtype_changes[dtype, whole.codec.name] += 1
            out += [_draft(part.name, part.dtype, part.shape) for part in whole.parts.values()]
        return tuple(out)


def _draft(name: str, dtype: str, shape: Shape) -> Draft:
    return Draft(name, dtype, shape, ((0, tuple(0 for _ in shape), shape),))
