"""A row's sides are the same from whichever side they are told, and atoms go from either to the other."""

from __future__ import annotations

from pathlib import Path

import pytest

from converters.errors import CoverageError
from converters.planning.join import Joiner, moves
from converters.tensors import StoredTensor
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
