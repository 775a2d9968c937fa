"""Megatron Core in four processes loads what mbx lays out, and what it saves itself reads back equal."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from _layout_worker import MODELS, depth_of
from _ranks import run_ranks

from converters.mcore.layout import Layout
from mbx.formats.checkpoint import Checkpoint as McoreCheckpoint
from mbx.formats.files import FileSource
from mbx.formats.registry import open_megatron as open_any
from mbx.run.job import Options, run
from mbx.run.reshard import plan_mcore_to_mcore
from mbx.torchfile.dcp import read_dcp

WORLD = 4


def run_job(job: str, work: Path) -> None:
    run_ranks("_layout_worker.py", WORLD, job, work)


def contents(opened: McoreCheckpoint) -> dict[str, np.ndarray]:
    """Every tensor's bytes, as its chunks say where they lie: [*shape, bytes of an element]."""
    source = FileSource(opened.iteration)
    out = {}
    for name, tensor in opened.tensors.items():
        whole = np.zeros((*tensor.shape, 2 if tensor.dtype == "BF16" else 4), np.uint8)
        for chunk in tensor.chunks:
            part = np.empty((*chunk.sizes, whole.shape[-1]), np.uint8)
            source.read_into(chunk.file, source.data_start(chunk), memoryview(part.reshape(-1)))
            whole[tuple(slice(a, a + n) for a, n in zip(chunk.offsets, chunk.sizes, strict=True))] = part
        out[name] = whole
    source.close()
    return out


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("layouts")
    run_job("save", work)
    return work


@pytest.fixture(scope="module")
def loaded(saved: Path) -> list[dict[str, dict[str, list[str]]]]:
    """Findings of each rank about checkpoints that mbx made of Megatron's own, both ways and by a detour."""
    for name, (config, sizes) in MODELS.items():
        folder, own = saved / name, Layout(**sizes, vpp=depth_of(config))
        one, plain = Options(sync=False), Options(sync=False, layout=own)
        run(plan_mcore_to_mcore(folder / "legacy", folder / "to_dist_from_legacy", plain))
        run(plan_mcore_to_mcore(folder / "dist", folder / "to_dist_tp1", one))
        legacy = Options(sync=False, layout=own, format="torch")
        run(plan_mcore_to_mcore(folder / "dist", folder / "to_legacy", legacy, spec="local"))
        run(plan_mcore_to_mcore(folder / "to_dist_tp1", folder / "to_legacy_detour", legacy, spec="local"))
    run_job("load", saved)
    return [torch.load(saved / f"load.{rank}.pt", weights_only=True) for rank in range(WORLD)]


@pytest.mark.parametrize("name", MODELS)
def test_both_of_megatrons_formats_hold_the_same_tensors(saved: Path, name: str) -> None:
    config, sizes = MODELS[name]
    dist, legacy = open_any(saved / name / "dist"), open_any(saved / name / "legacy")
    assert (dist.format, legacy.format) == ("torch_dist", "torch")
    assert {n: (t.dtype, t.shape) for n, t in dist.tensors.items()} == {
        n: (t.dtype, t.shape) for n, t in legacy.tensors.items()
    }
    ours, theirs = contents(legacy), contents(dist)
    assert [n for n in ours if not np.array_equal(ours[n], theirs[n])] == []
    assert legacy.left_out == ("optimizer state",) and legacy.layout == Layout(**sizes, vpp=depth_of(config))


@pytest.mark.parametrize("name", MODELS)
def test_megatron_loads_every_output_equal(loaded: list[dict[str, dict[str, list[str]]]], name: str) -> None:
    for rank, found in enumerate(loaded):
        outputs = dict(found[name])
        assert outputs.pop("fresh"), "another seed must not give the same weights"
        assert len(outputs) == 4
        assert {made: names for made, names in outputs.items() if names} == {}, f"rank {rank}"


def test_shards_kept_apart_are_put_together(saved: Path) -> None:
    """Megatron Core's singleton_local_shards: a key per layer, expert and half."""
    apart, dist = open_any(saved / "moe/apart/iter_0000005"), open_any(saved / "moe/dist")
    names = read_dcp(saved / "moe/apart/iter_0000005").tensors
    assert "decoder.layers.3.mlp.experts.experts.7.linear_fc1.weight_w" in names
    assert {n: (t.dtype, t.shape) for n, t in apart.tensors.items()} == {
        n: (t.dtype, t.shape) for n, t in dist.tensors.items()
    }
    ours, theirs = contents(apart), contents(dist)
    assert [name for name in ours if not np.array_equal(ours[name], theirs[name])] == []
