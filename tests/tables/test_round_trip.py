"""Hugging Face → Megatron Core → Hugging Face gives the same files back, and agrees with what others wrote."""

from __future__ import annotations

import filecmp
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from converters.mcore.layout import Layout
from fixtures.make_tiny import make
from mbx.formats.hf import MANIFEST
from mbx.run.job import Options, plan_hf_to_mcore, plan_mcore_to_hf, run

TINY = ("llama", "qwen2", "qwen3", "mistral")


def convert_both_ways(source: Path, work: Path, options: Options) -> Path:
    run(plan_hf_to_mcore(source, work / "mcore", options))
    run(plan_mcore_to_hf(work / "mcore", work / "hf", replace(options, layout=Layout())))
    return work / "hf"


def same_files(left: Path, right: Path) -> None:
    names = {p.name for p in left.iterdir()}
    assert names == {p.name for p in right.iterdir()} - {MANIFEST}
    _, mismatch, errors = filecmp.cmpfiles(left, right, names, shallow=False)
    assert (mismatch, errors) == ([], [])


def dcp_content(folder: Path) -> tuple[dict[str, torch.Tensor], set[str]]:
    """Tensors and object names of a torch_dist folder by torch's own reader."""
    reader = dcp.FileSystemReader(folder)
    entries = reader.read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors, set(entries) - set(tensors)


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("name", TINY)
def test_round_trip_is_byte_identical(tiny: Path, tmp_path: Path, name: str, tp: int) -> None:
    same_files(tiny / name, convert_both_ways(tiny / name, tmp_path, Options(layout=Layout(tp=tp))))


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_tensor_parallel_size_changes_chunks_and_not_values(tiny: Path, tmp_path: Path, tp: int) -> None:
    for size in (1, tp):
        run(plan_hf_to_mcore(tiny / "llama", tmp_path / f"{size}", Options(layout=Layout(tp=size), overwrite=True)))
    one, split = (dcp_content(tmp_path / f"{size}" / "iter_0000000") for size in (1, tp))
    assert one[1] == split[1]
    for name, tensor in one[0].items():
        wide = split[0][name]
        assert torch.equal(wide[: len(tensor)], tensor)
        assert not wide[len(tensor) :].any(), "padding rows are zero"


@pytest.mark.parametrize("name", ["llama"])
def test_import_equals_the_peers_checkpoint(peers: Path, tmp_path: Path, name: str) -> None:
    run(plan_hf_to_mcore(peers / name / "hf", tmp_path / "mcore", Options()))
    ours, our_objects = dcp_content(tmp_path / "mcore" / "iter_0000000")
    theirs, their_objects = dcp_content(peers / name / "mcore" / "iter_0000000")
    assert our_objects == their_objects
    assert {n: (t.dtype, t.shape) for n, t in ours.items()} == {n: (t.dtype, t.shape) for n, t in theirs.items()}
    assert [n for n in ours if not torch.equal(ours[n], theirs[n])] == []


@pytest.mark.parametrize("name", ["llama"])
def test_export_of_the_peers_checkpoint_equals_its_source(peers: Path, tmp_path: Path, name: str) -> None:
    source = peers / name / "hf"
    run(plan_mcore_to_hf(peers / name / "mcore", tmp_path / "hf", Options(), hf_config=source))
    same_files(source, tmp_path / "hf")


def test_a_cast_changes_dtype_and_config_and_nothing_else(tiny: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    folder = convert_both_ways(tiny / "qwen3", tmp_path, Options(dtype="fp32"))
    cast, original = load_file(folder / "model.safetensors"), load_file(tiny / "qwen3" / "model.safetensors")
    assert cast.keys() == original.keys()
    for name, tensor in original.items():
        assert cast[name].dtype == torch.float32
        assert torch.equal(cast[name], tensor.float())
    assert '"float32"' in (folder / "config.json").read_text()


def test_buffers_that_transformers_recomputes_come_back(tmp_path: Path) -> None:
    source = make("llama2", tmp_path / "source", shards=2)
    same_files(source, convert_both_ways(source, tmp_path, Options()))
