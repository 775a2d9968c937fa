"""What of Kimi K3 no other table has: numbers behind which zeros stand, and a text model alone within a larger one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from converters.errors import CoverageError
from converters.mcore.layout import Layout
from converters.planning.exporter import HfTensor, Origin, plan_export
from converters.planning.importer import plan_import
from converters.tensors import StoredTensor
from fixtures.make_tiny import make
from mbx.formats.hf import open_hf
from mbx.formats.registry import open_megatron
from mbx.proof.parity import parity
from mbx.run.execution import run
from mbx.run.job import Options, plan_hf_to_mcore, plan_mcore_to_hf
from mbx.tables import table_for

A_LOG = "language_model.model.layers.0.self_attn.A_log"
BESIDE = ("vision_tower.encoder.blocks.0.wqkv.weight", "mm_projector.proj.0.weight")
TWO = Options(sync=False, layout=Layout(tp=2))


def written(folder: Path, **changes: torch.Tensor) -> Path:
    """The tiny model with a tower's tensors beside its text, and with some of its own changed."""
    file = make("kimi_k3", folder) / "model.safetensors"
    tower = {name: torch.ones(3, 2) for name in BESIDE}
    save_file({**load_file(file), **tower, **changes}, file, {"format": "pt"})
    return folder


def test_zeros_behind_the_numbers_of_heads_come_and_go(tmp_path: Path) -> None:
    source = written(tmp_path / "source")
    stored = load_file(source / "model.safetensors")[A_LOG]
    assert stored.shape == (8,) and stored[:4].all() and not stored[4:].any()
    run(plan_hf_to_mcore(source, tmp_path / "mcore", TWO))
    held = open_megatron(tmp_path / "mcore").read("decoder.layers.0.self_attention.A_log")
    assert torch.equal(torch.from_numpy(held), stored[:4])
    run(plan_mcore_to_hf(tmp_path / "mcore", tmp_path / "back", Options(sync=False)))
    for name in ("model.safetensors", "config.json"):
        assert (source / name).read_bytes() == (tmp_path / "back" / name).read_bytes()


def test_what_is_none_is_refused(tmp_path: Path) -> None:
    wrong = torch.tensor([1.0, 2.0, 3.0, 4.0, 0.0, 0.0, 0.5, 0.0])
    source = written(tmp_path / "source", **{A_LOG: wrong})
    with pytest.raises(CoverageError, match=r"A_log` has 4 rows behind its 4 that are not zeros"):
        run(plan_hf_to_mcore(source, tmp_path / "mcore", TWO))
    assert not (tmp_path / "mcore").exists()
    run(
        plan_hf_to_mcore(
            written(tmp_path / "right", **{A_LOG: wrong * (torch.arange(8) < 4)}), tmp_path / "mcore", TWO
        )
    )
    legs = {leg.name: leg for leg in parity(source, tmp_path / "mcore").legs}
    assert legs["weights"].status == "failed" and "not zeros" in legs["weights"].details[0]


def test_an_export_by_the_config_alone_has_as_many_numbers_as_a_head_is_wide(tmp_path: Path) -> None:
    """And not the tower, which no Megatron Core checkpoint of this model has."""
    source = written(tmp_path / "source")
    job = plan_hf_to_mcore(source, tmp_path / "mcore", TWO)
    assert set(job.plan.ledger.beside) == set(BESIDE)
    run(job)
    bare = tmp_path / "config"
    bare.mkdir()
    shutil.copy(source / "config.json", bare)
    run(plan_mcore_to_hf(tmp_path / "mcore", tmp_path / "own", Options(sync=False), hf_config=bare))
    whole, back = load_file(source / "model.safetensors"), load_file(tmp_path / "own" / "model.safetensors")
    assert torch.equal(back[A_LOG], whole[A_LOG])


@pytest.mark.parametrize("wrong", [3, 12])
def test_fewer_numbers_than_heads_are_no_layer(tmp_path: Path, wrong: int) -> None:
    source = written(tmp_path / "source")
    config = json.loads((source / "config.json").read_text("utf-8"))
    config["text_config"]["linear_attn_config"]["num_heads"] = wrong
    (source / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(CoverageError):
        run(plan_hf_to_mcore(source, tmp_path / "mcore", Options(sync=False)))


@pytest.mark.parametrize("shape", [(), (3,), (9,), (8, 1), (0,)])
def test_a_recorded_length_is_that_of_heads_or_of_zeros_too(shape: tuple[int, ...], tmp_path: Path) -> None:
    folder = open_hf(make("kimi_k3", tmp_path / "source"))
    table = table_for(folder.config)
    plan = plan_import(table, folder.config, folder.tensors, Layout())
    stored = {draft.name: StoredTensor(draft.name, draft.dtype, draft.shape, ()) for draft in plan.drafts}

    def exported(length: tuple[int, ...]) -> tuple[int, ...]:
        recorded = {name: HfTensor(tensor.dtype, tensor.shape) for name, tensor in folder.tensors.items()}
        recorded[A_LOG] = HfTensor("F32", length)
        drafts = plan_export(table, plan.config, stored, Origin(recorded)).drafts
        return next(draft.shape for draft in drafts if draft.name == A_LOG)

    assert [exported(length) for length in ((4,), (8,))] == [(4,), (8,)]
    with pytest.raises(CoverageError, match="A_log` is recorded with shape"):
        exported(shape)
