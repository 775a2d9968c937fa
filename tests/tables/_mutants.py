"""Wrong tables, each one step from a shipped one, and which leg of a comparison on a tiny model finds them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import mbx.models.transformers.tracing as tracing
import mbx.tables
from converters.errors import MbxError
from converters.mcore.flavours import in_flavour
from converters.planning.importer import plan_import
from converters.rows.config_map import environment
from converters.rows.expr import Value
from converters.rows.isos import FIELDS
from converters.rows.table import Row, RowSpec, Table
from mbx.formats.checkpoint import Checkpoint
from mbx.models.trace import Trace
from mbx.proof.parity import parity
from mbx.run.job import Options, plan_hf_to_mcore, run

#: What the comparison says of a mutant that no leg found.
SURVIVED, SAME_PLAN = "survived", "the same plan"


@dataclass(frozen=True)
class Mutant:
    """A table that differs from the shipped one in what `name` says; `config` is what the folder's config gains."""

    name: str
    table: Table
    config: Mapping[str, Value]


def mutants(table: Table, folder: Checkpoint) -> Iterator[Mutant]:
    """Rows exchanged with each neighbour of their shape; config entries, `fixed`, `ignore` and `when` changed."""
    fields = table.config.to_mcore(folder.config)

    def config(name: str, **parts: Any) -> Mutant:
        return Mutant(name, replace(table, config=replace(table.config, **parts)), {})

    for one, other, site in exchanges(table, folder):
        yield Mutant(
            f"rows of {site or 'the top'} {one} ↔ {other}", replace(table, blocks=_exchanged(table, one, other)), {}
        )
    for row in table.config.rows:
        for value in _altered(fields[row.mcore]):
            yield config(
                f"config {row.mcore}: {value!r} for {fields[row.mcore]!r}",
                rows=tuple(one for one in table.config.rows if one is not row),
                fixed={**table.config.fixed, row.mcore: value},
                ignore=table.config.ignore | {row.hf.split(".")[0]},
            )
    for group, keys in table.config.groups.items():
        rest = {name: hf for name, hf in table.config.groups.items() if name != group}
        held = {name: fields[name] for name in FIELDS[group].mcore if name in fields}
        for name, plain in held.items():
            for value in _altered(plain):
                yield config(
                    f"via {group}: {name}: {value!r} for {plain!r}",
                    groups=rest,
                    fixed={**table.config.fixed, **held, name: value},
                    ignore=table.config.ignore | set(keys),
                )
    for name, plain in table.config.fixed.items():
        for value in _altered(plain):
            yield config(f"fixed {name}: {value!r} for {plain!r}", fixed={**table.config.fixed, name: value})
    for key in sorted(table.config.ignore):
        dropped = config(f"ignore {key}: dropped", ignore=table.config.ignore - {key})
        yield replace(dropped, config={} if key in folder.config else {key: 1})
    for block in table.when:
        left = {name: text for name, text in table.when.items() if name != block}
        yield Mutant(f"when {block}: dropped", replace(table, when=left), {})
    every = [spec for rows in table.blocks.values() for row in rows for spec in row if spec.when is not None]
    for spec in (spec for number, spec in enumerate(every) if spec not in every[:number]):
        blocks = _mapped(table, lambda one, spec=spec: replace(one, when=None) if one == spec else one)
        yield Mutant(f"row {spec.param}: when {spec.when}: dropped", replace(table, blocks=blocks), {})


