"""Every family through parallel layouts and back: the same bytes, config.json included.

The default run takes one layout a family, `make layouts` all of them.
"""

from __future__ import annotations

import filecmp
import itertools
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from converters.mcore.layout import Layout
from fixtures.make_tiny import NAMES, make, tiny_config
from mbx.formats.hf import MANIFEST
from mbx.run.job import Options, plan_hf_to_mcore, plan_mcore_to_hf, run

#: Layers that a first stage of two takes where the layers do not divide.
FIRST_STAGE = {"qwen2": 2, "llama_nemotron": 3}
EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")


def has_experts(name: str) -> bool:
    config = tiny_config(name)
    config = config.get("text_config", config)
    return any(config.get(key) for key in EXPERTS)


def layout_of(name: str, tp: int, pp: int, ep: int) -> Layout:
    return Layout(tp=tp, pp=pp, ep=ep, first_stage=FIRST_STAGE.get(name) if pp > 1 else None)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A tiny checkpoint by family, made once."""
    root = tmp_path_factory.mktemp("families")
    return cache(lambda name: make(name, root / name, shards=2))


def round_trip(source: Path, work: Path, layout: Layout) -> None:
    run(plan_hf_to_mcore(source, work / "mcore", Options(sync=False, layout=layout)))
    codec = "same" if "quantization_config" in json.loads((source / "config.json").read_text()) else "plain"
    run(plan_mcore_to_hf(work / "mcore", work / "hf", Options(sync=False, codec=codec)))
    names = {path.name for path in source.iterdir()}
    assert names == {path.name for path in (work / "hf").iterdir()} - {MANIFEST}
    assert filecmp.cmpfiles(source, work / "hf", names, shallow=False)[1:] == ([], [])


def ranks_of(mcore: Path) -> dict[str, int]:
    """Numbers of chunks that the checkpoint's tensors are cut into."""
    from torch.distributed import checkpoint as dcp

    entries = dcp.FileSystemReader(mcore / "iter_0000000").read_metadata().state_dict_metadata
    return {name: len(entry.chunks) for name, entry in entries.items() if hasattr(entry, "chunks")}


@pytest.mark.parametrize("name", NAMES)
def test_tensor_pipeline_and_expert_parallelism_change_no_byte(
    checkpoint: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    ep = 2 if has_experts(name) else 1
    round_trip(checkpoint(name), tmp_path, layout_of(name, tp=2, pp=2, ep=ep))
    cut = ranks_of(tmp_path / "mcore")
    assert cut["embedding.word_embeddings.weight"] == 2
    experts = {count for key, count in cut.items() if key.startswith("decoder.") and ".experts.experts." in key}
    assert all(count >= 2 for count in experts)
    assert bool(experts) == has_experts(name) or "hybrid_override_pattern" in tiny_config(name)


MATRIX = [
    pytest.param(name, tp, pp, ep, id=f"{name}-tp{tp}-pp{pp}-ep{ep}")
    for name in NAMES
    for tp, pp, ep in itertools.product((1, 2, 4), (1, 2), (1, 2) if has_experts(name) else (1,))
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "tp", "pp", "ep"), MATRIX)
def test_every_layout_changes_no_byte(
    checkpoint: Callable[[str], Path], tmp_path: Path, name: str, tp: int, pp: int, ep: int
) -> None:
    round_trip(checkpoint(name), tmp_path, layout_of(name, tp, pp, ep))


def test_a_changed_byte_would_be_seen(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    source = checkpoint("llama")
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    run(plan_hf_to_mcore(source, tmp_path / "mcore", Options(sync=False, layout=Layout(tp=2, pp=2))))
    (stored,) = tmp_path.glob("mcore/**/hf/config.json")
    stored.write_text(json.dumps({**config, "rope_theta": 1.0}), encoding="utf-8")
    run(plan_mcore_to_hf(tmp_path / "mcore", tmp_path / "hf", Options(sync=False)))
    assert not filecmp.cmp(source / "config.json", tmp_path / "hf" / "config.json", shallow=False)
