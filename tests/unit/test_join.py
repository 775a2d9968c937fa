"""A row's sides are the same from whichever side they are told, and atoms go from either to the other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from converters.errors import CoverageError
from converters.mcore.layout import Layout
from converters.planning.exporter import plan_export
from converters.planning.importer import plan_import
from converters.planning.join import Joiner, moves
from converters.tensors import StoredTensor
from fixtures.index import load_index
from fixtures.make_tiny import make
from mbx.formats.hf import open_hf
from mbx.tables import table_for

#: One of each kind: plain, experts in one tensor and turned round, halves of columns, latent attention, atoms apart.
FAMILIES = ("llama", "gpt_oss", "mimo", "deepseek_v3", "qwen3_next", "nemotron_h")


@pytest.mark.parametrize("name", FAMILIES)
def test_either_side_tells_both(name: str, tmp_path: Path) -> None:
    folder = open_hf(make(name, tmp_path / name))
    table = table_for(folder.config)
    joiner = Joiner.at(table, table.config.to_mcore(folder.config))
    rows = [row for row in table.expand(joiner.env, folder.tensors) if not (row.spec.drop or row.same_as)]
    assert rows
    for row in rows:
        joined = joiner.from_hf(row, [folder.tensors[name] for name in row.hf])
        for place in joined.hf:
            assert (*place.stack, *place.shape) == folder.tensors[place.tensor].shape
        stored = {p.tensor: StoredTensor(p.tensor, "BF16", (*p.stack, *p.shape), ()) for p in joined.mcore}
        keys = joiner.homes(row, stored)
        assert joiner.from_mcore(row, keys, [stored[home.key] for home in keys]) == joined
        there, back = moves(joined.hf, joined.mcore), moves(joined.mcore, joined.hf)
        assert {(move.source, move.target) for move in there} == {(move.target, move.source) for move in back}
        assert len(there) == len(joined.form.atoms)
        for move in there:
            move.runs()


def test_layers_are_found_stacked_or_apart(tiny: Path) -> None:
    folder = open_hf(tiny / "llama")
    table = table_for(folder.config)
    joiner = Joiner.at(table, table.config.to_mcore(folder.config))
    row = next(row for row in table.expand(joiner.env, folder.tensors) if ".linear_proj." in row.mcore)
    (usual,) = joiner.homes(row)
    assert usual.key == "decoder.layers.self_attention.linear_proj.weight" and joiner.homes(row, ["other"]) == (usual,)
    (apart,) = joiner.homes(row, [row.mcore])
    assert (apart.key, apart.index) == (row.mcore, ())
    with pytest.raises(CoverageError, match="the config asks for a stack of"):
        joiner.from_mcore(row, (usual,), [StoredTensor(usual.key, "BF16", (1, 8, 8), ())])


#: A row of several parameters each: the gated delta net's and Mamba's atoms, and two sources in one (FLUX).
APART = {
    "qwen3_next": ("in_proj.weight.query", "in_proj.weight.key"),
    "nemotron_h": ("in_proj.weight.x", "in_proj.weight.dt"),
    "FLUX.1-dev": ("single_blocks.1.self_attention.linear_proj.weight", "single_blocks.1.mlp.linear_fc2.weight"),
}


@pytest.mark.parametrize("name", APART)
def test_parameters_of_one_row_have_one_dtype_and_each_its_own_size(name: str, tmp_path: Path) -> None:
    if name == "FLUX.1-dev":
        config, headers = load_index(name)
        held = {key: StoredTensor(key, dtype, shape, ()) for key, (dtype, shape) in headers.items()}
    else:
        folder = open_hf(make(name, tmp_path / name))
        config, held = folder.config, dict(folder.tensors)
    table = table_for(config)
    plan = plan_import(table, config, held, Layout())
    stored = {draft.name: StoredTensor(draft.name, draft.dtype, draft.shape, ()) for draft in plan.drafts}
    assert plan_export(table, plan.config, stored).ledger.produced
    one, other = (next(key for key in stored if key.endswith(end)) for end in APART[name])
    for wide in (one, other):
        with pytest.raises(CoverageError, match="have different dtypes: BF16, F32") as error:
            plan_export(table, plan.config, {**stored, wide: replace(stored[wide], dtype="F32")})
        assert one in str(error.value) and other in str(error.value)
    if stored[one].shape != stored[other].shape:
        swapped = {one: stored[other].shape, other: stored[one].shape}
        moved = {key: replace(stored[key], shape=shape) for key, shape in swapped.items()}
        with pytest.raises(CoverageError, match="rows were expected"):
            plan_export(table, plan.config, {**stored, **moved})
