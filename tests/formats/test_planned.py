"""Tensors of a plan that are read before anybody writes them are those that a conversion writes, box by box."""

from __future__ import annotations

import tracemalloc
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from converters.casts import convert
from converters.engine.plan import Entry, Unit
from converters.engine.planned import PlannedTensors
from converters.engine.regions import Move, Region
from converters.errors import CoverageError, DeviceError, UnsupportedError
from converters.mcore.layout import Layout
from converters.rows.pack import Slot
from converters.stored import read_box
from converters.tensors import Chunk, Shape, StoredTensor
from fixtures.make_tiny import make
from mbx.formats.files import FileSource
from mbx.formats.registry import open_hf, open_megatron
from mbx.run.job import Job, Options, plan_hf_to_mcore, plan_mcore_to_hf, run
from mbx.run.merge import plan_merge
from tests.adapters._peft_made import adapt
from tests.formats._quantised import quantised
from tests.unit._memory import plan_of

MEMORY = 1 << 24
#: One of each kind: plain, biases, shifted norms, experts in a stack, folded columns, latent attention, mixed layers.
FAMILIES = ("llama", "qwen2", "gemma3_text", "gpt_oss", "mimo", "deepseek_v3", "qwen3_next")
QUANTISED = ("fp8_block", "fp8_channel", "mxfp4", "int4_packed")


def import_job(source: Path, target: Path, **options: object) -> Job:
    return plan_hf_to_mcore(source, target, Options(sync=False, **options))  # type: ignore[arg-type]


def export_job(source: Path, target: Path, **options: object) -> Job:
    return plan_mcore_to_hf(source, target, Options(sync=False, **options))  # type: ignore[arg-type]


def planned_of(job: Job, max_memory: int = MEMORY) -> PlannedTensors:
    return PlannedTensors(job.plan, FileSource(job.source_root), max_memory)


def written(job: Job) -> tuple[Mapping[str, StoredTensor], FileSource]:
    """Run a conversion; its target's tensors, and what reads them."""
    run(job)
    if (job.target / "config.json").is_file():
        return open_hf(job.target).tensors, FileSource(job.target)
    opened = open_megatron(job.target)
    return opened.tensors, FileSource(opened.iteration)


def boxes(shape: Shape, rng: np.random.Generator) -> list[tuple[Shape, Shape]]:
    """The whole tensor, and a few boxes of it."""
    out: list[tuple[Shape, Shape]] = [(tuple(0 for _ in shape), shape)]
    for _ in range(4 if shape else 0):
        ends = [sorted(rng.integers(0, size + 1, 2).tolist()) for size in shape]
        out.append((tuple(low for low, _ in ends), tuple(high - low for low, high in ends)))
    return out


def check(job: Job) -> None:
    """Every tensor of the plan, read whole and by boxes, is what the run writes."""
    planned = planned_of(job)
    tensors, source = written(job)
    assert set(planned.drafts) == set(tensors)
    rng = np.random.default_rng(0)
    for name, tensor in tensors.items():
        draft = planned.drafts[name]
        assert (draft.dtype, draft.shape) == (tensor.dtype, tensor.shape)
        for offsets, sizes in boxes(tensor.shape, rng):
            got = planned.read(name, offsets, sizes)
            assert got.tobytes() == read_box(tensor, source, offsets, sizes).tobytes(), (name, offsets, sizes)


@pytest.mark.parametrize("name", FAMILIES)
def test_both_directions_of_a_family(name: str, tmp_path: Path) -> None:
    source = make(name, tmp_path / "hf")
    check(import_job(source, tmp_path / "mcore", layout=Layout(tp=2)))
    check(export_job(tmp_path / "mcore", tmp_path / "back"))


@pytest.mark.parametrize("name", ["qwen3_moe", "llama"])
def test_checkpoints_of_other_tools(name: str, peers: Path, tmp_path: Path) -> None:
    check(import_job(peers / name / "hf", tmp_path / "mcore", dtype="fp32"))
    check(export_job(peers / name / "mcore", tmp_path / "back"))


