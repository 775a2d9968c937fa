"""Megatron-FSDP's fsdp_dtensor checkpoints: torch's DTensors load what mbx writes, and mbx reads what they save."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.distributed import checkpoint as dcp

from converters.errors import StorageError, UnsupportedError
from converters.mcore.fsdp_dtensor import Stored, parse_stored, parts_of
from converters.mcore.layout import Layout
from fixtures.make_tiny import make
from mbx.formats.registry import open_megatron as open_any
from mbx.formats.summary import summarize as examine
from mbx.run.job import Options, plan_hf_to_mcore, plan_mcore_to_hf, run
from mbx.run.reshard import plan_mcore_to_mcore
from tests.parity._ranks import run_ranks

HERE = Path(__file__).resolve().parent
FSDP = Options(sync=False, format="fsdp_dtensor", layout=Layout(tp=2, ep=4))
PLAIN = Options(sync=False)
FSDP_PLAIN = Options(sync=False, format="fsdp_dtensor")
Tensors = dict[str, torch.Tensor]


def torchs_own(job: str, work: Path) -> None:
    """Run a job in two processes of torch."""
    run_ranks(str(HERE / "_fsdp_worker.py"), 2, job, work)


def by_hand(folder: Path) -> Tensors:
    """A Qwen3-MoE's tensors as Megatron-FSDP names them, put together from the Hugging Face weights alone."""
    hf = load_file(folder / "model.safetensors")
    out = {
        "embedding.word_embeddings.weight": hf["model.embed_tokens.weight"],
        "output_layer.weight": hf["lm_head.weight"],
        "decoder.final_layernorm.weight": hf["model.norm.weight"],
    }
    for layer in range(4):
        theirs, ours = f"model.layers.{layer}.", f"decoder.layers.{layer}."
        q, k, v = (hf[f"{theirs}self_attn.{name}_proj.weight"] for name in "qkv")
        groups = k.shape[0] // 16
        rows = [part.view(groups, -1, *part.shape[1:]) for part in (q, k, v)]
        out[f"{ours}self_attention.linear_qkv.weight"] = torch.cat(rows, 1).reshape(-1, q.shape[1])
        for name, other in {
            "self_attention.linear_qkv.layer_norm_weight": "input_layernorm",
            "self_attention.linear_proj.weight": "self_attn.o_proj",
            "self_attention.q_layernorm.weight": "self_attn.q_norm",
            "self_attention.k_layernorm.weight": "self_attn.k_norm",
            "pre_mlp_layernorm.weight": "post_attention_layernorm",
            "mlp.router.weight": "mlp.gate",
        }.items():
            out[ours + name] = hf[f"{theirs}{other}.weight"]
        for expert in range(8):
            at = f"{theirs}mlp.experts.{expert}."
            out[f"{ours}mlp.experts.linear_fc1.weight{expert}_w"] = hf[f"{at}gate_proj.weight"]
            out[f"{ours}mlp.experts.linear_fc1.weight{expert}_v"] = hf[f"{at}up_proj.weight"]
            out[f"{ours}mlp.experts.linear_fc2.weight{expert}"] = hf[f"{at}down_proj.weight"]
    return {f"module.{name}": tensor for name, tensor in out.items()}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("qwen3_moe", tmp_path_factory.mktemp("source") / "qwen3_moe")


def test_torch_loads_what_mbx_writes_into_dtensors(source: Path, tmp_path: Path) -> None:
    run(plan_hf_to_mcore(source, tmp_path / "made", FSDP))
    wanted = by_hand(source)
    for name in ("module.embedding.word_embeddings.weight", "module.output_layer.weight"):
        wanted[name] = torch.nn.functional.pad(wanted[name], (0, 0, 0, 1))  # 251 rows, a multiple of --tp 2
    torch.save(wanted, tmp_path / "wanted.pt")
    torchs_own("load", tmp_path)
    loaded = torch.load(tmp_path / "loaded.pt", weights_only=False)
    assert [name for name, tensor in wanted.items() if not torch.equal(tensor, loaded["model"][name])] == []
    assert set(loaded["names"]) == {f"model.{name}" for name in wanted} | {"args", "checkpoint_version", "iteration"}
    assert (loaded["iteration"], loaded["checkpoint_version"]) == (0, 3.0)
    args = loaded["args"]
    assert (args.num_layers, args.num_experts, args.swiglu, args.ckpt_format) == (4, 8, True, "fsdp_dtensor")
    names = {path.name for path in (tmp_path / "made/iter_0000000").iterdir()}
    assert not names & {"metadata.json", "common.pt"}, "Megatron-LM would take it for torch_dist"