def _altered(value: Value) -> list[Value]:
    """Another value of the kind of `value`; none for one that is absent."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1 if value < 1000 else 2 * value]  # a size is off by one; a base or a length by a factor
    if isinstance(value, float):
        return [10 * value if 0 < value < 1e-3 else value / 2 if value else 0.5]
    if isinstance(value, list) and value and all(isinstance(one, int) for one in value):
        return [[int(not one) for one in value] if set(value) <= {0, 1} else [value[0] + 1, *value[1:]]]  # type: ignore[operator]
    if (
        isinstance(value, list) and value and all(isinstance(one, float) and one for one in value)
    ):  # one factor at a time
        return [[one / 2 if n == place else one for n, one in enumerate(value)] for place in range(len(value))]  # type: ignore[operator]
    others = {"RMSNorm": "LayerNorm", "silu": "gelu", "softmax": "sigmoid", "sigmoid": "softmax", "rope": "none"}
    return [others[value]] if isinstance(value, str) and value in others else []


def exchanges(table: Table, folder: Checkpoint) -> Iterator[tuple[str, str, str]]:
    """Two Hugging Face names, as the table writes them, that differ in nothing which the cover can see, and where."""
    shapes = {name: tensor.shape for name, tensor in folder.tensors.items()}
    rows = list(table.expand(environment(table.config.to_mcore(folder.config)), folder.tensors))
    seen = set()
    for row in rows:
        for a, b in itertools.combinations(range(len(row.hf)), 2):
            if shapes.get(row.hf[a]) == shapes.get(row.hf[b]):
                seen.add((row.spec.hf[a], row.spec.hf[b], row.site))
    for _, group in itertools.groupby(rows, key=lambda row: (row.site, row.layer)):
        for one, other in itertools.combinations([row for row in group if not row.expert], 2):
            if one.spec is other.spec or one.same_as or other.same_as or _kind(one) != _kind(other):
                continue
            if all(shapes.get(a) == shapes.get(b) for a, b in zip(one.hf, other.hf, strict=True)):
                seen.add((one.spec.hf[0], other.spec.hf[0], one.site))
    yield from sorted(seen)


def _kind(row: Row) -> tuple[object, ...]:
    return row.spec.op, len(row.hf), row.expert is None, row.spec.drop


def _exchanged(table: Table, one: str, other: str) -> Mapping[str, tuple[tuple[RowSpec, ...], ...]]:
    names = {one: other, other: one}
    return _mapped(table, lambda spec: replace(spec, hf=tuple(names.get(name, name) for name in spec.hf)))


def _mapped(table: Table, change: Any) -> Mapping[str, tuple[tuple[RowSpec, ...], ...]]:
    return {
        name: tuple(tuple(change(spec) for spec in alternatives) for alternatives in rows)
        for name, rows in table.blocks.items()
    }


@contextmanager
def one_reference() -> Iterator[None]:
    """Within it Transformers runs what it has run already from memory: only Megatron Core's side changes."""
    kept: dict[object, Trace] = {}
    plain = tracing.trace_transformers

    def remembered(hf_dir: Path, batches: Any, *, reading: Any = tracing.AS_IT_IS, **how: Any) -> Trace:
        passes = tuple(
            (str(b.ids.tolist()), str(None if b.positions is None else b.positions.tolist())) for b in batches
        )
        key = (hf_dir, passes, str(reading), str(sorted(how.items())))
        if key not in kept:
            found = plain(hf_dir, batches, reading=reading, **how)
            logits = found.head(0, tracing_vocab(hf_dir))
            kept[key] = Trace(found.hidden, lambda first, last: logits[:, first:last])
            found.close()
        return kept[key]

    tracing.trace_transformers = remembered  # type: ignore[assignment]
    try:
        yield
    finally:
        tracing.trace_transformers = plain


def tracing_vocab(hf_dir: Path) -> int:
    from mbx.models.transformers.reference import transformers_config

    return int(transformers_config(hf_dir).get_text_config().vocab_size)


def tower_mutants(table: Table, folder: Checkpoint, flavour: str) -> Iterator[Mutant]:
    """Rows around the text model exchanged with each neighbour of their shape, as `flavour` arranges them."""
    for one, other, site in exchanges(in_flavour(table, flavour), folder):
        if site in {tower.mcore for tower in table.towers}:
            yield Mutant(f"rows of {site} {one} ↔ {other}", replace(table, blocks=_exchanged(table, one, other)), {})


def tower_verdict(mutant: Mutant, folder: Checkpoint, flavour: str, work: Path) -> str:
    """The legs by which the shipped table finds what a wrong one made of a tower; no forward pass comes to it."""
    options = Options(sync=False, overwrite=True, mapping=str(work / "mutant.toml"), flavour=flavour)
    read, mbx.tables.from_file = mbx.tables.from_file, lambda path: mutant.table
    try:
        run(plan_hf_to_mcore(folder.path, work / "mcore", options))
    except MbxError:
        return "refused"
    finally:
        mbx.tables.from_file = read
    report = parity(folder.path, work / "mcore")
    return ", ".join(leg.name for leg in report.legs if leg.status != "passed") or SURVIVED


class Court:
    """Tries mutants of one family's table on its tiny model."""

    def __init__(self, folder: Checkpoint, table: Table, work: Path) -> None:
        self.folder, self.table, self.work = folder, table, work
        self.plain = self._plan(table, {})
        run(plan_hf_to_mcore(folder.path, work / "right", Options(sync=False)))
        right = parity(folder.path, work / "right", forward=True)
        assert right.passed, "the shipped table is right"
        self.gaps = set(right.gaps)

    def _plan(self, table: Table, config: Mapping[str, Value]) -> Any:
        from converters.mcore.layout import Layout

        return plan_import(table, {**self.folder.config, **config}, self.folder.tensors, Layout())

    def verdict(self, mutant: Mutant) -> str:
        """The leg that found the mutant, `not reached` where the report says so, `refused`, or one of the above."""
        try:
            plan = self._plan(mutant.table, mutant.config)
        except MbxError:
            return "refused"
        if (plan.config, plan.units, plan.drafts) == (self.plain.config, self.plain.units, self.plain.drafts):
            return SAME_PLAN
        mapping, target = str(self.work / "mutant.toml"), self.work / "mcore"
        read = mbx.tables.from_file
        mbx.tables.from_file = lambda path: mutant.table
        try:
            run(plan_hf_to_mcore(self.folder.path, target, Options(sync=False, overwrite=True, mapping=mapping)))
            report = parity(self.folder.path, target, forward=True, mapping=mapping)
        except MbxError:
            return "refused"
        finally:
            mbx.tables.from_file = read
        if failed := [leg.name for leg in report.legs if leg.status != "passed"]:
            return ", ".join(failed)
        return SURVIVED if set(report.gaps) <= self.gaps else "not reached"


def tried(court: Court) -> Iterator[tuple[Mutant, str]]:
    """Every mutant with its verdict."""
    torch.manual_seed(0)
    with one_reference():
        for mutant in mutants(court.table, court.folder):
            yield mutant, court.verdict(mutant)
