"""Real Megatron Core loads what mbx writes at its default strictness, computes Transformers' logits, and back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from _ranks import run_ranks
from safetensors.torch import load_file

from converters.mcore.layout import Layout
from mbx.run.job import Options, plan_hf_to_mcore, plan_mcore_to_hf, run

TINY = Path(__file__).resolve().parents[2] / "fixtures" / "tiny"
FAMILIES = ("llama", "qwen2", "qwen3", "mistral")
TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=[1, 2])
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path]:
    """A folder with every family converted at tp 1 or 2, loaded by that many Megatron Core processes."""
    world, work = request.param, tmp_path_factory.mktemp(f"tp{request.param}")
    for family in FAMILIES:
        run(plan_hf_to_mcore(TINY / family, work / family, Options(layout=Layout(tp=world))))
    run_ranks("_convert_worker.py", world, work, *FAMILIES)
    return world, work


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(loaded: tuple[int, Path], family: str) -> None:
    found = torch.load(loaded[1] / "found.pt")
    assert found[family] <= TOLERANCE


@pytest.mark.parametrize("loaded", [1], indirect=True)
@pytest.mark.parametrize("defect", ["swapped", "plain_qkv", "wrong_theta"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_planted_defect_changes_logits(loaded: tuple[int, Path], family: str, defect: str) -> None:
    assert torch.load(loaded[1] / "found.pt")[f"{family}.{defect}"] > 10 * TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_mbx_reads_what_megatron_core_saved(loaded: tuple[int, Path], family: str, tmp_path: Path) -> None:
    work, source = loaded[1], TINY / family
    saved = work / f"{family}.saved" / "iter_0000000"
    run(plan_mcore_to_hf(saved, tmp_path / "hf", Options(dtype="bf16"), hf_config=source))
    for file in sorted(source.glob("*.safetensors")):
        ours, theirs = load_file(tmp_path / "hf" / file.name), load_file(file)
        assert ours.keys() == theirs.keys()
        assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