def test_mbx_reads_what_dtensors_save(source: Path, tmp_path: Path) -> None:
    wanted = by_hand(source)
    torch.save(wanted, tmp_path / "wanted.pt")
    run(plan_hf_to_mcore(source, tmp_path / "direct", Options(sync=False)))
    common = torch.load(tmp_path / "direct/iter_0000000/common.pt", weights_only=False)
    torch.save(vars(common["args"]), tmp_path / "args.pt")
    torchs_own("save", tmp_path)
    (tmp_path / "theirs/latest_checkpointed_iteration.txt").write_text("7")
    opened = open_any(tmp_path / "theirs")
    assert opened.format == "fsdp_dtensor" and opened.common is not None and opened.common["iteration"] == 7
    assert any("optimizer state: 1 tensors" in what for what in opened.left_out)
    job = plan_mcore_to_hf(tmp_path / "theirs", tmp_path / "hf", PLAIN)
    assert job.plan.table is not None and job.plan.table.name == "qwen3_moe"
    run(job)
    theirs, ours = load_file(source / "model.safetensors"), load_file(tmp_path / "hf/model.safetensors")
    assert theirs.keys() == ours.keys()
    assert [name for name in theirs if not torch.equal(theirs[name], ours[name])] == []
    found = examine(tmp_path / "theirs")
    assert (found.format, found.iteration, found.num_tensors) == ("fsdp_dtensor", 7, len(opened.tensors))


def test_halves_swapped_would_be_seen(source: Path, tmp_path: Path) -> None:
    """Negative control: `_w` is the gate, and no other reading gives the same model."""
    run(plan_hf_to_mcore(source, tmp_path / "made", FSDP))
    index = tmp_path / "made/iter_0000000/.metadata"
    raw = index.read_bytes()
    swapped = re.sub(rb"(weight\d)_([wv])", lambda m: m[1] + (b"_v" if m[2] == b"w" else b"_w"), raw)
    assert swapped != raw
    index.write_bytes(swapped)
    run(plan_mcore_to_hf(tmp_path / "made", tmp_path / "hf", PLAIN))
    theirs, ours = load_file(source / "model.safetensors"), load_file(tmp_path / "hf/model.safetensors")
    wrong = {name.split(".")[-2] for name in theirs if not torch.equal(theirs[name], ours[name])}
    assert wrong == {"gate_proj", "up_proj"}


@pytest.mark.parametrize("name", ["llama_tied", "gpt_oss", "deepseek_v3", "qwen3_next", "qwen2_moe", "llama_nemotron"])
def test_every_kind_of_layer_comes_back(tmp_path: Path, name: str) -> None:
    source = make(name, tmp_path / name)
    run(plan_hf_to_mcore(source, tmp_path / "dist", PLAIN))
    run(plan_mcore_to_mcore(tmp_path / "dist", tmp_path / "fsdp", FSDP_PLAIN))
    stored = dcp.FileSystemReader(tmp_path / "fsdp/iter_0000000").read_metadata().state_dict_metadata
    split = {name for name in stored if name.endswith(("_w", "_v"))}
    assert bool(split) == (name != "gpt_oss"), "only SwiGLU is split; GPT-OSS clamps a quick-GELU"
    assert not [name for name in stored if "_extra_state" in name]
    run(plan_mcore_to_mcore(tmp_path / "fsdp", tmp_path / "legacy", Options(sync=False, format="torch")))
    run(plan_mcore_to_hf(tmp_path / "legacy", tmp_path / "hf", PLAIN))
    for path in source.iterdir():
        assert (tmp_path / "hf" / path.name).read_bytes() == path.read_bytes()


def test_what_is_not_whole_is_refused(source: Path, tmp_path: Path) -> None:
    run(plan_hf_to_mcore(source, tmp_path / "made", FSDP))
    index = tmp_path / "made/iter_0000000/.metadata"
    raw = index.read_bytes()
    for old, new, words in (
        (
            b"layers.2.mlp.experts.linear_fc2.weight7",
            b"layers.2.mlp.experts.linear_fc2.weight8",
            "32 layers and experts|of 36",
        ),
        (b"layers.1.mlp.experts.linear_fc1.weight3_w", b"layers.1.mlp.experts.linear_fc1.weight9_w", "halves|of 40"),
    ):
        index.write_bytes(raw.replace(old, new))
        with pytest.raises(StorageError, match=words):
            open_any(tmp_path / "made")
    with pytest.raises(UnsupportedError, match="Mamba"):
        plan_hf_to_mcore(make("nemotron_h", tmp_path / "source"), tmp_path / "hybrid", FSDP_PLAIN)


@settings(max_examples=50, deadline=None)
@given(layers=st.integers(1, 5), experts=st.integers(1, 5), half=st.integers(1, 8), halves=st.booleans())
def test_names_are_taken_apart_as_they_are_put_together(layers: int, experts: int, half: int, halves: bool) -> None:
    key = "decoder.layers.mlp.experts.experts.linear_fc1.weight"
    parts = parts_of(key, (layers, experts, 2 * half, 4), halves=halves)
    assert len({part.name for part in parts}) == len(parts) == layers * experts * (1 + halves)
    for part in parts:
        layer, expert = part.index
        single = f"decoder.layers.{layer}.mlp.experts.experts.linear_fc1.weight"
        assert parse_stored(part.name) == Stored(single, expert, part.row // half if halves else None)
    assert sum(part.rows for part in parts) == layers * experts * 2 * half
