"""Checkpoints that say nothing of their model: a trainer's sister folder, `--hf-config`, and what is never taken."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from converters.errors import StorageError
from converters.mcore.layout import Layout
from mbx.formats.beside import token_ids
from mbx.formats.registry import open_megatron, sniff
from mbx.formats.summary import summarize
from mbx.proof.diff import diff
from mbx.proof.parity import parity
from mbx.run.job import Options, plan_hf_to_mcore, plan_mcore_to_hf, run
from mbx.run.reshard import plan_mcore_to_mcore

PLAIN = Options(sync=False)


@pytest.fixture
def actor(tiny: Path, tmp_path: Path) -> Path:
    """A folder as verl leaves it: bare tensors in `dist_ckpt`, config.json and tokenizer in `huggingface`."""
    run(plan_hf_to_mcore(tiny / "llama", tmp_path / "ours", PLAIN))
    actor = tmp_path / "global_step_20" / "actor"
    shutil.copytree(tmp_path / "ours" / "iter_0000000", actor / "dist_ckpt")
    for name in ("hf", "tokenizer"):
        shutil.rmtree(actor / "dist_ckpt" / name)
    for name in ("run_config.yaml", "train_state.pt"):
        (actor / "dist_ckpt" / name).unlink()
    content = {"content_metadata": {"singleton_local_shards": False}, "lr_scheduler": {"num_steps": 20}}
    torch.save(content, actor / "dist_ckpt" / "common.pt")
    shutil.copytree(tiny / "llama", actor / "huggingface", ignore=shutil.ignore_patterns("*.safetensors*"))
    return actor


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("named", ["dist_ckpt", ""])
def test_the_folder_and_the_one_above_are_understood(actor: Path, tiny: Path, tmp_path: Path, named: str) -> None:
    job = plan_mcore_to_hf(actor / named, tmp_path / "hf", PLAIN)
    assert any("huggingface" in note for note in job.plan.notes)
    run(job)
    wanted, found = tensors(tiny / "llama"), tensors(tmp_path / "hf")
    assert wanted.keys() == found.keys() and all(torch.equal(wanted[n], found[n]) for n in wanted)
    assert (tmp_path / "hf/tokenizer.json").read_bytes() == (tiny / "llama/tokenizer.json").read_bytes()
    report = parity(tiny / "llama", actor / named)
    assert [leg.name for leg in report.legs if leg.status != "passed"] == []
    assert diff(tiny / "llama", actor / named).has_settings
    assert summarize(actor / named).table == "llama"


def test_a_named_config_proves_it(actor: Path, tiny: Path, tmp_path: Path) -> None:
    beside = Path(shutil.move(actor / "huggingface", tmp_path / "elsewhere"))
    with pytest.raises(StorageError, match="says nothing of its architecture"):
        plan_mcore_to_hf(actor, tmp_path / "hf", PLAIN)
    assert not parity(tiny / "llama", actor).passed
    assert parity(tiny / "llama", actor, hf_config=beside).passed
    config = json.loads((beside / "config.json").read_text("utf-8"))
    (beside / "config.json").write_text(json.dumps({**config, "rope_theta": 10000.0}), encoding="utf-8")
    legs = {leg.name: leg for leg in parity(tiny / "llama", actor, hf_config=beside).legs}
    assert legs["config"].status == "failed" and "rotary_base" in legs["config"].details[0]


def test_nothing_but_known_names_is_looked_into(actor: Path, tmp_path: Path) -> None:
    (actor / "dist_ckpt").rename(actor / "backup")
    with pytest.raises(StorageError):
        sniff(actor)


def test_a_change_of_layout_knows_the_vocabulary(actor: Path, tmp_path: Path) -> None:
    job = plan_mcore_to_mcore(actor, tmp_path / "moved", Options(sync=False, layout=Layout(tp=2)))
    assert job.plan.config["model.vocab_size"] == 251
    assert job.tensors["embedding.word_embeddings.weight"].shape[0] == 252


def test_bridges_tokenizer_gives_its_ids(tmp_path: Path) -> None:
    settings = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "pad_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    added = [{"id": 7, "content": "<s>"}, {"id": 9, "content": "</s>"}]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": added}), encoding="utf-8")
    assert token_ids(tmp_path) == {"bos_token_id": 7, "eos_token_id": 9}


@pytest.mark.parametrize(
    ("layout", "format", "stated"),
    [
        (Layout(), "torch_dist", None),  # 251 rows: Megatron-LM pads for the layout that it runs in
        (Layout(tp=2, vocab_divisor=64), "torch_dist", 256),
        (Layout(tp=2), "torch_dist", None),  # 252
        (Layout(tp=2), "torch", 252),  # a rank's file loads at its own rows alone
    ],
)
def test_args_state_a_vocabulary_that_every_layout_divides(
    tiny: Path, tmp_path: Path, layout: Layout, format: str, stated: int | None
) -> None:
    job = plan_hf_to_mcore(tiny / "llama", tmp_path / "mcore", Options(layout=layout, format=format))
    assert job.sidecars is not None
    assert (job.sidecars.args["padded_vocab_size"], job.sidecars.args["vocab_size"]) == (stated, 251)


def test_an_iterations_own_tokenizer_comes_along(tiny: Path, tmp_path: Path) -> None:
    run(plan_hf_to_mcore(tiny / "llama", tmp_path / "ours", PLAIN))
    shutil.rmtree(tmp_path / "ours/iter_0000000/hf")
    assert open_megatron(tmp_path / "ours").hf is None
    run(plan_mcore_to_hf(tmp_path / "ours", tmp_path / "hf", PLAIN))
    assert (tmp_path / "hf/tokenizer.json").read_bytes() == (tiny / "llama/tokenizer.json").read_bytes()
    wanted, made = (json.loads((at / "config.json").read_text("utf-8")) for at in (tiny / "llama", tmp_path / "hf"))
    assert made["architectures"] == wanted["architectures"] and made["eos_token_id"] == wanted["eos_token_id"]


def test_a_folder_of_nemo_2_goes_by_its_wrapped_names(actor: Path, tiny: Path, tmp_path: Path) -> None:
    """NeMo 2 keeps its tensors in `weights`, `context` beside it, and puts `module.` before every name."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    reader = dcp.FileSystemReader(actor / "dist_ckpt")
    stored = reader.read_metadata().state_dict_metadata
    state = {
        name: torch.empty(meta.size, dtype=meta.properties.dtype)
        for name, meta in stored.items()
        if isinstance(meta, TensorStorageMetadata)
    }
    dcp.load(state, storage_reader=reader, no_dist=True)
    nemo = tmp_path / "nemo" / "last"
    dcp.save({f"module.{name}": value for name, value in state.items()}, checkpoint_id=nemo / "weights", no_dist=True)
    for name in ("metadata.json", "common.pt"):
        shutil.copyfile(actor / "dist_ckpt" / name, nemo / "weights" / name)
    (nemo / "context").mkdir()
    with pytest.raises(StorageError, match="says nothing of its architecture") as caught:
        plan_mcore_to_hf(nemo, tmp_path / "hf", PLAIN)
    assert "hf-config" in (caught.value.hint or "")
    report = parity(tiny / "llama", nemo, hf_config=actor / "huggingface")
    assert [leg.name for leg in report.legs if leg.status != "passed"] == []
