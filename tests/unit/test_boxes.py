"""The boxes of an export, copied one by one from the chunks of a checkpoint, give the folder it came from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from converters.casts import convert
from converters.engine.boxes import boxes_of, check_cover, sizes_of, strips
from converters.errors import CoverageError, UnsupportedError
from converters.mcore.layout import Layout
from converters.planning.exporter import Origin, plan_export
from converters.rows.pack import Pack, runs
from converters.stored import read_box
from fixtures.make_tiny import make
from mbx.formats import hf
from mbx.formats.files import FileSource
from mbx.formats.registry import open_hf, open_megatron
from mbx.run.job import Options, plan_hf_to_mcore, run
from mbx.tables import table_for

#: One of each kind: plain, biases, shifted norms, experts apart, in a stack and turned round with interleaved rows,
#: halves of columns, latent attention, gated delta nets, Mamba.
FAMILIES = ("llama", "qwen2", "gemma3_text", "qwen3_moe", "gpt_oss", "mimo", "deepseek_v3", "qwen3_next", "nemotron_h")
LAYOUTS = (Layout(), Layout(tp=4, vocab_divisor=64))


@pytest.mark.parametrize("layout", LAYOUTS, ids=("one", "tp4"))
@pytest.mark.parametrize("name", FAMILIES)
def test_boxes_of_chunks_make_the_folder(name: str, layout: Layout, tmp_path: Path) -> None:
    if name == "mimo" and layout.tp > 1:
        pytest.skip("its folded columns are cut by rows only")
    folder = open_hf(make(name, tmp_path / "hf"))
    run(plan_hf_to_mcore(folder.path, tmp_path / "ckpt", Options(sync=False, layout=layout)))
    opened = open_megatron(tmp_path / "ckpt")
    table, recorded = table_for(folder.config), {n: hf.HfTensor(t.dtype, t.shape) for n, t in folder.tensors.items()}
    plan = plan_export(table, table.config.to_mcore(folder.config), opened.tensors, Origin(recorded))
    there, here = FileSource(opened.home), FileSource(folder.home)
    made = {d.name: np.zeros((*d.shape, 2 if d.dtype in ("BF16", "F16") else 4), np.uint8) for d in plan.drafts}
    dtypes, held = {d.name: d.dtype for d in plan.drafts}, {d.name: [] for d in plan.drafts}
    chunks = 0
    for box in boxes_of(plan):
        held[box.tensor].append(box)
        chunk = plan.sources[box.source].chunks[box.chunk]
        whole = read_box(plan.sources[box.source], there, chunk.offsets, chunk.sizes)
        values = whole[box.held]
        values = values.swapaxes(0, 1) if box.transposed else values
        values = values.reshape(box.shape + values.shape[-1:])
        dtype = dtypes[box.tensor]
        cast = convert(np.ascontiguousarray(values), plan.sources[box.source].dtype, dtype, box.shift)
        made[box.tensor][box.index] = cast.reshape(*box.shape, -1)
        chunks += 1
    check_cover(plan, held)
    assert chunks >= len(plan.drafts)
    shifted = {m.target.tensor for unit in plan.units if unit.shift for m in unit.moves}
    for draft in plan.drafts:
        tensor = folder.tensors[draft.name]
        whole = read_box(tensor, here, (0,) * len(tensor.shape), tensor.shape)
        assert (draft.dtype, draft.shape) == (tensor.dtype, tensor.shape)
        if draft.name not in shifted:
            assert np.array_equal(made[draft.name], whole), draft.name
    there.close()
    here.close()


def test_rows_that_lie_singly_are_one_strip() -> None:
    gate, up = Pack(6, (1, 1)).slots()
    whole = Pack(1, (6, 6)).slots()
    (one,), (other,) = strips(gate, whole[0]), strips(up, whole[1])
    assert (one.source, one.source_step, one.target, one.count) == (0, 2, 0, 6)
    assert (other.source, other.source_step, other.target, other.count) == (1, 2, 6, 6)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_strips_hold_every_row_once(groups: int) -> None:
    """Against the runs, which the engine copies by."""
    whole = Pack(1, (4 * groups, 2 * groups, groups)).slots()
    for source, target in zip(Pack(groups, (4, 2, 1)).slots(), whole, strict=True):
        found, wanted = [], []
        for strip in strips(source, target):
            found += [
                (strip.source + i * strip.source_step, strip.target + i * strip.target_step)
                for i in range(strip.count)
            ]
        every = runs(source, target)
        for at, into, count in zip(every.source.tolist(), every.target.tolist(), every.length.tolist(), strict=True):
            wanted += [(at + i, into + i) for i in range(count)]
        assert sorted(found) == sorted(wanted)


def test_a_hole_is_found(tmp_path: Path, tiny: Path) -> None:
    run(plan_hf_to_mcore(tiny / "qwen2", tmp_path / "ckpt", Options(sync=False)))
    folder, opened = open_hf(tiny / "qwen2"), open_megatron(tmp_path / "ckpt")
    table = table_for(folder.config)
    plan = plan_export(table, table.config.to_mcore(folder.config), opened.tensors)
    boxes: dict[str, list] = {}
    for box in boxes_of(plan):
        boxes.setdefault(box.tensor, []).append(box)
    boxes["model.norm.weight"].pop()
    with pytest.raises(CoverageError, match=r"`model.norm.weight`: 0 of 64 elements are held"):
        check_cover(plan, boxes)
    assert sizes_of((slice(0, 7, 2), slice(3, 5, 1))) == (4, 2)


def test_values_that_are_computed_have_no_boxes(tmp_path: Path, tiny: Path) -> None:
    job = plan_hf_to_mcore(tiny / "llama", tmp_path / "ckpt", Options(sync=False))
    with pytest.raises(UnsupportedError, match="has no boxes"):
        list(boxes_of(replace(job.plan, updates={("x", ()): None})))  # type: ignore[dict-item]
