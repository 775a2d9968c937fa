"""Plans Hugging Face → Megatron Core (torch_dist keys)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from converters.codecs import quantization_of
from converters.codecs.decode import Encoded, decoded_view, discarded
from converters.engine.plan import STORABLE, Draft, Plan, Unit, target_dtype, with_heads_present
from converters.errors import CoverageError
from converters.mcore.layout import Layout, RankMap
from converters.mcore.layout import check as check_layout
from converters.mcore.torch_dist import extra_states_of, states_of_model
from converters.planning.join import PADDED, Joined, Joiner, Place, moves, one_dtype, without_scales
from converters.planning.placing import Target
from converters.rows.config_spelling import canonical, provenance_note
from converters.rows.coverage import NO_WAIVERS, Ledger, Waivers, reject_twice, settle
from converters.rows.expr import Value
from converters.rows.isos import inexpressible_groups, inexpressible_rope
from converters.rows.ops import Form
from converters.rows.row import NO_STATE
from converters.rows.shapes import check_shape
from converters.rows.table import Row, Table
from converters.tensors import StoredTensor


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
    joiner = Joiner.at(table, config)
    check_layout(layout, config, {part: joiner.parts[part][0] for part in table.parts()})
    rows = list(table.expand(joiner.env, sources))
    beside = tuple(n for n in sources if n.startswith(table.beside) and n not in encoded and not waivers.unused_by(n))
    own = sources.keys() - beside
    missing, unused = settle(table.name, "source", own, (name for row in rows for name in row.hf), waivers)
    claims = [(_claim(row, name), row.mcore) for row in rows for name in dict.fromkeys(row.hf)]
    reject_twice(table.name, "Hugging Face", claims)
    planner = _Importer(joiner, sources, layout, dtype, frozenset(missing))
    for row in rows:
        planner.add(row)
    return Plan(
        direction="hf-to-mcore",
        table=table,
        config=with_heads_present(config, rows),
        layout=layout,
        sources={name: tensor for name, tensor in sources.items() if name not in unused},
        drafts=planner.drafts(RankMap(layout, config)),
        units=tuple(planner.units),
        ledger=Ledger(
            consumed=len(sources) - len(unused),
            produced=len(planner.targets),
            waived_missing=missing,
            waived_unused=unused,
            dropped=tuple(planner.dropped),
            repeated=tuple(name for name, _ in planner.equal),
            beside=(*beside, *planner.beside),
        ),
        equal=tuple(planner.equal),
        padded=tuple(planner.padded),
        objects=tuple(dict.fromkeys([*planner.objects, *states_of_model(table.family, prefix=table.prefix)])),
        kept=(*planner.dropped, *planner.shifted, *beside, *planner.beside),
        notes=(
            *inexpressible_rope(canonical(hf_config)),
            *inexpressible_groups(config),
            *_idle_quantization(hf_config, encoded),
            *_without_place(planner.beside),
            *provenance_note(hf_config),
        ),
        dtype_changes=planner.dtype_changes + Counter((e.codec.name, e.tensor.dtype) for e in encoded.values()),
        encoded=encoded,
        carried=(
            *(whole.parts[role] for whole in encoded.values() for role in whole.codec.kept_parts),
            *discarded(stored, sources, encoded),
        ),
    )


def _idle_quantization(config: Mapping[str, Value], encoded: Mapping[str, Encoded]) -> tuple[str, ...]:
    if (quantization := quantization_of(config)) is None or encoded:
        return ()
    method = quantization.get("quant_method")
    return (f"config.json says quantised by {method}, and no tensor is: all are read as they stand",)


def _without_place(names: list[str]) -> tuple[str, ...]:
    """What to say of parts of a model that its Megatron twin lacks."""
    if not names:
        return ()
    what = f"{len(names)} tensors, first `{names[0]}`, have no place in the Megatron model"
    return (f"{what}, which computes without them: they are kept in hf/ and come back",)


def _claim(row: Row, name: str) -> str:
    return f"{name}[{row.expert}]" if row.spec.stacked else name


@dataclass(slots=True)
class _Importer:
    """Collects the units and targets of one import; `missing` are sources that a waiver lets lack."""

    joiner: Joiner
    sources: Mapping[str, StoredTensor]
    layout: Layout
    dtype: str | None
    missing: frozenset[str]
    targets: dict[str, Target] = field(default_factory=dict)
    units: list[Unit] = field(default_factory=list)
    objects: list[str] = field(default_factory=list)
    equal: list[tuple[str, str]] = field(default_factory=list)
    padded: list[tuple[str, int]] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    beside: list[str] = field(default_factory=list)
    shifted: list[str] = field(default_factory=list)
    dtype_changes: Counter[tuple[str, str]] = field(default_factory=Counter)

    def add(self, row: Row) -> None:
        if row.spec.drop and not (row.spec.beside and self.missing.intersection(row.hf)):
            (self.beside if row.spec.beside else self.dropped).extend(row.hf)
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
        joined = self.joiner.from_hf(row, tensors)
        check_shape(row, joined.shape, self.joiner.fields_of(row))
        dtype = self._dtype(row, one_dtype(row, tensors))
        for place in joined.mcore:
            self._announce(joined, place, dtype)
        filled = tuple(place.entry for place in joined.mcore)
        self.units.append(Unit(row.mcore, moves(joined.hf, joined.mcore), filled, row.spec.shift))
        if row.spec.shift:
            self.shifted += row.hf
        if row.spec.op == PADDED:
            self.padded += [(place.tensor, place.rows) for place in joined.hf]

    def _dtype(self, row: Row, origin: str) -> str:
        if origin not in STORABLE:
            raise without_scales(row.hf[0], origin)
        dtype = target_dtype(row, origin, self.dtype)
        if dtype != origin:
            self.dtype_changes[origin, dtype] += 1
        return dtype

    def _announce(self, joined: Joined, place: Place, dtype: str) -> None:
        key, shape, form, table = place.tensor, place.shape, joined.form, self.joiner.table
        if joined.row.spec.op == "vocab":
            shape = (self.layout.padded_vocab(place.rows), *shape[1:])
        if len(place.slots) < len(form.atoms):
            form = Form((place.rows,), ((1, (0,)),), cut=form.cut)
        known = self.targets.setdefault(key, Target(dtype, place.stack, shape, form))
        if (known.shape, known.dtype) != (shape, dtype):
            raise CoverageError(
                f"`{joined.row.mcore}` has shape {list(shape)} and dtype {dtype}; other entries of `{key}` have "
                f"{list(known.shape)} and {known.dtype}"
            )
        if place.index in known.entries:
            raise CoverageError(f"table `{table.name}`: two rows produce `{key}` {list(place.index)}")
        known.entries.add(place.index)
        if not joined.row.kept:
            spec = joined.row.spec
            shared = spec.op == "col"
            home = (place.index, place.stack, table.family)
            if spec.state != NO_STATE:
                self.objects += extra_states_of(key, *home, shared=shared, own=spec.state is True)

    def drafts(self, ranks: RankMap) -> tuple[Draft, ...]:
        for key, target in self.targets.items():
            if target.gaps:
                raise CoverageError(
                    f"`{key}` is stacked over {list(target.stack)} but has {len(target.entries)} entries"
                )
        return tuple(target.draft(key, self.layout, ranks) for key, target in self.targets.items())