@pytest.mark.parametrize("name", QUANTISED)
def test_quantised_sources_are_decoded(name: str, tmp_path: Path) -> None:
    source = quantised(name, tmp_path / "hf")
    check(import_job(source, tmp_path / "mcore"))
    check(export_job(tmp_path / "mcore", tmp_path / "plain"))
    with pytest.raises(UnsupportedError, match="is to be stored by a codec"):
        planned_of(export_job(tmp_path / "mcore", tmp_path / "same", codec="same"))


@pytest.mark.parametrize("to", ["hf", "mcore"])
def test_a_merge_is_read_before_it_is_written(to: str, tmp_path: Path) -> None:
    made = adapt("qwen3_moe", tmp_path)
    check(plan_merge(made.base, made.adapter, tmp_path / "merged", Options(sync=False), to=to))


def test_values_are_cast_on_the_way(tiny: Path, tmp_path: Path) -> None:
    planned = planned_of(import_job(tiny / "llama", tmp_path / "mcore"))
    name = "decoder.layers.self_attention.linear_qkv.weight"
    shape = planned.drafts[name].shape
    own, wide = (planned.read(name, (1, 2, 3), (1, 9, 8), dtype) for dtype in (None, "F32"))
    assert np.array_equal(convert(own, planned.drafts[name].dtype, "F32", 0), wide.reshape(-1))
    rows = planned.read_rows(name, (1,), 2, 9)
    assert rows.tobytes() == planned.read(name, (1, 2, 0), (1, 9, shape[2])).tobytes()
    with pytest.raises(CoverageError, match="makes no tensor `other`"):
        planned.read("other", (), ())
    with pytest.raises(CoverageError, match=r"makes nothing of .* \[99\]"):
        planned.read(name, (99, 0, 0), (1, 1, 1))


def test_many_threads_read_at_once(tiny: Path, tmp_path: Path) -> None:
    job = import_job(tiny / "llama", tmp_path / "mcore")
    planned = planned_of(job)
    tensors, source = written(job)
    rng = np.random.default_rng(1)
    wanted = [(name, *box) for name, tensor in tensors.items() for box in boxes(tensor.shape, rng)] * 4
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(lambda box: planned.read(*box).tobytes(), wanted))
    assert read == [read_box(tensors[name], source, offsets, sizes).tobytes() for name, offsets, sizes in wanted]


class Zeros:
    """A source of any size."""

    def data_start(self, chunk: Chunk) -> int:
        return chunk.start

    def read_into(self, file: str, start: int, buffer: memoryview) -> None:
        np.frombuffer(buffer, np.uint8)[:] = 0


@pytest.mark.parametrize("transposed", [False, True])
def test_memory_is_the_box_and_what_was_granted(transposed: bool) -> None:
    shape, slot = (2, 4096, 4096), Slot.whole(4096)
    source = StoredTensor("w", "BF16", shape, (Chunk((0, 0, 0), shape, "f", 0),))
    units = [
        Unit("w", (Move(Region("w", (n,), slot, transposed), Region("t", (n,), slot)),), (Entry("t", (n,)),))
        for n in range(2)
    ]
    plan = plan_of(units, [source], [StoredTensor("t", "BF16", shape, ())])
    granted = (160 if transposed else 16) << 20
    planned = PlannedTensors(plan, Zeros(), granted)
    planned.read("t", (0, 0, 0), (1, 1, 1))
    for offsets, sizes in (((1, 5, 7), (1, 2, 9)), ((0, 0, 0), (2, 4096, 3)), ((1, 0, 0), (1, 4096, 4096))):
        tracemalloc.start()
        try:
            got = planned.read("t", offsets, sizes)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert not got.any() and peak <= got.nbytes + granted
    if transposed:
        with pytest.raises(DeviceError, match="transposed and needs"):
            PlannedTensors(plan, Zeros(), 16 << 20).read("t", (0, 0, 0), (1, 1, 1))
